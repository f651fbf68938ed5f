// Decode attention, pass 2: one threadgroup per query row merges the partial results of
// pass 1, taken out of the codes' basis, with the tokens that were never packed (sink and
// recent, as the model gave them) and the learned sink logit, and normalises.

#include "hadamard.h"

struct MergeSizes {
  int blocks;
  int rows;        // query rows per KV head: group * steps
  int steps;       // query rows per query head
  int sink;        // tokens
  int recent;      // tokens
  int causal;      // 1: query i of `steps` does not see the last steps - 1 - i tokens
  int packed;      // tokens, for the mask's columns
  int columns;     // columns of the mask
  int heads;       // KV heads
};

// One running softmax per simdgroup; a lane holds elements lane + 32 * i of the sums.
template <int PER>
struct Running {
  float sums[PER];
  float maximum;
  float denominator;
};

template <int PER>
TQ_FUNC float raise(thread Running<PER>& run, float logit) {
  float top = tq_max(run.maximum, logit);
  float shrink = tq_exp2(run.maximum - top);
  run.maximum = top;
  run.denominator *= shrink;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) run.sums[i] *= shrink;
  return tq_exp2(logit - top);
}

// Dot product of a row of DIM with q, over the simdgroup; every lane gets it.
template <typename K, int DIM>
TQ_FUNC float row_dot(const thread float* q, const device K* keys, uint lane) {
  float sum = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < (DIM + 31) / 32; i++) {
    int d = int(lane) + 32 * i;
    if (d < DIM) sum += q[i] * float(keys[d]);
  }
  return simd_sum(sum);
}

// Rows in flight at once: one at a time, each would wait for memory.
constant constexpr int AHEAD = 8;

// Add `count` weighted rows of DIM, `stride` elements apart.
template <typename T, int DIM, int PER>
TQ_FUNC void add_rows(
    thread Running<PER>& run, const thread float* weights, const device T* rows, size_t stride,
    int count, uint lane) {
  float x[AHEAD * PER];
  TQ_UNROLL
  for (int a = 0; a < AHEAD; a++) {
    const device T* row = rows + (a < count ? a : 0) * stride;
    TQ_UNROLL
    for (int i = 0; i < PER; i++) {
      int d = int(lane) + 32 * i;
      x[a * PER + i] = d < DIM ? float(row[d]) : 0.0f;
    }
  }
  TQ_UNROLL
  for (int a = 0; a < AHEAD; a++) {
    TQ_UNROLL
    for (int i = 0; i < PER; i++) run.sums[i] += (a < count ? weights[a] : 0.0f) * x[a * PER + i];
  }
}

// Attend to `count` (at most AHEAD) unpacked tokens.
template <typename T, int DK, int DV, int PER>
TQ_FUNC void attend_tokens(
    thread Running<PER>& run, const thread float* q, const device T* keys, size_t key_stride,
    const device T* values, size_t value_stride, const device float* mask,
    bool masked, int count, uint lane) {
  float weights[AHEAD];
  float top = -1e30f;
  TQ_UNROLL
  for (int a = 0; a < AHEAD; a++) {
    int at = a < count ? a : 0;
    weights[a] = row_dot<T, DK>(q, keys + at * key_stride, lane);
    if (masked) weights[a] += mask[at];
    top = tq_max(top, weights[a]);
  }
  raise(run, top);
  TQ_UNROLL
  for (int a = 0; a < AHEAD; a++) {
    weights[a] = a < count ? tq_exp2(weights[a] - run.maximum) : 0.0f;
    run.denominator += weights[a];
  }
  add_rows<T, DV>(run, weights, values, value_stride, count, lane);
}

// All at this row: sums and tops from pass 1; keys and values at this KV head, rows of
// contiguous elements, `*_stride` elements apart (the sink's are packed); mask float
// (columns), log2 units, read if MASKED; learned sink logit, log2 units, used if LEARNED;
// v_signs float (DV), times the channels' gains, read if ROTATE_V.
//   scratch   threadgroup float (SIMDGROUPS * (DV + 2))
//   out       T (DV)
template <typename T, int DK, int DV, int SIMDGROUPS, bool ROTATE_V, bool MASKED, bool LEARNED>
TQ_FUNC void merge_row(
    const thread float* q, const device float* sums, const device float* tops,
    const device T* sink_keys, const device T* sink_values, const device T* recent_keys,
    size_t key_stride, const device T* recent_values, size_t value_stride,
    const device float* mask, float learned, const device float* v_signs,
    const thread MergeSizes& sizes, int step, device T* out,
    threadgroup float* scratch, uint simdgroup, uint lane) {
  constexpr int PER = (DV + 31) / 32;
  Running<PER> run;
  run.denominator = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) run.sums[i] = 0.0f;

  // Start from the blocks' common maximum: then their sums need no order.
  float top = -1e30f;
  for (int block = int(lane); block < sizes.blocks; block += 32) {
    top = tq_max(top, tops[2 * block]);
  }
  run.maximum = simd_max(top);
  for (int block = int(simdgroup) * AHEAD; block < sizes.blocks; block += SIMDGROUPS * AHEAD) {
    int count = sizes.blocks - block;
    float weights[AHEAD];
    TQ_UNROLL
    for (int a = 0; a < AHEAD; a++) {
      int at = 2 * (a < count ? block + a : block);
      weights[a] = a < count ? tq_exp2(tops[at] - run.maximum) : 0.0f;
      run.denominator += weights[a] * tops[at + 1];
    }
    add_rows<float, DV>(run, weights, sums + size_t(block) * DV, DV, count, lane);
  }

  if (ROTATE_V) {
    simd_hadamard<PER>(run.sums, lane);
    TQ_UNROLL
    for (int i = 0; i < PER; i++) {
      run.sums[i] *= v_signs[int(lane) + 32 * i] * tq_rsqrt(float(DV));
    }
  }
  for (int at = int(simdgroup) * AHEAD; at < sizes.sink; at += SIMDGROUPS * AHEAD) {
    attend_tokens<T, DK, DV>(
        run, q, sink_keys + size_t(at) * DK, DK, sink_values + size_t(at) * DV, DV,
        mask + (MASKED ? at : 0), MASKED, sizes.sink - at, lane);
  }
  int seen = sizes.recent;
  if (sizes.causal) seen -= sizes.steps - 1 - step;
  for (int at = int(simdgroup) * AHEAD; at < seen; at += SIMDGROUPS * AHEAD) {
    attend_tokens<T, DK, DV>(
        run, q, recent_keys + at * key_stride, key_stride,
        recent_values + at * value_stride, value_stride,
        mask + (MASKED ? sizes.sink + sizes.packed + at : 0), MASKED, seen - at, lane);
  }
  if (LEARNED && simdgroup == 0u) run.denominator += raise(run, learned);

  threadgroup float* mine = scratch + simdgroup * (DV + 2);
  TQ_UNROLL
  for (int i = 0; i < PER; i++) {
    int d = int(lane) + 32 * i;
    if (d < DV) mine[d] = run.sums[i];
  }
  if (lane == 0u) {
    mine[DV] = run.maximum;
    mine[DV + 1] = run.denominator;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0u) return;

  TQ_UNROLL
  for (int s = 1; s < SIMDGROUPS; s++) {
    const threadgroup float* other = scratch + s * (DV + 2);
    float weight = raise(run, other[DV]);
    run.denominator += weight * other[DV + 1];
    TQ_UNROLL
    for (int i = 0; i < PER; i++) {
      int d = int(lane) + 32 * i;
      if (d < DV) run.sums[i] += weight * other[d];
    }
  }
  float unit = run.denominator > 0.0f ? 1.0f / run.denominator : 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) {
    int d = int(lane) + 32 * i;
    if (d < DV) out[d] = T(run.sums[i] * unit);
  }
}
