// Decode attention, pass 2: one threadgroup per query row merges the partial results of pass 1
// (decode_attention.metal), those of packed tokens taken out of the codes' basis, and the
// learned sink logit, and normalises. The entry is at the end.

#include "hadamard.h"
#include "arguments.h"

// Partial results in flight at once: one at a time, each would wait for memory.
constant constexpr int IN_FLIGHT = 4;

// Add partial results `first`, first + step, .. before `end`, as they weigh beside the maximum
// `top`. sums: element lane + 32 * i of DV.
template <int DV>
TQ_FUNC void add_partials(
    thread float* sums, const device float* partial_out, const device float* partial_lse,
    float top, int first, int end, int step, uint lane) {
  constexpr int PER_LANE = (DV + 31) / 32;
  for (int split = first; split < end; split += IN_FLIGHT * step) {
    float x[IN_FLIGHT * PER_LANE];
    TQ_UNROLL
    for (int a = 0; a < IN_FLIGHT; a++) {
      int at = split + a * step < end ? split + a * step : split;
      TQ_UNROLL
      for (int i = 0; i < PER_LANE; i++) {
        int d = int(lane) + 32 * i;
        x[a * PER_LANE + i] = d < DV ? partial_out[at * DV + d] : 0.0f;
      }
    }
    TQ_UNROLL
    for (int a = 0; a < IN_FLIGHT; a++) {
      if (split + a * step >= end) break;
      float weight = tq_exp2(partial_lse[2 * (split + a * step)] - top);
      TQ_UNROLL
      for (int i = 0; i < PER_LANE; i++) sums[i] += weight * x[a * PER_LANE + i];
    }
  }
}

// Pointers are to this row's part, or its KV head's, of
//   partial_out, partial_lse   as pass 1 left them
//   v_signs                    float (DV), times the channels' gains, read if ROTATE_V
//   out                        T (DV)
//   scratch                    threadgroup float (SIMDGROUPS * DV)
// sink_logit is the learned one, in log2 units, used if HAS_SINK_LOGITS.
template <typename T, int DV, int SIMDGROUPS, bool ROTATE_V, bool HAS_SINK_LOGITS>
TQ_FUNC void merge_row(
    const device float* partial_out, const device float* partial_lse, float sink_logit,
    const device float* v_signs, const thread AttendArguments& args, device T* out,
    threadgroup float* scratch, uint simdgroup, uint lane) {
  constexpr int PER_LANE = (DV + 31) / 32;
  int splits = args.plain_splits + args.splits;
  float top = HAS_SINK_LOGITS ? sink_logit : -1e30f;
  for (int split = int(lane); split < splits; split += 32) {
    top = tq_max(top, partial_lse[2 * split]);
  }
  top = simd_max(top);
  float denominator = 0.0f;
  for (int split = int(lane); split < splits; split += 32) {
    denominator += tq_exp2(partial_lse[2 * split] - top) * partial_lse[2 * split + 1];
  }
  denominator = simd_sum(denominator);
  if (HAS_SINK_LOGITS) denominator += tq_exp2(sink_logit - top);

  float sums[PER_LANE];
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) sums[i] = 0.0f;
  add_partials<DV>(
      sums, partial_out, partial_lse, top, args.plain_splits + int(simdgroup), splits,
      SIMDGROUPS, lane);
  if (ROTATE_V) {
    simd_hadamard<PER_LANE>(sums, lane);
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      sums[i] *= v_signs[int(lane) + 32 * i] * tq_rsqrt(float(DV));
    }
  }
  // The others are in the model's basis. The last simdgroups have least to do until here.
  add_partials<DV>(
      sums, partial_out, partial_lse, top, SIMDGROUPS - 1 - int(simdgroup), args.plain_splits,
      SIMDGROUPS, lane);

  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (d < DV) scratch[int(simdgroup) * DV + d] = sums[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float factor = denominator > 0.0f ? 1.0f / denominator : 0.0f;
  for (int d = int(32u * simdgroup + lane); d < DV; d += 32 * SIMDGROUPS) {
    float sum = 0.0f;
    TQ_UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) sum += scratch[s * DV + d];
    out[d] = T(sum * factor);
  }
}

// Threadgroups: (1, query rows of all heads and batches).
TQ_ENTRY(merge_states) {
  threadgroup float scratch[SIMDGROUPS * DV];
  AttendArguments args = load_arguments(arguments);
  uint row = threadgroup_position_in_grid.y;
  uint kv_head = row / uint(args.rows);
  size_t first_partial = size_t(row) * (args.plain_splits + args.splits);
  merge_row<T, DV, SIMDGROUPS, ROTATE_V, HAS_SINK_LOGITS>(
      partial_out + first_partial * DV, partial_lse + first_partial * 2,
      HAS_SINK_LOGITS ? sink_logits[row] : 0.0f, v_signs + kv_head * (ROTATE_V ? DV : 0), args,
      out + size_t(row) * DV, scratch, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup);
}
