// The query rows that a threadgroup of decode_attention.metal attends with, in threadgroup
// memory.

#include "hadamard.h"
#include "compat/fragments.h"
#include "merge_simdgroups.h"
#include "arguments.h"

// Query rows that are attended at once: the rows of a fragment.
constant constexpr int TILE_ROWS = 8;

// Threadgroup memory of pass 1, in floats: for queries, and for what is exchanged after them.
constexpr int tq_split_floats(int dim, int simdgroups) {
  return tq_exchange_floats(simdgroups) > TILE_ROWS / 2 * dim ? tq_exchange_floats(simdgroups)
                                                              : TILE_ROWS / 2 * dim;
}

// Rows of `queries` (threadgroup, TILE_ROWS x DK): queries in the codes' basis times
// `factor`, as halves; signs are times the channels' gains. Rows past the last are zero and
// count for nothing.
template <typename T, int DK, bool ROTATE, int SIMDGROUPS>
TQ_FUNC void load_queries(
    const device T* q, size_t head_stride, size_t step_stride, size_t element_stride,
    const device float* signs, float factor, int first_row, const thread AttendArguments& args,
    threadgroup half* queries, uint simdgroup, uint lane) {
  constexpr int PER_LANE = (DK + 31) / 32;
  for (int r = int(simdgroup); r < TILE_ROWS; r += SIMDGROUPS) {
    int row = first_row + r < args.rows ? first_row + r : args.rows - 1;
    float x[PER_LANE];
    size_t at = (row / args.steps) * head_stride + (row % args.steps) * step_stride;
    load_rotated<T, DK, ROTATE>(q + at, element_stride, signs, lane, x);
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      if (d < DK) queries[r * DK + d] = half(first_row + r < args.rows ? x[i] * factor : 0.0f);
    }
  }
}

// This lane's share of the queries, as the fragments of tq_logits_product take it: 8 pairs
// of each of its LANE_GROUPS groups.
template <int DK, int LANE_GROUPS>
TQ_FUNC void load_query_fragments(
    const threadgroup half* queries, uint lane, thread half2* fragments) {
  TQ_UNROLL
  for (int i = 0; i < LANE_GROUPS; i++) {
    TQ_UNROLL
    for (int p = 0; p < 8; p++) {
      float pair[2];
      TQ_UNROLL
      for (int e = 0; e < 2; e++) {
        int group = int(tq_query_owner(lane) * LANE_GROUPS + i);
        int d = group * 16 + tq_query_element(lane, e, p);
        pair[e] = d < DK ? float(queries[tq_query_row(lane, e) * DK + d]) : 0.0f;
      }
      fragments[i * 8 + p] = tq_half2(pair[0], pair[1]);
    }
  }
}
