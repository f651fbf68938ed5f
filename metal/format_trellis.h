// Format TRELLIS: a level is computed from a window of 8 bits of the stream of a vector's codes.
// With x the bits from a pair's own on, the windows of its two elements overlap:
//
//     bit of x     TERMS + 7 ..  8 | 7  ..  TERMS | TERMS - 1  ..  0
//     even element                 |<------------ window ---------->|
//     odd element  |<----------- window --------->|
//
// The stream goes on in the next unit of the lane, and behind its last one in the first of the
// lane that has the next part of the vector; behind the last element is the first.

#include "pair_codes.h"
#include "compat/bytes.h"

// What makes levels: codecs/trellis_levels.py has the formula. Multipliers are of couples of an
// even and an odd element (keys), or of even ones and of odd ones (values).
struct LevelFormula {
  half2 multipliers[2];
  half2 minus_bend;
  half2 slope;
};
// params: the gain, twice the multipliers of even and of odd elements, the bend, the slope.
template <bool VALUES>
TQ_FUNC LevelFormula make_formula(const device float* params) {
  LevelFormula formula;
  formula.multipliers[0] = tq_half2(params[1], params[VALUES ? 1 : 2]);
  formula.multipliers[1] = tq_splat(params[2]);
  formula.minus_bend = tq_splat(-params[3]);
  formula.slope = tq_splat(params[4]);
  return formula;
}

// Levels over the gain, of the windows in the low 8 bits of both halves. A window becomes the
// mantissa of 1024 + window; u is what the product loses by being rounded to a half, which a
// multiply-add finds exactly.
TQ_FUNC half2 window_levels(
    const thread LevelFormula& formula, uint windows, half2 multiplier) {
  half2 number = tq_half2(tq_and_or(windows, 0x00FF00FFu, 0x64006400u));
  half2 product = number * multiplier;
  half2 u = tq_fma(number, multiplier, -product);
  half2 bent = tq_fma(u, u, formula.minus_bend);
  return tq_fma(bent, bent, formula.slope) * u;
}

template <bool VALUES, int DIM, int BITS, int TERMS>
struct Format<TRELLIS, VALUES, DIM, BITS, TERMS> {
  typedef PairCodes<VALUES, tq_padded(TRELLIS, DIM, BITS), BITS> Codes;
  enum {
    PADDED = tq_padded(TRELLIS, DIM, BITS),
    LANE_WORDS = Codes::LANE_WORDS,
    SCALES = 1,
    UNITS = tq_units(PADDED),
    LOOKAHEAD = TERMS + 8 - BITS,  // bits that a window needs behind its pair's own
    RUN = VALUES ? 2 : 4,          // a token's codes in a unit
    NEXT_UNITS = (LOOKAHEAD + RUN * BITS - 1) / (RUN * BITS)  // that windows reach into
  };
  struct Unit {
    typename Codes::Unit codes;
    typename Codes::Unit next[NEXT_UNITS];
  };
  typedef LevelFormula Params;

  static TQ_FUNC Params make_params(const device float* params, const threadgroup half2*, uint) {
    return make_formula<VALUES>(params);
  }
  static TQ_FUNC Unit load(
      const thread PackedTokens& tokens, int tile, int unit, int, uint lane) {
    Unit codes;
    uint slot = tq_slot(lane);
    codes.codes = Codes::load(tokens, tile, unit, slot);
    TQ_UNROLL
    for (int i = 0; i < NEXT_UNITS; i++) {
      if (++unit == UNITS) {
        unit = 0;
        slot = VALUES ? (slot + 4u) % 32u : slot / 4u * 4u + (slot + 1u) % 4u;
      }
      codes.next[i] = Codes::load(tokens, tile, unit, slot);
    }
    return codes;
  }
  // 32 bits of a unit's stream from bit `first` on, or as many as it has.
  static TQ_FUNC uint stream_bits(const thread typename Codes::Unit& codes, int first) {
    int word = first / 32;
    if (first % 32 == 0) return codes.words[word];
    if (word + 1 == int(Codes::UNIT_WORDS)) return codes.words[word] >> (first % 32);
    return tq_funnel(codes.words[word], codes.words[word + 1], uint(first % 32));
  }
  // A token's stream from its run in this unit on, which begins at bit `first`.
  static TQ_FUNC uint run_bits(const thread Unit& codes, int first) {
    uint bits = stream_bits(codes.codes, first);
    TQ_UNROLL
    for (int i = 0; i < NEXT_UNITS; i++) {
      int length = RUN * BITS * (i + 1);
      if (length >= 32) break;
      uint next = first >= length ? stream_bits(codes.next[i], first - length)
                                  : stream_bits(codes.next[i], first) << length;
      bits = tq_select(bits, next, (1u << length) - 1u);
    }
    return bits;
  }
  // The windows of the pair of row j and column c, in the low bytes of halves.
  static TQ_FUNC uint pair_windows(const thread Unit& codes, int c, int j) {
    int first = RUN * BITS * j;
    uint bits = run_bits(codes, first);
    int even = BITS * c;
    int odd = even + TERMS;
    uint shifted = bits >> (odd % 8);
    if (odd + 8 > 32) {
      uint behind = stream_bits(codes.next[0], first + 32 - RUN * BITS);
      shifted = tq_funnel(bits, behind, uint(odd % 8));
    }
    return tq_two_bytes(bits >> (even % 8), even / 8, shifted, odd / 8);
  }
  // The same of two tokens' elements, of which the even ones' windows begin BITS * p bits behind
  // their runs; `odd` for the odd ones.
  static TQ_FUNC uint couple_windows(const thread Unit& codes, int p, int j, bool odd) {
    int at = BITS * p + (odd ? TERMS : 0);
    if (BITS == 8) {
      // A word has both runs, 16 bits each.
      uint own = codes.codes.words[j] >> at;
      uint mask = ((1u << (16 - at)) - 1u) * 0x00010001u;
      return at <= 8 ? own : tq_select(own, codes.next[0].words[j] << (16 - at), mask);
    }
    if (BITS == 4) {
      // Half a word has both, 8 bits each.
      return tq_zip_bytes(codes.codes.words[j / 2], codes.next[0].words[j / 2], j % 2 != 0) >> at;
    }
    uint low = run_bits(codes, RUN * BITS * 2 * j) >> (BITS * p);
    uint high = run_bits(codes, RUN * BITS * (2 * j + 1)) >> (BITS * p);
    uint both = tq_low_halves(low, high);
    return odd ? both >> TERMS : both;
  }
  static TQ_FUNC void decode(
      const thread Params& params, const thread Unit& codes, int, int c, int j,
      thread half2* four) {
    TQ_UNROLL
    for (int i = 0; i < 2; i++) {
      TQ_UNROLL
      for (int e = 0; e < 2; e++) {
        uint windows = VALUES ? couple_windows(codes, c / 2, j + i, e != 0)
                              : pair_windows(codes, c + e, j + i);
        four[2 * i + e] = window_levels(params, windows, params.multipliers[VALUES ? e : 0]);
      }
    }
  }
};
