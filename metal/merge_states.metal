// Decode attention, pass 2: one threadgroup per query row merges the partial results of
// pass 1 (decode_attention.metal), taken out of the codes' basis, with the tokens that were
// never packed (sink and recent, as the model gave them) and the learned sink logit, and
// normalises. The entry is at the end.

#include "hadamard.h"
#include "arguments.h"

// One running softmax per simdgroup; a lane holds elements lane + 32 * i of the sums.
template <int PER_LANE>
struct SoftmaxState {
  float sums[PER_LANE];
  float maximum;
  float denominator;
};

// Raise the maximum to at least `logit`; returns the weight of a token of that logit.
template <int PER_LANE>
TQ_FUNC float raise_maximum(thread SoftmaxState<PER_LANE>& state, float logit) {
  float maximum = tq_max(state.maximum, logit);
  float shrink = tq_exp2(state.maximum - maximum);
  state.maximum = maximum;
  state.denominator *= shrink;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) state.sums[i] *= shrink;
  return tq_exp2(logit - maximum);
}

// Dot product of a key of DIM elements with q, over the simdgroup; every lane gets it.
template <typename T, int DIM>
TQ_FUNC float dot_product(const thread float* q, const device T* key, uint lane) {
  float sum = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < (DIM + 31) / 32; i++) {
    int d = int(lane) + 32 * i;
    if (d < DIM) sum += q[i] * float(key[d]);
  }
  return simd_sum(sum);
}

// Vectors in flight at once: one at a time, each would wait for memory.
constant constexpr int IN_FLIGHT = 8;

// Add `count` (at most IN_FLIGHT) weighted vectors of DIM elements, `stride` apart.
template <typename T, int DIM, int PER_LANE>
TQ_FUNC void add_weighted(
    thread SoftmaxState<PER_LANE>& state, const thread float* weights, const device T* vectors,
    size_t stride, int count, uint lane) {
  float x[IN_FLIGHT * PER_LANE];
  TQ_UNROLL
  for (int a = 0; a < IN_FLIGHT; a++) {
    const device T* vector = vectors + (a < count ? a : 0) * stride;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      x[a * PER_LANE + i] = d < DIM ? float(vector[d]) : 0.0f;
    }
  }
  TQ_UNROLL
  for (int a = 0; a < IN_FLIGHT; a++) {
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      state.sums[i] += (a < count ? weights[a] : 0.0f) * x[a * PER_LANE + i];
    }
  }
}

// Attend to `count` (at most IN_FLIGHT) tokens that are not packed.
template <typename T, int DK, int DV, int PER_LANE>
TQ_FUNC void attend_tokens(
    thread SoftmaxState<PER_LANE>& state, const thread float* q, const device T* keys,
    size_t key_stride, const device T* values, size_t value_stride, const device float* mask,
    bool masked, int count, uint lane) {
  float weights[IN_FLIGHT];
  float maximum = -1e30f;
  TQ_UNROLL
  for (int a = 0; a < IN_FLIGHT; a++) {
    int at = a < count ? a : 0;
    weights[a] = dot_product<T, DK>(q, keys + at * key_stride, lane);
    if (masked) weights[a] += mask[at];
    maximum = tq_max(maximum, weights[a]);
  }
  raise_maximum(state, maximum);
  TQ_UNROLL
  for (int a = 0; a < IN_FLIGHT; a++) {
    weights[a] = a < count ? tq_exp2(weights[a] - state.maximum) : 0.0f;
    state.denominator += weights[a];
  }
  add_weighted<T, DV>(state, weights, values, value_stride, count, lane);
}

// Pointers are to this row's part, or its KV head's, of
//   partial_out, partial_lse   as pass 1 left them
//   sink_*, recent_*           T, a token's elements contiguous; sink tokens are too, recent
//                              ones lie key_stride and value_stride elements apart
//   mask                       float (mask_columns), log2 units, read if MASKED
//   v_signs                    float (DV), times the channels' gains, read if ROTATE_V
//   out                        T (DV)
//   scratch                    threadgroup float (SIMDGROUPS * (DV + 2))
// sink_logit is the learned one, in log2 units, used if HAS_SINK_LOGITS.
template <
    typename T, int DK, int DV, int SIMDGROUPS, bool ROTATE_V, bool MASKED,
    bool HAS_SINK_LOGITS>
TQ_FUNC void merge_row(
    const thread float* q, const device float* partial_out, const device float* partial_lse,
    const device T* sink_keys, const device T* sink_values, const device T* recent_keys,
    size_t key_stride, const device T* recent_values, size_t value_stride,
    const device float* mask, float sink_logit, const device float* v_signs,
    const thread AttendArguments& args, int step, device T* out,
    threadgroup float* scratch, uint simdgroup, uint lane) {
  constexpr int PER_LANE = (DV + 31) / 32;
  SoftmaxState<PER_LANE> state;
  state.denominator = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) state.sums[i] = 0.0f;

  // Start from the splits' common maximum: then their sums need no order.
  float maximum = -1e30f;
  for (int split = int(lane); split < args.splits; split += 32) {
    maximum = tq_max(maximum, partial_lse[2 * split]);
  }
  state.maximum = simd_max(maximum);
  for (int split = int(simdgroup) * IN_FLIGHT; split < args.splits;
       split += SIMDGROUPS * IN_FLIGHT) {
    int count = args.splits - split;
    float weights[IN_FLIGHT];
    TQ_UNROLL
    for (int a = 0; a < IN_FLIGHT; a++) {
      int at = 2 * (a < count ? split + a : split);
      weights[a] = a < count ? tq_exp2(partial_lse[at] - state.maximum) : 0.0f;
      state.denominator += weights[a] * partial_lse[at + 1];
    }
    add_weighted<float, DV>(state, weights, partial_out + size_t(split) * DV, DV, count, lane);
  }

  if (ROTATE_V) {
    simd_hadamard<PER_LANE>(state.sums, lane);
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      state.sums[i] *= v_signs[int(lane) + 32 * i] * tq_rsqrt(float(DV));
    }
  }
  for (int at = int(simdgroup) * IN_FLIGHT; at < args.sink; at += SIMDGROUPS * IN_FLIGHT) {
    attend_tokens<T, DK, DV>(
        state, q, sink_keys + size_t(at) * DK, DK, sink_values + size_t(at) * DV, DV,
        mask + (MASKED ? at : 0), MASKED, args.sink - at, lane);
  }
  int visible = args.recent;
  if (args.causal) visible -= args.steps - 1 - step;
  for (int at = int(simdgroup) * IN_FLIGHT; at < visible; at += SIMDGROUPS * IN_FLIGHT) {
    attend_tokens<T, DK, DV>(
        state, q, recent_keys + at * key_stride, key_stride,
        recent_values + at * value_stride, value_stride,
        mask + (MASKED ? args.sink + args.packed + at : 0), MASKED, visible - at, lane);
  }
  if (HAS_SINK_LOGITS && simdgroup == 0u) state.denominator += raise_maximum(state, sink_logit);

  threadgroup float* own = scratch + simdgroup * (DV + 2);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (d < DV) own[d] = state.sums[i];
  }
  if (lane == 0u) {
    own[DV] = state.maximum;
    own[DV + 1] = state.denominator;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0u) return;

  TQ_UNROLL
  for (int s = 1; s < SIMDGROUPS; s++) {
    const threadgroup float* other = scratch + s * (DV + 2);
    float weight = raise_maximum(state, other[DV]);
    state.denominator += weight * other[DV + 1];
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      if (d < DV) state.sums[i] += weight * other[d];
    }
  }
  float factor = state.denominator > 0.0f ? 1.0f / state.denominator : 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (d < DV) out[d] = T(state.sums[i] * factor);
  }
}

// Threadgroups: (1, query rows of all heads and batches). recent_* are whole buffers, of
// which `recent` tokens are in use.
TQ_ENTRY(merge_states) {
  threadgroup float scratch[SIMDGROUPS * (DV + 2)];
  AttendArguments args = load_arguments(arguments);
  uint lane = thread_index_in_simdgroup;
  size_t row = threadgroup_position_in_grid.y;
  size_t kv_head = row / args.rows;
  size_t batch = kv_head / args.kv_heads;
  size_t head = kv_head % args.kv_heads;
  size_t q_head = row / args.steps % (args.kv_heads * (args.rows / args.steps));
  int step = int(row % args.steps);
  float query[(DK + 31) / 32];
  load_rotated<T, DK, false>(
      q + batch * q_strides[0] + q_head * q_strides[1] + step * q_strides[2],
      q_strides[3], v_signs, lane, query);
  for (int i = 0; i < (DK + 31) / 32; i++) query[i] *= q_scale[0];
  merge_row<T, DK, DV, SIMDGROUPS, ROTATE_V, MASKED, HAS_SINK_LOGITS>(
      query, partial_out + row * args.splits * DV, partial_lse + row * args.splits * 2,
      sink_keys + kv_head * args.sink * DK, sink_values + kv_head * args.sink * DV,
      recent_keys + batch * recent_keys_strides[0] + head * recent_keys_strides[1],
      recent_keys_strides[2],
      recent_values + batch * recent_values_strides[0] + head * recent_values_strides[1],
      recent_values_strides[2], mask + (MASKED ? row * args.mask_columns : 0),
      HAS_SINK_LOGITS ? sink_logits[row] : 0.0f, v_signs + kv_head * (ROTATE_V ? DV : 0), args,
      step, out + row * DV, scratch, simdgroup_index_in_threadgroup, lane);
}
