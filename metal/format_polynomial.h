// Format POLYNOMIAL: codes of coordinates whose levels are a polynomial of the code. The levels
// are defined in mlx_turboquant/polynomial.py, where codes lie in unit_codes.h.

#include "format.h"
#include "unit_codes.h"

// Levels are gain * u * P(u * u), P of degree TERMS - 1 in the form that polynomial.py
// gives. The gain is the caller's to apply.
template <int TERMS>
struct LevelPolynomial {
  half2 terms[TERMS > 1 ? TERMS - 1 : 1];
};

// params: the gain, then the terms.
template <int TERMS>
TQ_FUNC LevelPolynomial<TERMS> make_polynomial(const device float* params) {
  LevelPolynomial<TERMS> polynomial;
  TQ_UNROLL
  for (int i = 0; i + 1 < TERMS; i++) polynomial.terms[i] = tq_splat(params[1 + i]);
  return polynomial;
}

// Levels of a couple over the gain. No gather: the codes become mantissa bits of a half,
// 2^e + code / 2^BITS exactly, and one subtraction centres them; e depends on where they lie.
template <int BITS, int TERMS>
TQ_FUNC half2 couple_levels(
    const thread LevelPolynomial<TERMS>& polynomial, const thread uint* words, int columns,
    int couple) {
  constexpr uint CODE_MASK = (1u << BITS) - 1u;
  int low_bit;
  uint bits = couple_bits<BITS>(words, columns, couple, low_bit);
  uint exponent = uint(25 - low_bit - BITS) << 10;
  uint raised = tq_and_or(bits, (CODE_MASK << low_bit) * 0x00010001u, exponent * 0x00010001u);
  // u = (code - (n - 1) / 2) / n, n = 2^BITS.
  half2 u = tq_half2(raised) - tq_half2((exponent | (CODE_MASK << (low_bit - 1))) * 0x00010001u);
  if (TERMS == 1) return u;
  if (TERMS <= 3) {
    half2 sum = tq_fma(u, u, polynomial.terms[0]);
    if (TERMS == 3) sum = tq_fma(sum, sum, polynomial.terms[1]);
    return sum * u;
  }
  half2 square = u * u;
  half2 sum = polynomial.terms[0];
  TQ_UNROLL
  for (int i = 1; i < TERMS - 1; i++) sum = tq_fma(sum, square, polynomial.terms[i]);
  return tq_fma(sum, square, tq_splat(1.0f)) * u;
}

template <bool VALUES, int DIM, int BITS, int TERMS>
struct Format<POLYNOMIAL, VALUES, DIM, BITS, TERMS> {
  enum {
    PADDED = tq_padded(POLYNOMIAL, DIM, BITS),
    LANE_WORDS = PADDED / 32 * BITS + tq_unit_words(BITS, PADDED % 32 / 8),
    SCALES = 1
  };
  typedef LevelPolynomial<TERMS> Params;
  struct Unit {
    uint words[BITS];
  };

  static TQ_FUNC Params make_params(const device float* params, const threadgroup half2*, uint) {
    return make_polynomial<TERMS>(params);
  }
  static TQ_FUNC Unit load(
      const thread PackedTokens& tokens, int tile, int unit, int columns, uint lane) {
    int first = tile * (32 * LANE_WORDS) + 32 * BITS * unit + int(tq_slot(lane));
    const device uint* words = tokens.words + first;
    Unit codes;
    TQ_UNROLL
    for (int i = 0; i < BITS; i++) {
      codes.words[i] = i < tq_unit_words(BITS, columns) ? words[32 * i] : 0u;
    }
    return codes;
  }
  static TQ_FUNC void decode(
      const thread Params& params, const thread Unit& codes, int columns, int c, int j,
      thread half2* four) {
    TQ_UNROLL
    for (int i = 0; i < 4; i++) {
      int couple = 4 * (c + i % 2) + j + i / 2;
      four[i] = couple_levels<BITS, TERMS>(params, codes.words, columns, couple);
    }
  }
};
