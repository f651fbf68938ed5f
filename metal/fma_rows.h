// A few query rows, by multiply-adds in float. Where matrix products cost the same for 1 row as
// for 8, and are made by the same ALUs, as on Apple's GPUs, this is fewer instructions
// (docs/design.md). Codes lie as for matrix products (tiles.h), so of a tile a lane adds up
//
//     logits   of 4 tokens 8 j + major and a quarter of their elements, for all rows; then the
//              lanes of one major add theirs, and each goes on with one token, 8 minor + major
//     values   of 8 tokens and its own columns, for all rows; at the end of the split the lanes
//              of one major add theirs, and each goes on with every fourth column
//
// So a lane has all rows, and no exponential is made twice or of a row that is not there.

#include "compat/fragments.h"
#include "query_rows.h"

// Of 4 parts of COUNT sums, what lanes of one major have together of this lane's part, the
// minor-th; it becomes the first. 3 COUNT shuffles: a lane gives away what others go on with.
template <int COUNT>
TQ_FUNC void add_parts(thread float* sums, uint lane) {
  TQ_UNROLL
  for (int bit = 1; bit >= 0; bit--) {
    bool is_upper = (tq_minor(lane) >> bit) % 2u != 0u;
    TQ_UNROLL
    for (int i = 0; i < (COUNT << bit); i++) {
      float lower = sums[i];
      float upper = sums[(COUNT << bit) + i];
      float given = is_upper ? lower : upper;
      float kept = is_upper ? upper : lower;
      sums[i] = kept + simd_shuffle_xor(given, ushort(TQ_MINOR_STRIDES[bit]));
    }
  }
}

template <int COUNT>
struct QueryRows<true, COUNT> {
  enum {
    ROWS = COUNT,
    LANE_ROWS = COUNT,
    LANE_TOKENS = 1,
    LANE_COLUMNS = 1,
    LOGITS = 4 * COUNT,
    UNIT_SUMS = 4 * COUNT,
    UNIT_QUERIES = 4 * 4 * COUNT,
    TILE_WORDS = 32 * COUNT / 2,
    LANE_QUERIES = 4 * COUNT,
    SCALES = 1
  };
  typedef half Scale;

  static TQ_FUNC int row(uint, int e) { return e; }
  static TQ_FUNC bool leads(uint lane) { return lane == 0u; }
  static TQ_FUNC int token(uint lane, int) { return 8 * int(tq_minor(lane)) + int(tq_major(lane)); }
  static TQ_FUNC int logit_at(int e, int) { return e; }
  template <int SUMS>
  static TQ_FUNC int sum_row(int i) {
    return i % COUNT;
  }
  static TQ_FUNC float max_of_lanes(float x) { return simd_max(x); }
  static TQ_FUNC float sum_of_lanes(float x) { return simd_sum(x); }
  static TQ_FUNC void widen_scales(const thread Scale* scale, thread float* scales) {
    scales[0] = float(scale[0]);
  }

  // A unit's queries of one quarter are together, row by row, 4 columns each.
  template <int PADDED>
  static TQ_FUNC int query_at(int row, int quarter, int column, int e) {
    int of_unit = 4 * (column / UNIT_COLUMNS) + quarter;
    return 2 * (UNIT_COLUMNS * (COUNT * of_unit + row) + column % UNIT_COLUMNS) + e;
  }
  template <int PADDED>
  static TQ_FUNC void load_unit_query(
      const threadgroup half2* queries, int unit, uint lane, thread half2* query) {
    const threadgroup half2* of_quarter =
        queries + UNIT_COLUMNS * COUNT * (4 * unit + int(tq_minor(lane)));
    TQ_UNROLL
    for (int r = 0; r < COUNT; r++) tq_load4(of_quarter + 4 * r, query + 4 * r);
  }

  // Add a unit's part of the logits: logits[COUNT * j + r] is of token row j and row r.
  template <typename F, int TOKEN_ROWS>
  static TQ_FUNC void add_unit_logits(
      const thread typename F::Params& params, const thread typename F::Unit& unit, int columns,
      const thread half2* query, thread float* logits) {
    TQ_UNROLL
    for (int c = 0; c < UNIT_COLUMNS; c += 2) {
      if (c >= columns) continue;
      TQ_UNROLL
      for (int j = 0; j < TOKEN_ROWS; j += 2) {
        half2 keys[4];
        F::decode(params, unit, columns, c, j, keys);
        TQ_UNROLL
        for (int i = 0; i < 4 * COUNT; i++) {
          int couple = i / COUNT;
          int r = i % COUNT;
          thread float& sum = logits[COUNT * (j + couple / 2) + r];
          half2 of_row = query[4 * r + c + couple % 2];
          sum = tq_fma(keys[couple].x, of_row.x, sum);
          sum = tq_fma(keys[couple].y, of_row.y, sum);
        }
      }
    }
  }
  static TQ_FUNC void share_logits(thread float* logits, uint lane) {
    add_parts<COUNT>(logits, lane);
  }

  // A tile's weights are read by tokens 8 j + 2 minor + h: those of one minor are together, token
  // by token, row by row.
  static TQ_FUNC void store_weights(
      const thread float* weights, threadgroup uint* of_tile, uint lane) {
    uint major = tq_major(lane);
    uint at = (8u * (major / 2u) + 2u * tq_minor(lane) + major % 2u) * uint(COUNT);
    if (COUNT % 2 == 0) {
      TQ_UNROLL
      for (int r = 0; r < COUNT; r += 2) {
        of_tile[(at + uint(r)) / 2u] = tq_bits(tq_half2(weights[r], weights[r + 1]));
      }
    } else {
      threadgroup half* halves = (threadgroup half*)of_tile;
      TQ_UNROLL
      for (int r = 0; r < COUNT; r++) halves[at + uint(r)] = half(weights[r]);
    }
  }
  static TQ_FUNC void load_weights(
      const threadgroup uint* of_tile, uint lane, thread half2* weights) {
    uint first = tq_minor(lane) * uint(4 * COUNT);
    TQ_UNROLL
    for (int i = 0; i < 4 * COUNT; i += 4) tq_load4(of_tile + (first + uint(i)), weights + i);
  }
  static TQ_FUNC half weight(const thread half2* weights, int token, int r) {
    half2 pair = weights[(COUNT * token + r) / 2];
    return (COUNT * token + r) % 2 == 0 ? pair.x : pair.y;
  }

  // Add the weighted values of own unit number `own` to sums[COUNT * column + r].
  template <typename F, int OWN>
  static TQ_FUNC void add_unit_values(
      const thread typename F::Params& params, const thread typename F::Unit& unit, int columns,
      const thread half2* weights, int own, thread float* sums) {
    TQ_UNROLL
    for (int c = 0; c < UNIT_COLUMNS; c += 2) {
      if (c >= columns) continue;
      TQ_UNROLL
      for (int j = 0; j < 4; j += 2) {
        half2 values[4];
        F::decode(params, unit, columns, c, j, values);
        TQ_UNROLL
        for (int i = 0; i < 4 * COUNT; i++) {
          int couple = i / COUNT;
          int r = i % COUNT;
          int token = 2 * (j + couple / 2);
          thread float& sum = sums[COUNT * (UNIT_COLUMNS * own + c + couple % 2) + r];
          sum = tq_fma(values[couple].x, weight(weights, token, r), sum);
          sum = tq_fma(values[couple].y, weight(weights, token + 1, r), sum);
        }
      }
    }
  }
  template <int OWN>
  static TQ_FUNC void share_sums(thread float* sums, uint lane) {
    TQ_UNROLL
    for (int i = 0; i < OWN; i++) add_parts<COUNT>(sums + UNIT_SUMS * i, lane);
  }
  static TQ_FUNC int column(uint lane, int i) {
    return UNIT_COLUMNS * i + int(tq_minor(lane));
  }
  template <int OWN>
  static TQ_FUNC int sum_at(int e, int i) {
    return UNIT_SUMS * i + e;
  }
};
