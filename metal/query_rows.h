// The query rows that a threadgroup of decode_attention.metal attends with, in threadgroup
// memory, as the fragments that matrix products take.

#include "hadamard.h"
#include "arguments.h"
#include "tiles.h"

// Query rows of a row tile: those of a fragment.
constant constexpr int TILE_ROWS = 8;

// Threadgroup memory for them, in fragments of half2: 4 of each lane, of a unit's 4 columns, for
// every unit of every row tile.
constexpr int tq_query_fragments(int padded, int row_tiles) {
  return row_tiles * tq_units(padded) * 32 * UNIT_COLUMNS;
}

// Fill `queries`: rows in the codes' basis times `factor`, as halves; signs are times the
// channels' gains. Rows past the last and elements past DK are zero and count for nothing.
template <typename T, int DK, int PADDED, int ROW_TILES, bool ROTATE, int SIMDGROUPS>
TQ_FUNC void load_queries(
    const device T* q, size_t head_stride, size_t step_stride, size_t element_stride,
    const device float* signs, float factor, int first_row, const thread AttendArguments& args,
    threadgroup half* queries, uint simdgroup, uint lane) {
  constexpr int PER_LANE = (tq_units(PADDED) * 32 + 31) / 32;
  constexpr int LOADED = (DK + 31) / 32;
  TQ_ROLL
  for (int r = int(simdgroup); r < TILE_ROWS * ROW_TILES; r += SIMDGROUPS) {
    int row = first_row + r;
    bool is_row = row < args.rows;
    float x[LOADED];
    if (is_row) {
      int query_head = args.steps == 1 ? row : row / args.steps;
      size_t at = query_head * head_stride + (row - query_head * args.steps) * step_stride;
      load_elements<T, DK>(q + at, element_stride, lane, x);
      rotate<DK, ROTATE>(x, signs, lane);
    }
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      if (d >= PADDED) continue;
      int column = d % (PADDED / 4) / 2;
      uint owner = tq_query_lane(uint(r % TILE_ROWS), uint(d / (PADDED / 4)), uint(d % 2));
      int unit = r / TILE_ROWS * tq_units(PADDED) + column / UNIT_COLUMNS;
      int fragment = (unit * 32 + int(owner)) * UNIT_COLUMNS + column % UNIT_COLUMNS;
      float element = i < LOADED && d < DK && is_row ? x[i < LOADED ? i : 0] * factor : 0.0f;
      queries[2 * fragment + tq_query_half(r % TILE_ROWS, d % 2)] = half(element);
    }
    // A last unit of 2 columns is loaded with the 2 that it has not.
    if (PADDED % 32 != 0 && lane < 16u) {
      int column = tq_columns(PADDED) + int(lane % 2u);
      uint owner = tq_query_lane(uint(r % TILE_ROWS), lane / 4u, lane / 2u % 2u);
      int unit = r / TILE_ROWS * tq_units(PADDED) + column / UNIT_COLUMNS;
      int fragment = (unit * 32 + int(owner)) * UNIT_COLUMNS + column % UNIT_COLUMNS;
      queries[2 * fragment + tq_query_half(r % TILE_ROWS, int(lane / 2u % 2u))] = half(0.0f);
    }
  }
}

// This lane's fragments of a unit's 4 columns, of each row tile.
template <int PADDED, int ROW_TILES>
TQ_FUNC void load_unit_query(
    const threadgroup half2* queries, int unit, uint lane, thread half2* fragments) {
  TQ_UNROLL
  for (int r = 0; r < ROW_TILES; r++) {
    uint at = uint(r * tq_units(PADDED) + unit) * 32u + lane;
    tq_load4(queries + 4u * at, fragments + 4 * r);
  }
}
