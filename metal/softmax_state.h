// The running softmax of the rows that a threadgroup attends with. Its simdgroups take tokens
// of their own and all of their weights, so all have the same bounds of logits and scales, but
// each its own part of the denominators.

#include "query_rows.h"

// Logits may exceed the running maximum by MAX_LAG: then hardly any tile raises it. So weights
// are at most 2^MAX_LAG, those times values' scales over `value_scale` too, and times
// WEIGHT_UNIT at most the half 32768. Without the unit halves would be subnormal from 2^-14 of
// the largest weight down, which a long tail together matters at, and matrix products may take
// those for zero.
constant constexpr float MAX_LAG = 4.0f;
constant constexpr float WEIGHT_UNIT = 2048.0f;

// Of a lane's rows.
template <typename Rows>
struct SoftmaxState {
  float maximum[Rows::LANE_ROWS];
  float denominator[Rows::LANE_ROWS];
  float value_scale;  // a running upper bound of the values' scales
  float weight_factor;  // WEIGHT_UNIT over it
};

template <typename Rows>
TQ_FUNC SoftmaxState<Rows> make_softmax_state() {
  SoftmaxState<Rows> state;
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    state.maximum[e] = -1e30f;
    state.denominator[e] = 0.0f;
  }
  state.value_scale = 0.0f;
  state.weight_factor = 0.0f;
  return state;
}

// The largest of this lane's part of a tile: of its values' scales, and of the logits of its
// row number e.
template <typename Rows>
TQ_FUNC float largest_scale(const thread float* scales) {
  float largest = scales[0];
  TQ_UNROLL
  for (int i = 1; i < Rows::LANE_TOKENS; i++) largest = tq_max(largest, scales[i]);
  return largest;
}
template <typename Rows>
TQ_FUNC float largest_logit(const thread float* logits, int e) {
  float largest = logits[Rows::logit_at(e, 0)];
  TQ_UNROLL
  for (int i = 1; i < Rows::LANE_TOKENS; i++) {
    largest = tq_max(largest, logits[Rows::logit_at(e, i)]);
  }
  return largest;
}

// Whether this lane's part of a tile exceeds the bounds. scales: of its values.
template <typename Rows>
TQ_FUNC bool exceeds_bounds(
    const thread SoftmaxState<Rows>& state, const thread float* logits,
    const thread float* scales) {
  bool exceeds = largest_scale<Rows>(scales) > state.value_scale;
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    exceeds = exceeds || largest_logit<Rows>(logits, e) > state.maximum[e] + MAX_LAG;
  }
  return exceeds;
}

// Threadgroup memory, in floats, in which simdgroups tell each other the maxima of their tiles.
constexpr int tq_maxima_floats(int simdgroups, int rows) { return simdgroups * (rows + 1); }

// Raise the bounds to those of all simdgroups' tiles; what was summed so far shrinks to the new
// ones. Every simdgroup must call it. sums: SUMS of all rows.
template <typename Rows, int SIMDGROUPS, int SUMS>
TQ_FUNC void raise_bounds(
    thread SoftmaxState<Rows>& state, const thread float* logits,
    const thread float* scales, thread float* sums, threadgroup float* maxima, uint simdgroup,
    uint lane) {
  constexpr int EACH = Rows::ROWS + 1;
  float scale = Rows::max_of_lanes(largest_scale<Rows>(scales));
  float most[Rows::LANE_ROWS];
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    most[e] = Rows::max_of_lanes(largest_logit<Rows>(logits, e));
  }
  threadgroup float* own = maxima + int(simdgroup) * EACH;
  if (Rows::leads(lane)) {
    TQ_UNROLL
    for (int e = 0; e < Rows::LANE_ROWS; e++) own[Rows::row(lane, e)] = most[e];
    if (lane == 0u) own[EACH - 1] = scale;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float next[Rows::LANE_ROWS];
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) next[e] = state.maximum[e];
  scale = 0.0f;
  TQ_ROLL
  for (int s = 0; s < SIMDGROUPS; s++) {
    const threadgroup float* theirs = maxima + s * EACH;
    scale = tq_max(scale, theirs[EACH - 1]);
    TQ_UNROLL
    for (int e = 0; e < Rows::LANE_ROWS; e++) {
      next[e] = tq_max(next[e], theirs[Rows::row(lane, e)]);
    }
  }
  float scale_ratio = 1.0f;
  if (scale > state.value_scale) {
    float next_scale = tq_max(2.0f * scale, 1e-30f);
    scale_ratio = state.value_scale / next_scale;
    state.value_scale = next_scale;
    state.weight_factor = WEIGHT_UNIT / next_scale;
  }
  float ratios[Rows::LANE_ROWS];
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    float shrink = tq_exp2(state.maximum[e] - next[e]);
    state.maximum[e] = next[e];
    state.denominator[e] *= shrink;
    ratios[e] = shrink * scale_ratio;
  }
  TQ_UNROLL
  for (int i = 0; i < SUMS; i++) sums[i] *= ratios[Rows::template sum_row<SUMS>(i)];
}

// Denominators become those of all lanes and simdgroups. Every simdgroup must call it, and may
// use `exchange`, threadgroup floats as for maxima, until then.
template <typename Rows, int SIMDGROUPS>
TQ_FUNC void add_denominators(
    thread SoftmaxState<Rows>& state, threadgroup float* exchange, uint simdgroup, uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    state.denominator[e] = Rows::sum_of_lanes(state.denominator[e]);
    int at = Rows::row(lane, e) * SIMDGROUPS;
    if (Rows::leads(lane)) exchange[at + int(simdgroup)] = state.denominator[e];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    int at = Rows::row(lane, e) * SIMDGROUPS;
    state.denominator[e] = 0.0f;
    TQ_UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) state.denominator[e] += exchange[at + s];
  }
}
