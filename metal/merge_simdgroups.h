// The partial results of a threadgroup's simdgroups, which attended the same rows to tokens of
// their own, merged in threadgroup memory. Each simdgroup comes out with a part of the sums.

#include "compat/fragments.h"

// Floats of a lane that are exchanged at once, the sums of one group: 8 pairs of elements of
// two rows.
constant constexpr int GROUP_SUMS = 32;

// Threadgroup memory for it, in floats: a state a row, and what is sent to other simdgroups.
constexpr int tq_exchange_floats(int simdgroups) {
  return 16 * simdgroups + (simdgroups - 1) * 32 * GROUP_SUMS;
}

// Maximum and denominator of a lane's two rows become those of all simdgroups; returns in
// `factors` what this simdgroup's sums of either row are to be multiplied with. Every
// simdgroup of the threadgroup must call it, and may use its threadgroup memory until then.
template <int SIMDGROUPS>
TQ_FUNC void merge_row_states(
    thread float* maximum, thread float* denominator, thread float* factors,
    threadgroup float* exchange, uint simdgroup, uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    threadgroup float* state = exchange + 2u * (2u * tq_minor(lane) + uint(e));
    if (tq_major(lane) == 0u) {
      state[16u * simdgroup] = maximum[e];
      state[16u * simdgroup + 1u] = denominator[e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    const threadgroup float* state = exchange + 2u * (2u * tq_minor(lane) + uint(e));
    float own = maximum[e];
    denominator[e] = 0.0f;
    TQ_UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) maximum[e] = tq_max(maximum[e], state[16 * s]);
    TQ_UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) {
      denominator[e] += tq_exp2(state[16 * s] - maximum[e]) * state[16 * s + 1];
    }
    factors[e] = tq_exp2(own - maximum[e]);
  }
}

// Add up the GROUP_SUMS of all simdgroups: `merged` gets the simdgroup-th part of them,
// GROUP_SUMS / SIMDGROUPS. Between two calls there has to be a barrier.
template <int SIMDGROUPS>
TQ_FUNC void merge_group_sums(
    const thread float* sums, thread float* merged, threadgroup float* exchange, uint simdgroup,
    uint lane) {
  constexpr int PART = GROUP_SUMS / SIMDGROUPS;
  // For each part a slot from every simdgroup but its own.
  threadgroup float* slots = exchange + 16 * SIMDGROUPS + lane;
  TQ_UNROLL
  for (int part = 0; part < SIMDGROUPS; part++) {
    if (uint(part) == simdgroup) {
      TQ_UNROLL
      for (int i = 0; i < PART; i++) merged[i] = sums[PART * part + i];
    } else {
      uint sender = simdgroup < uint(part) ? simdgroup : simdgroup - 1u;
      threadgroup float* slot = slots + (part * (SIMDGROUPS - 1) + int(sender)) * PART * 32;
      TQ_UNROLL
      for (int i = 0; i < PART; i++) slot[32 * i] = sums[PART * part + i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  slots += int(simdgroup) * (SIMDGROUPS - 1) * PART * 32;
  TQ_UNROLL
  for (int i = 0; i < (SIMDGROUPS - 1) * PART; i++) merged[i % PART] += slots[32 * i];
}
