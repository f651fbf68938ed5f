// Channel gains of a page: what gains.channel_gains defines. The entry is at the end.

#include "page_sums.h"
#include "arguments.h"

// This lane's powers, of a mean over channels that floors weak ones (gains.power_of).
template <int DIM>
TQ_FUNC void floor_powers(thread float* power, uint lane) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  float sum = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) sum += power[i];
  float floor = tq_max(1e-6f * simd_sum(sum) / float(DIM), 1e-30f);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) power[i] = tq_max(power[i], floor);
}

// Threadgroups: one to a head, in the order (batch, head). x: a page's vectors; queries: of the
// same tokens, read if HAS_QUERIES, of as many heads for each of x.
TQ_ENTRY(channel_gains) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  threadgroup float scratch[SIMDGROUPS * DIM];
  threadgroup float mean[DIM];
  threadgroup float total[DIM];
  GainsArguments args = load_arguments(arguments);
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  size_t batch = threadgroup_position_in_grid.x / uint(args.kv_heads);
  size_t head = threadgroup_position_in_grid.x % uint(args.kv_heads);
  const device T* vectors = x + batch * x_strides[0] + head * x_strides[1];
  float power[PER_LANE];
  float query_power[PER_LANE];
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) power[i] = query_power[i] = 0.0f;
  float per_token = 1.0f / float(args.tokens);
  for (int d = int(32u * simdgroup + lane); d < DIM; d += 32 * SIMDGROUPS) mean[d] = 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (HAS_QUERIES) {
    for (int g = 0; g < args.group; g++) {
      size_t query_head = head * size_t(args.group) + size_t(g);
      add_tokens<Q, DIM, SIMDGROUPS, true>(
          queries + batch * queries_strides[0] + query_head * queries_strides[1],
          queries_strides[2], queries_strides[3], args.tokens, mean, simdgroup, lane,
          query_power);
    }
    share_sums<DIM, SIMDGROUPS>(
        query_power, per_token / float(args.group), scratch, total, simdgroup, lane);
  }
  if (CENTER) {
    add_tokens<T, DIM, SIMDGROUPS, false>(
        vectors, x_strides[2], x_strides[3], args.tokens, mean, simdgroup, lane, power);
    share_sums<DIM, SIMDGROUPS>(power, per_token, scratch, mean, simdgroup, lane);
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) power[i] = 0.0f;
  }
  add_tokens<T, DIM, SIMDGROUPS, true>(
      vectors, x_strides[2], x_strides[3], args.tokens, mean, simdgroup, lane, power);
  share_sums<DIM, SIMDGROUPS>(power, per_token, scratch, total, simdgroup, lane);
  if (simdgroup != 0u) return;
  floor_powers<DIM>(power, lane);
  if (HAS_QUERIES) floor_powers<DIM>(query_power, lane);
  float logs = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    // Roots of the ratio of powers, in logarithms.
    power[i] = HAS_QUERIES ? 0.25f * (tq_log2(power[i]) - tq_log2(query_power[i]))
                           : 0.5f * tq_log2(power[i]);
    if (int(lane) + 32 * i < DIM) logs += power[i];
  }
  float mean_log = simd_sum(logs) / float(DIM);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (d < DIM) gains[size_t(threadgroup_position_in_grid.x) * DIM + d] =
        tq_exp2(power[i] - mean_log);
  }
}
