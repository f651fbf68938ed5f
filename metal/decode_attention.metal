// Decode attention, pass 1 (split-KV): one simdgroup attends TILE_ROWS = 8 query rows of one
// KV head to a split, a run of packed tokens, and writes an unnormalised partial result. Pass
// 2 is merge_states.metal. The entry is at the end.
//
// Tokens come in tiles of 32 (tiles.h says which lane decodes what). Per 8 tokens, the logits
// of token `major` and rows 2 * minor and 2 * minor + 1 stay on a lane, where the softmax is
// done once per tile. Logits are in units of log2. Products are of halves, every sum is float.

#include "formats.h"
#include "query_rows.h"
#include "tiles.h"

// Weights times values' scales over `value_scale` are at most 1 and times WEIGHT_UNIT at most
// the half 32768. Without it halves would be subnormal from 2^-14 of the largest weight down,
// which a long tail together matters at, and matrix products may take those for zero.
constant constexpr float WEIGHT_UNIT = 32768.0f;

// The running softmax of a lane's two rows over the tokens so far.
struct RowState {
  float maximum[2];
  float denominator[2];
  float value_scale;  // a running upper bound of the values' scales
  float weight_factor;  // WEIGHT_UNIT over it
};

TQ_FUNC RowState make_row_state() {
  RowState state;
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    state.maximum[e] = -1e30f;
    state.denominator[e] = 0.0f;
  }
  state.value_scale = 0.0f;
  state.weight_factor = 0.0f;
  return state;
}

// Raise the bounds to a tile's, the same on every lane of a row; what was summed so far
// shrinks to the new ones. sums: SUMS, of the two rows in turns.
template <int SUMS>
TQ_FUNC void raise_bounds(
    thread RowState& state, const thread float* tile_maximum, float tile_scale,
    thread float* sums) {
  bool is_higher = tile_maximum[0] > state.maximum[0] || tile_maximum[1] > state.maximum[1];
  if (!simd_any(is_higher || tile_scale > state.value_scale)) return;
  float shrink[2];
  float next_scale = tq_max(2.0f * tile_scale, 1e-30f);
  float scale_ratio = 1.0f;
  if (tile_scale > state.value_scale) {
    scale_ratio = state.value_scale / next_scale;
    state.value_scale = next_scale;
    state.weight_factor = WEIGHT_UNIT / next_scale;
  }
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    float next = tq_max(state.maximum[e], tile_maximum[e]);
    shrink[e] = tq_exp2(state.maximum[e] - next);
    state.maximum[e] = next;
    state.denominator[e] *= shrink[e];
  }
  TQ_UNROLL
  for (int i = 0; i < SUMS; i++) sums[i] *= shrink[i % 2] * scale_ratio;
}

// Pointers are to this KV head's part of
//   words         uint (capacity, WORDS), up to the end of the last tile
//   scales        half (capacity, SCALES)
//   mask          float (rows, mask_columns), log2 units, read if MASKED
//   means         half (pages, DK), read if CENTER
//   partial_out   float (rows, splits, DV): unnormalised sums
//   partial_lse   float (rows, splits, 2): their maximum and denominator
// K and V are the formats of keys and values; they decode in units of k_gain and v_gain.
template <typename K, typename V, int DK, int DV, bool MASKED, bool CENTER>
TQ_FUNC void attend_split(
    const threadgroup half* queries, const device uint* k_words,
    const device half* k_scales, const device uint* v_words, const device half* v_scales,
    const device float* mask, const device half* means,
    const thread typename K::DecodeParams& k_params,
    const thread typename V::DecodeParams& v_params, float k_gain, float v_gain,
    const thread AttendArguments& args, int first_row, device float* partial_out,
    device float* partial_lse, uint split, uint lane) {
  constexpr uint K_GROUPS = (DK + 15) / 16;
  constexpr uint V_GROUPS = (DV + 15) / 16;
  constexpr int K_LANE_GROUPS = tq_key_groups(DK);
  constexpr int V_LANE_GROUPS = tq_value_groups(DV);
  constexpr int SUMS = V_LANE_GROUPS * 8 * 4;

  half2 query[K_LANE_GROUPS * 8];
  load_query_fragments<DK, K_LANE_GROUPS>(queries, lane, query);
  int first_token = int(split) * args.tokens_per_split;
  int end_token = first_token + args.tokens_per_split < args.packed
                      ? first_token + args.tokens_per_split
                      : args.packed;
  // This lane's groups of the tile at hand. A group past the last one has zero queries, or
  // sums nobody reads: any group will do for it.
  typename K::Cursor k_cursors[K_LANE_GROUPS];
  typename V::Cursor v_cursors[V_LANE_GROUPS];
  TQ_UNROLL
  for (int i = 0; i < K_LANE_GROUPS; i++) {
    uint group = tq_minor(lane) * K_LANE_GROUPS + i;
    if (K_LANE_GROUPS * 4 != K_GROUPS) group = tq_min(group, K_GROUPS - 1u);
    k_cursors[i] = K::make_cursor(k_words, k_scales, group, K_GROUPS);
    K::advance(k_cursors[i], first_token + int(tq_major(lane)));
  }
  TQ_UNROLL
  for (int i = 0; i < V_LANE_GROUPS; i++) {
    uint group = tq_min(tq_major(lane) + 8 * i, V_GROUPS - 1u);
    v_cursors[i] = V::make_cursor(v_words, v_scales, group, V_GROUPS);
    V::advance(v_cursors[i], first_token + 2 * int(tq_minor(lane)));
  }
  k_scales += (first_token + tq_major(lane)) * K::SCALES;
  v_scales += (first_token + tq_major(lane)) * V::SCALES;

  RowState state = make_row_state();
  float sums[SUMS];
  float mean_logit[2] = {0.0f, 0.0f};
  // The next page's mean, the tiles of that page that are another split's, and on which tile
  // from here that page begins: counted down, as divisions take long.
  const device half* mean = means + (CENTER ? first_token / args.page * DK : 0);
  int tiles_of_others = CENTER ? first_token % args.page / TILE_TOKENS : 0;
  int next_page = 1;
  float inverse_k_gain = 1.0f / k_gain;
  TQ_UNROLL
  for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;

  for (int tile = first_token; tile < end_token; tile += TILE_TOKENS) {
    float logits[TILE_TOKENS / 4];
    float scales[TILE_TOKENS / 8];
    float tile_maximum[2] = {-1e30f, -1e30f};
    float tile_scale = 0.0f;
    typename V::Codes v_codes[V_LANE_GROUPS * (TILE_TOKENS / 4)];
    if (CENTER && --next_page == 0) {
      mean_logits<DK>(queries, mean, inverse_k_gain, lane, mean_logit);
      mean += DK;
      next_page = args.page / TILE_TOKENS - tiles_of_others;
      tiles_of_others = 0;
    }
    tile_logits<K, DK>(query, k_params, k_cursors, logits);
    load_values<V, DV>(v_cursors, v_codes);  // in flight during the softmax
    TQ_UNROLL
    for (int j = 0; j < TILE_TOKENS / 8; j++) {
      int token = tile + 8 * j + int(tq_major(lane));
      float k_scale = float(k_scales[8 * j * K::SCALES]);
      scales[j] = float(v_scales[8 * j * V::SCALES]);
      tile_scale = tq_max(tile_scale, scales[j]);
      TQ_UNROLL
      for (int e = 0; e < 2; e++) {
        int row = first_row + int(2 * tq_minor(lane)) + e;
        logits[2 * j + e] = logits[2 * j + e] * k_scale + mean_logit[e];
        if (MASKED && row < args.rows && token < end_token) {
          logits[2 * j + e] += mask[size_t(row) * args.mask_columns + args.sink + token];
        }
        if (token >= end_token) logits[2 * j + e] = -3e38f;
        tile_maximum[e] = tq_max(tile_maximum[e], logits[2 * j + e]);
      }
    }
    TQ_UNROLL
    for (int i = 0; i < 3; i++) {
      ushort stride = ushort(TQ_MAJOR_STRIDES[i]);
      tile_scale = tq_max(tile_scale, simd_shuffle_xor(tile_scale, stride));
      tile_maximum[0] = tq_max(tile_maximum[0], simd_shuffle_xor(tile_maximum[0], stride));
      tile_maximum[1] = tq_max(tile_maximum[1], simd_shuffle_xor(tile_maximum[1], stride));
    }
    raise_bounds<SUMS>(state, tile_maximum, tile_scale, sums);
    half2 weights[TILE_TOKENS / 8];
    TQ_UNROLL
    for (int j = 0; j < TILE_TOKENS / 8; j++) {
      float first = tq_exp2(logits[2 * j] - state.maximum[0]);
      float second = tq_exp2(logits[2 * j + 1] - state.maximum[1]);
      float scale = scales[j] * state.weight_factor;
      state.denominator[0] += first;
      state.denominator[1] += second;
      weights[j] = tq_weights(tq_half2(first * scale, second * scale));
    }
    add_weighted_values<V, DV>(weights, v_params, v_codes, sums);
    TQ_UNROLL
    for (int i = 0; i < K_LANE_GROUPS; i++) K::advance(k_cursors[i], TILE_TOKENS);
    TQ_UNROLL
    for (int i = 0; i < V_LANE_GROUPS; i++) V::advance(v_cursors[i], TILE_TOKENS);
    k_scales += TILE_TOKENS * K::SCALES;
    v_scales += TILE_TOKENS * V::SCALES;
  }

  TQ_UNROLL
  for (int i = 0; i < 3; i++) {
    ushort stride = ushort(TQ_MAJOR_STRIDES[i]);
    state.denominator[0] += simd_shuffle_xor(state.denominator[0], stride);
    state.denominator[1] += simd_shuffle_xor(state.denominator[1], stride);
  }
  float sum_scale = state.value_scale * v_gain * (1.0f / WEIGHT_UNIT);
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    int row = first_row + int(2 * tq_minor(lane)) + e;
    if (row >= args.rows) continue;
    size_t at = size_t(row) * args.splits + split;
    if (tq_major(lane) == 0u) {
      partial_lse[2 * at] = state.maximum[e];
      partial_lse[2 * at + 1] = state.denominator[e];
    }
    device float* out = partial_out + at * DV;
    TQ_UNROLL
    for (int i = 0; i < V_LANE_GROUPS; i++) {
      int group = int(tq_major(lane)) + 8 * i;
      TQ_UNROLL
      for (int p = 0; p < 8; p++) {
        int d = 16 * group + 2 * p;
        if (d < DV) out[d] = sums[(i * 8 + p) * 4 + e] * sum_scale;
        if (d + 1 < DV) out[d + 1] = sums[(i * 8 + p) * 4 + 2 + e] * sum_scale;
      }
    }
  }
}

// Threadgroups: (splits / SIMDGROUPS, KV heads * ROW_TILES, batch). SHARED_TABLE: whether
// keys and values look up the same table.
TQ_ENTRY(decode_split_kv) {
  threadgroup half queries[TILE_ROWS * DK];
  threadgroup half2 k_table[tq_table_words(K_KIND, K_BITS, SINGLE_TABLE)];
  threadgroup half2 v_table[SHARED_TABLE ? 1 : tq_table_words(V_KIND, V_BITS, SINGLE_TABLE)];
  typedef Format<K_KIND, DK, K_BITS, K_TERMS, SINGLE_TABLE> K;
  typedef Format<V_KIND, DV, V_BITS, V_TERMS, SINGLE_TABLE> V;
  AttendArguments args = load_arguments(arguments);
  uint3 threadgroup_index = threadgroup_position_in_grid;
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  uint thread_index = thread_index_in_threadgroup;
  size_t batch = threadgroup_index.z;
  size_t head = threadgroup_index.y / ROW_TILES;
  size_t kv_head = batch * args.kv_heads + head;
  int first_row = int(threadgroup_index.y % ROW_TILES) * TILE_ROWS;
  load_table<K_KIND, K_BITS, SINGLE_TABLE>(k_params, k_table, thread_index, 32 * SIMDGROUPS);
  if (!SHARED_TABLE) {
    load_table<V_KIND, V_BITS, SINGLE_TABLE>(v_params, v_table, thread_index, 32 * SIMDGROUPS);
  }
  load_queries<T, DK, ROTATE_K, SIMDGROUPS>(
      q + batch * q_strides[0] + head * (args.rows / args.steps) * q_strides[1],
      q_strides[1], q_strides[2], q_strides[3], k_signs + kv_head * (ROTATE_K ? DK : 0),
      q_scale[0] * k_params[0], first_row, args, queries, simdgroup, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  typename K::DecodeParams k_decode = K::make_params(k_params, k_table, lane);
  typename V::DecodeParams v_decode =
      V::make_params(v_params, SHARED_TABLE ? k_table : v_table, lane);
  uint split = threadgroup_index.x * SIMDGROUPS + simdgroup;
  if (split >= uint(args.splits)) return;
  size_t row = kv_head * args.rows;
  attend_split<K, V, DK, DV, MASKED, CENTER>(
      queries, k_words + batch * k_words_strides[0] + head * k_words_strides[1],
      k_scales + batch * k_scales_strides[0] + head * k_scales_strides[1],
      v_words + batch * v_words_strides[0] + head * v_words_strides[1],
      v_scales + batch * v_scales_strides[0] + head * v_scales_strides[1],
      mask + (MASKED ? row * args.mask_columns : 0),
      means + (CENTER ? batch * means_strides[0] + head * means_strides[1] : 0),
      k_decode, v_decode, k_params[0], v_params[0], args, first_row,
      partial_out + row * args.splits * DV, partial_lse + row * args.splits * 2, split, lane);
}
