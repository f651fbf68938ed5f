// Decode attention, pass 2: one threadgroup per query row merges the partial results of
// pass 1 with the tokens that were never packed (sink and recent, model dtype, rotated)
// and the learned sink logit. The result is normalised and still rotated.
//
// Unpacked keys are not centred, packed ones are: q . mean is taken off the former's
// logits, and off a learned sink's, so that one shift is common to all of them.

struct MergeSizes {
  int blocks;
  int rows;        // query rows per KV head: group * steps
  int steps;       // query rows per query head
  int sink;        // tokens
  int recent;      // tokens in use
  int recent_capacity;
  int causal;      // 1: query i of `steps` does not see the last steps - 1 - i tokens
  int packed;      // tokens, for the mask's columns
  int columns;     // columns of the mask
};

// One running softmax per simdgroup; every lane holds DV / 32 of the sums.
template <int PER>
struct Running {
  float sums[PER];
  float maximum;
  float denominator;
};

template <int PER>
TQ_FUNC float raise(thread Running<PER>* run, float logit) {
  float top = tq_max(run->maximum, logit);
  float shrink = tq_exp2(run->maximum - top);
  run->maximum = top;
  run->denominator *= shrink;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) run->sums[i] *= shrink;
  return tq_exp2(logit - top);
}

// Dot product of a row of DK with q, over the simdgroup; every lane gets it.
template <typename T, typename K, int DK>
TQ_FUNC float row_dot(const device T* q, const device K* keys, uint lane) {
  float sum = 0.0f;
  for (int d = int(lane); d < DK; d += 32) sum += float(q[d]) * float(keys[d]);
  return simd_sum(sum);
}

// Grid: (32 * SIMDGROUPS, batch * heads * rows, 1) threads.
//   q         T (batch, heads * rows, DK), as in pass 1; q_scale too
//   partial   float (batch, heads * rows, blocks, DV + 2), from pass 1
//   sink_*    T (batch, heads, sink, D); recent_*  T (batch, heads, recent_capacity, D)
//   mean      float (batch, heads, DK); zeros if keys are not centred
//   mask      float (batch, heads * rows, columns), log2 units; read if MASKED
//   learned   float (batch, heads * rows) sink logits, log2 units; read if LEARNED
//   scratch   threadgroup float (SIMDGROUPS * (DV + 2))
//   out       T (batch, heads * rows, DV)
template <typename T, int DK, int DV, int SIMDGROUPS, bool MASKED, bool LEARNED>
TQ_FUNC void merge_row(
    const device T* q, float q_scale, const device float* partial, const device T* sink_keys,
    const device T* sink_values, const device T* recent_keys,
    const device T* recent_values, const device float* mean, const device float* mask,
    const device float* learned, const thread MergeSizes& sizes, device T* out,
    threadgroup float* scratch, uint row, uint simdgroup, uint lane) {
  constexpr int PER = (DV + 31) / 32;
  uint place = row / uint(sizes.rows);  // batch * heads + head
  q += size_t(row) * DK;
  mask += size_t(row) * sizes.columns;
  Running<PER> run;
  run.maximum = -1e30f;
  run.denominator = 0.0f;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) run.sums[i] = 0.0f;

  float shift = q_scale * row_dot<T, float, DK>(q, mean + size_t(place) * DK, lane);
  int seen = sizes.recent;
  if (sizes.causal) seen -= sizes.steps - 1 - int(row) % sizes.steps;
  for (int token = int(simdgroup); token < sizes.sink + seen; token += SIMDGROUPS) {
    bool in_sink = token < sizes.sink;
    int at = in_sink ? token : token - sizes.sink;
    size_t stride = size_t(in_sink ? sizes.sink : sizes.recent_capacity);
    const device T* keys = in_sink ? sink_keys : recent_keys;
    const device T* values = in_sink ? sink_values : recent_values;
    keys += (place * stride + at) * DK;
    values += (place * stride + at) * DV;
    float logit = q_scale * row_dot<T, T, DK>(q, keys, lane) - shift;
    if (MASKED) logit += mask[in_sink ? token : token + sizes.packed];
    float weight = raise<PER>(&run, logit);
    run.denominator += weight;
    TQ_UNROLL
    for (int i = 0; i < PER; i++) {
      int d = int(lane) + 32 * i;
      if (d < DV) run.sums[i] += weight * float(values[d]);
    }
  }
  for (int block = int(simdgroup); block < sizes.blocks; block += SIMDGROUPS) {
    const device float* from = partial + (size_t(row) * sizes.blocks + block) * (DV + 2);
    float weight = raise<PER>(&run, from[DV]);
    run.denominator += weight * from[DV + 1];
    TQ_UNROLL
    for (int i = 0; i < PER; i++) {
      int d = int(lane) + 32 * i;
      if (d < DV) run.sums[i] += weight * from[d];
    }
  }
  if (LEARNED && simdgroup == 0u) {
    run.denominator += raise<PER>(&run, learned[row] - shift);
  }

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
  float top = -1e30f;
  for (int s = 0; s < SIMDGROUPS; s++) top = tq_max(top, scratch[s * (DV + 2) + DV]);
  float total = 0.0f;
  for (int s = 0; s < SIMDGROUPS; s++) {
    const threadgroup float* other = scratch + s * (DV + 2);
    total += other[DV + 1] * tq_exp2(other[DV] - top);
  }
  for (int d = int(simdgroup * 32u + lane); d < DV; d += 32 * SIMDGROUPS) {
    float sum = 0.0f;
    for (int s = 0; s < SIMDGROUPS; s++) {
      const threadgroup float* other = scratch + s * (DV + 2);
      sum += other[d] * tq_exp2(other[DV] - top);
    }
    out[size_t(row) * DV + d] = T(total > 0.0f ? sum / total : 0.0f);
  }
}
