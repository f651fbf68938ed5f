// The query rows that a threadgroup of decode_attention.metal attends with, and what a lane has
// of their products. A `QueryRows` hides how those are made:
//
//   QueryRows<false, TILES>  TILES tiles of 8 rows, by matrix products (matrix_rows.h)
//   QueryRows<true, COUNT>   COUNT rows, a few, by multiply-adds (fma_rows.h)
//
// It has
//
//   ROWS                       query rows of a threadgroup
//   LOGITS, UNIT_SUMS          floats in which a lane adds up logits, and a unit's values
//   LANE_ROWS, LANE_TOKENS     of a tile, whose logits a lane has once they are shared
//   LANE_COLUMNS               of a unit, whose sums a lane has once they are shared
//   UNIT_QUERIES, TILE_WORDS   half2 of a unit's queries, words of a tile's weights, in
//                              threadgroup memory
//   LANE_QUERIES               half2 of them, of either, that a lane takes at once
//   Scale, SCALES              how a lane has scales of its tokens, and how many
//   row(lane, e), leads(lane)  the lane's row number e; one of the lanes with the same rows leads
//   token(lane, i)             the lane's token number i of a tile
//   logit_at(e, i)             where the logit of these two is
//   sum_row<SUMS>(i)           the number e of the row that sum number i of SUMS is of
//   max_, sum_of_lanes(x)      of all lanes with the same rows
//
// and what matrix_rows.h explains.

#include "hadamard.h"
#include "arguments.h"
#include "tiles.h"

template <bool FMA, int COUNT>
struct QueryRows;

// Fill `queries`: rows in the codes' basis times `factor`, as halves; signs are times the
// channels' gains. Rows past the last and elements past DK are zero and count for nothing.
template <typename T, int DK, int PADDED, typename Rows, bool ROTATE, int SIMDGROUPS>
TQ_FUNC void load_queries(
    const device T* q, size_t head_stride, size_t step_stride, size_t element_stride,
    const device float* signs, float factor, int first_row, const thread AttendArguments& args,
    threadgroup half* queries, uint simdgroup, uint lane) {
  constexpr int PER_LANE = (tq_units(PADDED) * 32 + 31) / 32;
  constexpr int LOADED = (DK + 31) / 32;
  TQ_ROLL
  for (int r = int(simdgroup); r < Rows::ROWS; r += SIMDGROUPS) {
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
      int at = Rows::template query_at<PADDED>(r, d / (PADDED / 4), column, d % 2);
      float element = i < LOADED && d < DK && is_row ? x[i < LOADED ? i : 0] * factor : 0.0f;
      queries[at] = half(element);
    }
    // A last unit of 2 columns is loaded with the 2 that it has not.
    if (PADDED % 32 != 0 && lane < 16u) {
      int column = tq_columns(PADDED) + int(lane % 2u);
      int at = Rows::template query_at<PADDED>(
          r, int(lane / 4u), column, int(lane / 2u % 2u));
      queries[at] = half(0.0f);
    }
  }
}
