// Formats PAIRS and ANGLES: a pair's code names a point in a table, which a norm of its own
// may scale.

#include "pair_stream.h"

struct PointTable {
  const threadgroup half2* points;
};
TQ_FUNC PointTable make_point_table(const threadgroup half2* points) {
  PointTable table;
  table.points = points;
  return table;
}

template <int DIM, int BITS, int TERMS, bool SINGLE_TABLE>
struct Format<PAIRS, DIM, BITS, TERMS, SINGLE_TABLE> : PairStream<DIM, BITS, 0, 8, 0> {
  typedef PairStream<DIM, BITS, 0, 8, 0> Stream;
  typedef typename Stream::Codes Codes;
  typedef StreamTokenPair<Codes> TokenPair;
  typedef PointTable DecodeParams;

  static TQ_FUNC DecodeParams make_params(
      const device float*, const threadgroup half2* table, uint) {
    return make_point_table(table);
  }
  static TQ_FUNC half2 decode_pair(
      const thread DecodeParams& params, const thread Codes& codes, int p) {
    return params.points[Stream::code(codes, p)];
  }
  static TQ_FUNC TokenPair make_token_pair(const thread Codes& a, const thread Codes& b) {
    return stream_token_pair<Codes>(a, b);
  }
  static TQ_FUNC void decode_even_odd(
      const thread DecodeParams& params, const thread TokenPair& tokens, int p,
      thread half2& even, thread half2& odd) {
    split_pairs(
        decode_pair(params, tokens.first, p), decode_pair(params, tokens.second, p), even, odd);
  }
};

// A vector's words are the circle of angles, then TERMS bits of norm for each pair:
//
//     | angles, CIRCLE_WORDS | norms of group 0, TERMS / 4 words | norms of group 1 | ..
//
// scale[0] is the vector's largest norm; scale[1] says how far below it norms reach: the
// least over the largest (8 bits, linear), or log(largest / least) (4 bits, logarithmic).
template <int DIM, int BITS, int TERMS, bool SINGLE_TABLE>
struct Format<ANGLES, DIM, BITS, TERMS, SINGLE_TABLE>
    : PairStream<DIM, BITS, 0, 8, (DIM + 15) / 16 * (TERMS / 4)> {
  typedef PairStream<DIM, BITS, 0, 8, (DIM + 15) / 16 * (TERMS / 4)> Stream;
  enum { SCALES = 2, GROUP_NORM_WORDS = TERMS / 4, WORDS = Stream::WORDS };
  struct Cursor {
    typename Stream::Cursor angles;
    const device half* scales;
    int norms;
    int norm_range;
  };
  struct Codes {
    typename Stream::Codes angles;
    uint norms[GROUP_NORM_WORDS];
    float norm_range;
  };
  typedef StreamTokenPair<Codes> TokenPair;
  typedef PointTable DecodeParams;

  static TQ_FUNC DecodeParams make_params(
      const device float*, const threadgroup half2* table, uint) {
    return make_point_table(table);
  }
  static TQ_FUNC Cursor make_cursor(
      const thread PackedTokens& tokens, uint group, uint groups) {
    Cursor cursor;
    cursor.angles = Stream::make_cursor(tokens, group, groups);
    cursor.scales = tokens.scales;
    cursor.norms = int(Stream::CIRCLE_WORDS) + int(group) * int(GROUP_NORM_WORDS);
    cursor.norm_range = 1;
    return cursor;
  }
  static TQ_FUNC void advance(thread Cursor& cursor, int tokens) {
    Stream::advance(cursor.angles, tokens);
    cursor.norms += tokens * int(WORDS);
    cursor.norm_range += 2 * tokens;
  }
  static TQ_FUNC Codes load(const thread Cursor& cursor, int tokens) {
    Codes codes;
    codes.angles = Stream::load(cursor.angles, tokens);
    TQ_UNROLL
    for (int i = 0; i < GROUP_NORM_WORDS; i++) {
      codes.norms[i] = cursor.angles.words[cursor.norms + tokens * int(WORDS) + i];
    }
    codes.norm_range = float(cursor.scales[cursor.norm_range + 2 * tokens]);
    return codes;
  }
  // Pair p's norm over the vector's largest.
  static TQ_FUNC float norm(const thread Codes& codes, int p) {
    constexpr float MAX_CODE = float((1 << TERMS) - 1);
    uint code = (codes.norms[TERMS * p / 32] >> (TERMS * p % 32)) & ((1u << TERMS) - 1u);
    float fraction = float(code) / MAX_CODE;
    if (TERMS == 8) return codes.norm_range + (1.0f - codes.norm_range) * fraction;
    return tq_exp2(codes.norm_range * (fraction - 1.0f) * 1.44269504f);
  }
  static TQ_FUNC half2 decode_pair(
      const thread DecodeParams& params, const thread Codes& codes, int p) {
    return params.points[Stream::code(codes.angles, p)] * tq_splat(norm(codes, p));
  }
  static TQ_FUNC TokenPair make_token_pair(const thread Codes& a, const thread Codes& b) {
    return stream_token_pair<Codes>(a, b);
  }
  static TQ_FUNC void decode_even_odd(
      const thread DecodeParams& params, const thread TokenPair& tokens, int p,
      thread half2& even, thread half2& odd) {
    split_pairs(
        decode_pair(params, tokens.first, p), decode_pair(params, tokens.second, p), even, odd);
  }
};
