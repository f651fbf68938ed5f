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

// What makes levels: codecs/trellis_levels.py has the formula. `first` is of couples of an even
// and an odd element (keys), or of even ones, `second` of odd ones (values).
struct LevelFormula {
  half2 first_multiplier, second_multiplier;
  half2 slope;
};
// params: the gain, twice the multipliers of even and of odd elements, the slope.
template <bool VALUES>
TQ_FUNC LevelFormula make_formula(const device float* params) {
  LevelFormula formula;
  formula.first_multiplier = tq_half2(params[1], params[VALUES ? 1 : 2]);
  formula.second_multiplier = tq_splat(params[2]);
  formula.slope = tq_splat(params[3]);
  return formula;
}

// Levels over the gain, of the windows in the low 8 bits of both halves. A window becomes the
// mantissa of 1024 + window; u is what the product loses by being rounded to a half, which a
// multiply-add finds exactly.
TQ_FUNC half2 window_levels(uint windows, half2 multiplier, half2 slope) {
  half2 number = tq_half2(tq_and_or(windows, 0x00FF00FFu, 0x64006400u));
  half2 product = number * multiplier;
  half2 u = tq_fma(number, multiplier, -product);
  half2 square = u * u;
  half2 fourth = square * square;
  return tq_fma(fourth, fourth, slope) * u;
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
  // The bits from the pair's on, as many as its windows see.
  static TQ_FUNC uint window_bits(const thread Unit& codes, int c, int j, int h) {
    int index = Codes::index(UNIT_COLUMNS, c, j, h);
    int own = BITS * (RUN - index % RUN);  // bits of the run from the pair's on
    int shift = BITS * index % 32;
    uint x;
    if (shift + (own < BITS + LOOKAHEAD ? own : BITS + LOOKAHEAD) <= 32) {
      x = codes.codes.words[BITS * index / 32] >> shift;
    } else {
      x = tq_funnel(
          codes.codes.words[BITS * index / 32], codes.codes.words[BITS * index / 32 + 1],
          uint(shift));
    }
    TQ_UNROLL
    for (int i = 0; i < NEXT_UNITS; i++) {
      int at = own + RUN * BITS * i;
      if (at >= BITS + LOOKAHEAD) continue;
      int first = BITS * (index - index % RUN);
      uint run = codes.next[i].words[first / 32] >> (first % 32);
      if (first % 32 + RUN * BITS > 32) {
        run = tq_funnel(
            codes.next[i].words[first / 32], codes.next[i].words[first / 32 + 1],
            uint(first % 32));
      }
      x = tq_and_or(x, (1u << at) - 1u, run << at);
    }
    return x;
  }
  static TQ_FUNC void decode(
      const thread Params& params, const thread Unit& codes, int, int c, int j,
      thread half2* four) {
    TQ_UNROLL
    for (int i = 0; i < 2; i++) {
      uint x = window_bits(codes, c, j + i, 0);
      uint y = window_bits(codes, c + (VALUES ? 0 : 1), j + i, VALUES ? 1 : 0);
      half2 multiplier = params.first_multiplier;
      if (VALUES) {
        uint both = tq_low_halves(x, y);
        four[2 * i] = window_levels(both, multiplier, params.slope);
        four[2 * i + 1] = window_levels(both >> TERMS, params.second_multiplier, params.slope);
      } else {
        uint first = tq_outer_halves(x, x << (16 - TERMS));
        uint second = tq_outer_halves(y, y << (16 - TERMS));
        four[2 * i] = window_levels(first, multiplier, params.slope);
        four[2 * i + 1] = window_levels(second, multiplier, params.slope);
      }
    }
  }
};
