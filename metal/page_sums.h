// Sums over the tokens of a page, channel by channel: a threadgroup's simdgroups take tokens in
// turns, a lane elements lane + 32 * i.

#include "compat/base.h"

// Add to `sums` x, or the square of x - mean, of this simdgroup's vectors of `count`, DIM
// elements each, token_stride apart. mean: DIM floats, read if SQUARES.
template <typename T, int DIM, int SIMDGROUPS, bool SQUARES>
TQ_FUNC void add_tokens(
    const device T* x, size_t token_stride, size_t element_stride, int count,
    const threadgroup float* mean, uint simdgroup, uint lane, thread float* sums) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  for (int token = int(simdgroup); token < count; token += SIMDGROUPS) {
    const device T* vector = x + size_t(token) * token_stride;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      if (d >= DIM) continue;
      float element = float(vector[d * element_stride]);
      if (SQUARES) element -= mean[d];
      sums[i] += SQUARES ? element * element : element;
    }
  }
}

// The sums of all simdgroups times `factor` in total[0 .. DIM), and of this lane in `sums`.
// scratch: SIMDGROUPS * DIM floats. Every simdgroup must call it; it begins and ends in a
// barrier.
template <int DIM, int SIMDGROUPS>
TQ_FUNC void share_sums(
    thread float* sums, float factor, threadgroup float* scratch, threadgroup float* total,
    uint simdgroup, uint lane) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (d < DIM) scratch[int(simdgroup) * DIM + d] = sums[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = int(32u * simdgroup + lane); d < DIM; d += 32 * SIMDGROUPS) {
    float sum = 0.0f;
    TQ_UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) sum += scratch[s * DIM + d];
    total[d] = sum * factor;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    sums[i] = d < DIM ? total[d] : 0.0f;
  }
}
