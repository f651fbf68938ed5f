// Decode attention, pass 2: one threadgroup per query row merges the partial results of pass 1
// (decode_attention.metal), those of packed tokens taken out of the codes' basis, and the
// learned sink logit, and normalises. The entry is at the end.

#include "hadamard.h"
#include "arguments.h"

// Partial results in flight at once: one at a time, each would wait for memory; of long vectors
// there are no registers for more.
constexpr int tq_in_flight(int dim) { return dim <= 128 ? 4 : dim <= 256 ? 2 : 1; }

// Elements lane + 32 * i of DV of the partial results split, split + step, .. before `end`.
template <int DV>
TQ_FUNC void load_partials(
    const device float* partial_out, int split, int end, int step, uint lane, thread float* x) {
  constexpr int PER_LANE = (DV + 31) / 32;
  TQ_UNROLL
  for (int a = 0; a < tq_in_flight(DV); a++) {
    int at = split + a * step;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      x[a * PER_LANE + i] = at < end && d < DV ? partial_out[at * DV + d] : 0.0f;
    }
  }
}

// Add partial results `first`, first + step, .. before `end`, as they weigh beside the maximum
// `top`, to sums. x: load_partials' of the first ones.
template <int DV>
TQ_FUNC void add_partials(
    thread float* sums, thread float* x, const device float* partial_out,
    const device float* partial_lse, float top, int first, int end, int step, uint lane) {
  constexpr int PER_LANE = (DV + 31) / 32;
  constexpr int IN_FLIGHT = tq_in_flight(DV);
  for (int split = first; split < end; split += IN_FLIGHT * step) {
    if (split != first) load_partials<DV>(partial_out, split, end, step, lane, x);
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
  // Partial results do not wait for the states. The last simdgroups have least to do with
  // those of packed tokens, so they take the others.
  int first = args.plain_splits + int(simdgroup);
  int first_plain = SIMDGROUPS - 1 - int(simdgroup);
  float x[tq_in_flight(DV) * PER_LANE];
  float x_plain[tq_in_flight(DV) * PER_LANE];
  load_partials<DV>(partial_out, first, splits, SIMDGROUPS, lane, x);
  load_partials<DV>(partial_out, first_plain, args.plain_splits, SIMDGROUPS, lane, x_plain);
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
  add_partials<DV>(sums, x, partial_out, partial_lse, top, first, splits, SIMDGROUPS, lane);
  if (ROTATE_V) {
    simd_hadamard<PER_LANE>(sums, lane);
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      sums[i] *= v_signs[int(lane) + 32 * i] * tq_rsqrt(float(DV));
    }
  }
  // The others are in the model's basis.
  add_partials<DV>(
      sums, x_plain, partial_out, partial_lse, top, first_plain, args.plain_splits, SIMDGROUPS,
      lane);

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

// Threadgroups: (1, query rows of all heads, batch).
TQ_ENTRY(merge_states) {
  threadgroup float scratch[SIMDGROUPS * DV];
  uint batch = threadgroup_position_in_grid.z;
  AttendArguments args = load_arguments(arguments, batch);
  uint own_row = threadgroup_position_in_grid.y;
  uint kv_head = batch * uint(args.kv_heads) + own_row / uint(args.rows);
  uint row = batch * uint(args.kv_heads * args.rows) + own_row;
  size_t partial =
      size_t(args.first_partial) + size_t(own_row) * (args.plain_splits + args.splits);
  merge_row<T, DV, SIMDGROUPS, ROTATE_V, HAS_SINK_LOGITS>(
      partial_out + partial * DV, partial_lse + partial * 2,
      HAS_SINK_LOGITS ? sink_logits[row] : 0.0f, v_signs + kv_head * (ROTATE_V ? DV : 0), args,
      out + size_t(row) * DV, scratch, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup);
}
