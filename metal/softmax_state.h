// The running softmax of the rows that a threadgroup attends with. Its simdgroups take tokens
// of their own and all of their weights, so all have the same bounds of logits and scales, but
// each its own part of the denominators.

#include "compat/fragments.h"
#include "query_rows.h"

// Logits may exceed the running maximum by MAX_LAG: then hardly any tile raises it. So weights
// are at most 2^MAX_LAG, those times values' scales over `value_scale` too, and times
// WEIGHT_UNIT at most the half 32768. Without the unit halves would be subnormal from 2^-14 of
// the largest weight down, which a long tail together matters at, and matrix products may take
// those for zero.
constant constexpr float MAX_LAG = 4.0f;
constant constexpr float WEIGHT_UNIT = 2048.0f;

// Of a lane's two rows of each row tile.
template <int ROW_TILES>
struct SoftmaxState {
  float maximum[2 * ROW_TILES];
  float denominator[2 * ROW_TILES];
  float value_scale;  // a running upper bound of the values' scales
  float weight_factor;  // WEIGHT_UNIT over it
};

template <int ROW_TILES>
TQ_FUNC SoftmaxState<ROW_TILES> make_softmax_state() {
  SoftmaxState<ROW_TILES> state;
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) {
    state.maximum[e] = -1e30f;
    state.denominator[e] = 0.0f;
  }
  state.value_scale = 0.0f;
  state.weight_factor = 0.0f;
  return state;
}

// The largest of this lane's part of a tile: of its values' scales, and of the logits of its
// row number e.
TQ_FUNC float largest_scale(const thread float* scales) {
  return tq_max(tq_max(scales[0], scales[1]), tq_max(scales[2], scales[3]));
}
TQ_FUNC float largest_logit(const thread float* logits, int e) {
  const thread float* of_row = logits + 8 * (e / 2) + e % 2;
  return tq_max(tq_max(of_row[0], of_row[2]), tq_max(of_row[4], of_row[6]));
}

// Whether this lane's part of a tile exceeds the bounds. logits: as tiles.h has them; scales:
// of its values.
template <int ROW_TILES>
TQ_FUNC bool exceeds_bounds(
    const thread SoftmaxState<ROW_TILES>& state, const thread float* logits,
    const thread float* scales) {
  bool exceeds = largest_scale(scales) > state.value_scale;
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) {
    exceeds = exceeds || largest_logit(logits, e) > state.maximum[e] + MAX_LAG;
  }
  return exceeds;
}

// Threadgroup memory, in floats, in which simdgroups tell each other the maxima of their tiles.
constexpr int tq_maxima_floats(int simdgroups, int row_tiles) {
  return simdgroups * (TILE_ROWS * row_tiles + 1);
}

// Raise the bounds to those of all simdgroups' tiles; what was summed so far shrinks to the new
// ones. Every simdgroup must call it. sums: SUMS of each row tile, of two rows in turns.
template <int ROW_TILES, int SIMDGROUPS, int SUMS>
TQ_FUNC void raise_bounds(
    thread SoftmaxState<ROW_TILES>& state, const thread float* logits,
    const thread float* scales, thread float* sums, threadgroup float* maxima, uint simdgroup,
    uint lane) {
  constexpr int EACH = TILE_ROWS * ROW_TILES + 1;
  float scale = largest_scale(scales);
  float most[2 * ROW_TILES];
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) most[e] = largest_logit(logits, e);
  TQ_UNROLL
  for (int i = 0; i < 3; i++) {
    ushort stride = ushort(TQ_MAJOR_STRIDES[i]);
    scale = tq_max(scale, simd_shuffle_xor(scale, stride));
    TQ_UNROLL
    for (int e = 0; e < 2 * ROW_TILES; e++) {
      most[e] = tq_max(most[e], simd_shuffle_xor(most[e], stride));
    }
  }
  threadgroup float* own = maxima + int(simdgroup) * EACH;
  int row = 2 * int(tq_minor(lane));
  if (tq_major(lane) == 0u) {
    TQ_UNROLL
    for (int e = 0; e < 2 * ROW_TILES; e++) own[TILE_ROWS * (e / 2) + row + e % 2] = most[e];
    if (row == 0) own[EACH - 1] = scale;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float next[2 * ROW_TILES];
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) next[e] = state.maximum[e];
  scale = 0.0f;
  TQ_ROLL
  for (int s = 0; s < SIMDGROUPS; s++) {
    const threadgroup float* theirs = maxima + s * EACH;
    scale = tq_max(scale, theirs[EACH - 1]);
    TQ_UNROLL
    for (int e = 0; e < 2 * ROW_TILES; e++) {
      next[e] = tq_max(next[e], theirs[TILE_ROWS * (e / 2) + row + e % 2]);
    }
  }
  float scale_ratio = 1.0f;
  if (scale > state.value_scale) {
    float next_scale = tq_max(2.0f * scale, 1e-30f);
    scale_ratio = state.value_scale / next_scale;
    state.value_scale = next_scale;
    state.weight_factor = WEIGHT_UNIT / next_scale;
  }
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) {
    float shrink = tq_exp2(state.maximum[e] - next[e]);
    state.maximum[e] = next[e];
    state.denominator[e] *= shrink;
    thread float* of_row = sums + SUMS * (e / 2) + e % 2;
    TQ_UNROLL
    for (int i = 0; i < SUMS; i += 2) of_row[i] *= shrink * scale_ratio;
  }
}

// Denominators become those of all lanes and simdgroups. Every simdgroup must call it, and may
// use `exchange`, threadgroup floats as for maxima, until then.
template <int ROW_TILES, int SIMDGROUPS>
TQ_FUNC void add_denominators(
    thread SoftmaxState<ROW_TILES>& state, threadgroup float* exchange, uint simdgroup,
    uint lane) {
  int row = 2 * int(tq_minor(lane));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) {
    TQ_UNROLL
    for (int i = 0; i < 3; i++) {
      state.denominator[e] +=
          simd_shuffle_xor(state.denominator[e], ushort(TQ_MAJOR_STRIDES[i]));
    }
    int at = (TILE_ROWS * (e / 2) + row + e % 2) * SIMDGROUPS;
    if (tq_major(lane) == 0u) exchange[at + int(simdgroup)] = state.denominator[e];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int e = 0; e < 2 * ROW_TILES; e++) {
    int at = (TILE_ROWS * (e / 2) + row + e % 2) * SIMDGROUPS;
    state.denominator[e] = 0.0f;
    TQ_UNROLL
    for (int s = 0; s < SIMDGROUPS; s++) state.denominator[e] += exchange[at + s];
  }
}
