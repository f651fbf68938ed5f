// Formats PAIRS and ANGLES: a pair's code names a point in a table, which a norm of its own
// may scale.

#include "pair_codes.h"

struct PointTable {
  const threadgroup half2* points;
};
TQ_FUNC PointTable make_point_table(const threadgroup half2* points) {
  PointTable table;
  table.points = points;
  return table;
}

// `decode` of a format F whose `point` is that of a pair: see format.h.
template <typename F, bool VALUES>
TQ_FUNC void couples_of_points(
    const thread PointTable& params, const thread typename F::Unit& codes, int columns, int c,
    int j, thread half2* four) {
  TQ_UNROLL
  for (int i = 0; i < 2; i++) {
    half2 first = F::point(params, codes, columns, c, j + i, 0);
    half2 second =
        F::point(params, codes, columns, c + (VALUES ? 0 : 1), j + i, VALUES ? 1 : 0);
    four[2 * i] = first;
    four[2 * i + 1] = second;
    if (VALUES) split_pairs(first, second, four[2 * i], four[2 * i + 1]);
  }
}

template <bool VALUES, int DIM, int BITS, int TERMS>
struct Format<PAIRS, VALUES, DIM, BITS, TERMS> {
  typedef PairCodes<VALUES, tq_padded(PAIRS, DIM, BITS), BITS> Codes;
  typedef typename Codes::Unit Unit;
  typedef PointTable Params;
  enum { PADDED = tq_padded(PAIRS, DIM, BITS), LANE_WORDS = Codes::LANE_WORDS, SCALES = 1 };

  static TQ_FUNC Params make_params(const device float*, const threadgroup half2* table, uint) {
    return make_point_table(table);
  }
  static TQ_FUNC Unit load(
      const thread PackedTokens& tokens, int tile, int unit, int, uint lane) {
    return Codes::load(tokens, tile, unit, tq_slot(lane));
  }
  static TQ_FUNC half2 point(
      const thread Params& params, const thread Unit& codes, int columns, int c, int j, int h) {
    return params.points[Codes::code(codes, Codes::index(columns, c, j, h))];
  }
  static TQ_FUNC void decode(
      const thread Params& params, const thread Unit& codes, int columns, int c, int j,
      thread half2* four) {
    couples_of_points<Format, VALUES>(params, codes, columns, c, j, four);
  }
};

// A code is an angle and above it TERMS bits of a norm. scale[0] is the vector's largest norm;
// scale[1] says how far below it norms reach: the least over the largest (8 bits, linear), or
// log(largest / least) (4 bits, logarithmic).
template <bool VALUES, int DIM, int BITS, int TERMS>
struct Format<ANGLES, VALUES, DIM, BITS, TERMS> {
  typedef PairCodes<VALUES, tq_padded(ANGLES, DIM, BITS), BITS + TERMS> Codes;
  typedef PointTable Params;
  enum {
    PADDED = tq_padded(ANGLES, DIM, BITS),
    LANE_WORDS = Codes::LANE_WORDS,
    SCALES = 2,
    TOKENS = VALUES ? 8 : 4  // of a tile that a lane has elements of
  };
  struct Unit {
    typename Codes::Unit codes;
    float norm_ranges[TOKENS];
  };

  static TQ_FUNC Params make_params(const device float*, const threadgroup half2* table, uint) {
    return make_point_table(table);
  }
  static TQ_FUNC Unit load(
      const thread PackedTokens& tokens, int tile, int unit, int, uint lane) {
    Unit codes;
    codes.codes = Codes::load(tokens, tile, unit, tq_slot(lane));
    const device half* ranges = tokens.scales + 64u * uint(tile) + 32u;
    TQ_UNROLL
    for (int i = 0; i < TOKENS; i++) {
      uint of_eight = VALUES ? 2u * tq_minor(lane) + uint(i % 2) : tq_major(lane);
      codes.norm_ranges[i] = float(ranges[4u * of_eight + uint(VALUES ? i / 2 : i)]);
    }
    return codes;
  }
  static TQ_FUNC float norm(uint code, float norm_range) {
    constexpr float STEP = 1.0f / float((1 << TERMS) - 1);
    float fraction = float(code >> BITS) * STEP;
    if (TERMS == 8) return norm_range + (1.0f - norm_range) * fraction;
    return tq_exp2(norm_range * (fraction - 1.0f) * 1.44269504f);
  }
  static TQ_FUNC half2 point(
      const thread Params& params, const thread Unit& codes, int columns, int c, int j, int h) {
    uint code = Codes::code(codes.codes, Codes::index(columns, c, j, h));
    float range = codes.norm_ranges[VALUES ? 2 * j + h : j];
    return params.points[code & ((1u << BITS) - 1u)] * tq_splat(norm(code, range));
  }
  static TQ_FUNC void decode(
      const thread Params& params, const thread Unit& codes, int columns, int c, int j,
      thread half2* four) {
    couples_of_points<Format, VALUES>(params, codes, columns, c, j, four);
  }
};
