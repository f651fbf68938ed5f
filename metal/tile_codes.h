// Where codes lie in tile order, as mlx_turboquant/tiles.py draws it: for kernels that make
// it of vector order, and that read it code by code.

#include "format.h"

// A pair's code in tile order: its slot, and its number among the slot's codes.
struct PairPlace {
  uint slot, number;
};
// A pair of one of a tile's tokens.
struct TilePair {
  uint token, pair;
};

template <int KIND, int DIM, int BITS, int TERMS, bool VALUES>
struct TileOrder {
  enum {
    PADDED = tq_padded(KIND, DIM, BITS),
    FILLED_PAIRS = PADDED / 2,  // of a vector, padding included
    COLUMNS = tq_columns(PADDED),
    UNITS = tq_units(PADDED),
    HAS_HALF_UNIT = COLUMNS % 4 != 0,
    CODE_BITS = KIND == ANGLES ? BITS + TERMS : BITS,
    SCALES = KIND == ANGLES ? 2 : 1,
    LANE_WORDS = KIND == POLYNOMIAL ? COLUMNS / 4 * BITS + HAS_HALF_UNIT * ((BITS + 1) / 2)
                                    : (FILLED_PAIRS * CODE_BITS + 31) / 32,
    WORDS = TILE_TOKENS * LANE_WORDS,
    // Tokens that a slot has pairs of, how many, and how many lie together in a unit.
    SLOT_TOKENS = VALUES ? 8 : 4,
    SLOT_PAIRS = VALUES ? COLUMNS / 2 : COLUMNS,
    RUN_PAIRS = VALUES ? 2 : 4
  };

  // RUN_PAIRS, but for a last unit of two columns.
  static TQ_FUNC uint run_of(uint unit) {
    return tq_min(uint(RUN_PAIRS), uint(SLOT_PAIRS) - uint(RUN_PAIRS) * unit);
  }
  static TQ_FUNC PairPlace place_of(TilePair at) {
    uint share = at.pair / uint(SLOT_PAIRS);  // the slot's major index (values) or minor one
    uint column = at.pair % uint(SLOT_PAIRS);
    uint row = at.token / 8u;
    uint within = at.token % 8u;
    uint unit = column / uint(RUN_PAIRS);
    PairPlace place;
    place.slot = VALUES ? 4u * share + within / 2u : 4u * within + share;
    place.number = 16u * unit + run_of(unit) * (VALUES ? 2u * row + within % 2u : row)
                   + column % uint(RUN_PAIRS);
    return place;
  }
  // The inverse of place_of.
  static TQ_FUNC TilePair pair_at(PairPlace place) {
    uint unit = place.number / 16u;
    uint run = run_of(unit);
    uint row = place.number % 16u / run;
    uint column = uint(RUN_PAIRS) * unit + place.number % 16u % run;
    TilePair at;
    at.token = slot_token(place.slot, row);
    at.pair = first_pair(place.slot) + column;
    return at;
  }
  // The tokens whose pairs a slot has, SLOT_TOKENS of them.
  static TQ_FUNC uint slot_token(uint slot, uint row) {
    return VALUES ? row / 2u * 8u + slot % 4u * 2u + row % 2u : 8u * row + slot / 4u;
  }
  static TQ_FUNC uint first_pair(uint slot) {
    return (VALUES ? slot / 4u : slot % 4u) * uint(SLOT_PAIRS);
  }
  // Where a token's first scale is; the second is TILE_TOKENS behind it.
  static TQ_FUNC uint scale_at(uint token) { return token % 8u * 4u + token / 8u; }
};

// Code `number` of a stream of codes of BITS each, whose words are STRIDE apart.
template <int BITS, int STRIDE>
TQ_FUNC uint stream_code(const device uint* words, uint number) {
  uint first_bit = number * uint(BITS);
  uint word = first_bit / 32u * uint(STRIDE);
  uint shift = first_bit % 32u;
  uint bits = words[word] >> shift;
  if (32 % BITS != 0 && shift + uint(BITS) > 32u) {
    bits |= words[word + uint(STRIDE)] << (32u - shift);
  }
  return bits & ((1u << BITS) - 1u);
}
