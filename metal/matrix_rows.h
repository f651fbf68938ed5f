// Query rows in tiles of 8, by matrix products: they cost the same whatever rows there are.
// A lane has logits and sums as products leave them, of two rows of each tile.

#include "compat/fragments.h"
#include "query_rows.h"

// Query rows of a row tile: those of a fragment.
constant constexpr int TILE_ROWS = 8;

template <int TILES>
struct QueryRows<false, TILES> {
  enum {
    ROWS = TILE_ROWS * TILES,
    LANE_ROWS = 2 * TILES,
    LANE_TOKENS = 4,
    LANE_COLUMNS = 4,
    LOGITS = 8 * TILES,
    UNIT_SUMS = 8 * TILES,
    UNIT_QUERIES = 32 * 4 * TILES,
    TILE_WORDS = 32 * 4 * TILES,
    LANE_QUERIES = 4 * TILES,  // half2 of a lane's queries in a unit, and of its weights
    SCALES = 2                 // `Scale`s that a tile's scales take
  };
  typedef half2 Scale;

  static TQ_FUNC int row(uint lane, int e) {
    return TILE_ROWS * (e / 2) + 2 * int(tq_minor(lane)) + e % 2;
  }
  static TQ_FUNC bool leads(uint lane) { return tq_major(lane) == 0u; }
  static TQ_FUNC int token(uint lane, int i) { return 8 * i + int(tq_major(lane)); }
  static TQ_FUNC int logit_at(int e, int i) { return 8 * (e / 2) + 2 * i + e % 2; }
  template <int SUMS>
  static TQ_FUNC int sum_row(int i) {
    return 2 * (i / (SUMS / TILES)) + i % 2;
  }
  static TQ_FUNC float max_of_lanes(float x) {
    TQ_UNROLL
    for (int i = 0; i < 3; i++) x = tq_max(x, simd_shuffle_xor(x, ushort(TQ_MAJOR_STRIDES[i])));
    return x;
  }
  static TQ_FUNC float sum_of_lanes(float x) {
    TQ_UNROLL
    for (int i = 0; i < 3; i++) x += simd_shuffle_xor(x, ushort(TQ_MAJOR_STRIDES[i]));
    return x;
  }
  static TQ_FUNC void widen_scales(const thread Scale* pairs, thread float* scales) {
    TQ_UNROLL
    for (int j = 0; j < 4; j += 2) {
      scales[j] = float(pairs[j / 2].x);
      scales[j + 1] = float(pairs[j / 2].y);
    }
  }

  // Where an element of a quarter of a query row is, in halves: in fragments, 4 of each lane, of
  // a unit's 4 columns, for every unit of every row tile.
  template <int PADDED>
  static TQ_FUNC int query_at(int row, int quarter, int column, int e) {
    uint owner = tq_query_lane(uint(row % TILE_ROWS), uint(quarter), uint(e));
    int unit = row / TILE_ROWS * tq_units(PADDED) + column / UNIT_COLUMNS;
    int fragment = (unit * 32 + int(owner)) * UNIT_COLUMNS + column % UNIT_COLUMNS;
    return 2 * fragment + tq_query_half(row % TILE_ROWS, e);
  }
  // This lane's fragments of a unit's 4 columns, of each row tile.
  template <int PADDED>
  static TQ_FUNC void load_unit_query(
      const threadgroup half2* queries, int unit, uint lane, thread half2* query) {
    TQ_UNROLL
    for (int r = 0; r < TILES; r++) {
      uint at = uint(r * tq_units(PADDED) + unit) * 32u + lane;
      tq_load4(queries + 4u * at, query + 4 * r);
    }
  }

  // Add a unit's part of the logits, not yet scaled: logits[8 * r + 2 * j + e] is of token row j
  // and row 2 minor + e of row tile r. TOKEN_ROWS that count, the first 2 or all 4.
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
        for (int r = 0; r < TILES; r++) {
          tq_logits_product(
              logits + 8 * r + 2 * j, query[4 * r + c], query[4 * r + c + 1], keys[0], keys[1],
              keys[2], keys[3]);
        }
      }
    }
  }
  // Products have added them up over lanes already.
  static TQ_FUNC void share_logits(thread float*, uint) {}

  // A tile's weights, as logits lie, to the operands of the next products.
  static TQ_FUNC void store_weights(
      const thread float* weights, threadgroup uint* of_tile, uint lane) {
    TQ_UNROLL
    for (int r = 0; r < TILES; r++) {
      half2 fragments[4];
      TQ_UNROLL
      for (int j = 0; j < 4; j++) {
        fragments[j] =
            tq_weights(tq_half2(weights[8 * r + 2 * j], weights[8 * r + 2 * j + 1]));
      }
      tq_store4(of_tile + 4u * (uint(r) * 32u + lane), fragments);
    }
  }
  static TQ_FUNC void load_weights(
      const threadgroup uint* of_tile, uint lane, thread half2* weights) {
    TQ_UNROLL
    for (int r = 0; r < TILES; r++) {
      tq_load4(of_tile + (uint(r) * 32u + lane) * 4u, weights + 4 * r);
    }
  }

  // Add the weighted values of own unit number `own` of OWN to sums[8 * OWN * r + 8 * own ..]: of
  // row tile r and every two columns 4 floats, the first column's of rows 2 minor and
  // 2 minor + 1, then the second's.
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
        for (int r = 0; r < TILES; r++) {
          tq_values_product(
              sums + 8 * OWN * r + 8 * own + 2 * c, values[0], values[1], values[2], values[3],
              weights[4 * r + j], weights[4 * r + j + 1]);
        }
      }
    }
  }
  template <int OWN>
  static TQ_FUNC void share_sums(thread float*, uint) {}
  // Of the lane's column number i of OWN units, which one it is, and where row e's sum is.
  static TQ_FUNC int column(uint, int i) { return i; }
  template <int OWN>
  static TQ_FUNC int sum_at(int e, int i) {
    return 8 * OWN * (e / 2) + 2 * i + e % 2;
  }
};
