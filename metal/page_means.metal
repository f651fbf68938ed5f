// Means of pages in the codes' basis: what Quantizer.add_means defines. The entry is at the end.

#include "page_sums.h"
#include "hadamard.h"
#include "arguments.h"

// Threadgroups: one to a page of a head, in the order (batch, head, page). x: vectors of whole
// pages; signs: over the channels' gains.
TQ_ENTRY(page_means) {
  threadgroup float scratch[SIMDGROUPS * DIM];
  threadgroup float mean[DIM];
  PageMeansArguments args = load_arguments(arguments);
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  uint index = threadgroup_position_in_grid.x;
  uint all_heads = index / uint(args.pages);
  size_t page = index % uint(args.pages);
  size_t batch = all_heads / uint(args.kv_heads);
  size_t head = all_heads % uint(args.kv_heads);
  float sums[DIM / 32];
  TQ_UNROLL
  for (int i = 0; i < DIM / 32; i++) sums[i] = 0.0f;
  add_tokens<T, DIM, SIMDGROUPS, false>(
      x + batch * x_strides[0] + head * x_strides[1] + page * size_t(args.page) * x_strides[2],
      x_strides[2], x_strides[3], args.page, mean, simdgroup, lane, sums);
  share_sums<DIM, SIMDGROUPS>(sums, 1.0f / float(args.page), scratch, mean, simdgroup, lane);
  if (simdgroup != 0u) return;
  rotate<DIM, true>(sums, signs + size_t(all_heads) * DIM, lane);
  TQ_UNROLL
  for (int i = 0; i < DIM / 32; i++) {
    out[size_t(index) * DIM + lane + 32 * i] = half(sums[i] * tq_rsqrt(float(DIM)));
  }
}
