// Decode attention, pass 1 (split-KV): one threadgroup attends TILE_ROWS = 8 query rows of one
// KV head to a split, a run of tokens that its simdgroups share, and writes an unnormalised
// partial result. The first splits are of tokens that are not packed (sink and recent), in
// the model's basis, the others of packed ones, in the codes'. Pass 2 is merge_states.metal.
// The entry is at the end.
//
// Tokens come in tiles of 32 (tiles.h says which lane decodes what). Per 8 tokens, the logits
// of token `major` and rows 2 * minor and 2 * minor + 1 stay on a lane, where the softmax is
// done once per tile. Logits are in units of log2. Products are of halves, every sum is float.

#include "formats.h"
#include "format_plain.h"
#include "merge_simdgroups.h"
#include "page_means.h"
#include "query_rows.h"
#include "token_runs.h"
#include "tiles.h"

// Logits may exceed the running maximum by MAX_LAG: then hardly any tile raises it. So weights
// are at most 2^MAX_LAG, those times values' scales over `value_scale` too, and times
// WEIGHT_UNIT at most the half 32768. Without the unit halves would be subnormal from 2^-14 of
// the largest weight down, which a long tail together matters at, and matrix products may take
// those for zero.
constant constexpr float MAX_LAG = 4.0f;
constant constexpr float WEIGHT_UNIT = 2048.0f;

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

// Where some lane's part of a tile exceeds the bounds, raise them to the tile's, on all lanes
// of a row alike; what was summed so far shrinks to the new ones. sums: SUMS, of the two rows
// in turns.
template <int SUMS>
TQ_FUNC void raise_bounds(
    thread RowState& state, thread float* tile_maximum, float tile_scale, thread float* sums) {
  bool exceeds = tile_maximum[0] > state.maximum[0] + MAX_LAG ||
                 tile_maximum[1] > state.maximum[1] + MAX_LAG;
  if (!simd_any(exceeds || tile_scale > state.value_scale)) return;
  TQ_UNROLL
  for (int i = 0; i < 3; i++) {
    ushort stride = ushort(TQ_MAJOR_STRIDES[i]);
    tile_scale = tq_max(tile_scale, simd_shuffle_xor(tile_scale, stride));
    tile_maximum[0] = tq_max(tile_maximum[0], simd_shuffle_xor(tile_maximum[0], stride));
    tile_maximum[1] = tq_max(tile_maximum[1], simd_shuffle_xor(tile_maximum[1], stride));
  }
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

// Attend to a run of tokens: fills `state`, equal on all lanes of a row but for the
// denominator, each lane's own, and `sums`, in units of its value_scale over WEIGHT_UNIT.
//   mask     float (rows, mask_columns), log2 units, read if MASKED
//   means    half (pages, DK), read if CENTER
// K and V are the formats of keys and values; keys decode in units of k_gain.
template <
    typename K, typename V, int DK, int DV, bool MASKED, bool CENTER, typename KTokens,
    typename VTokens>
TQ_FUNC void attend_tokens(
    const threadgroup half* queries, const thread KTokens& k_tokens,
    const thread VTokens& v_tokens, const device float* mask, const device half* means,
    const thread typename K::DecodeParams& k_params,
    const thread typename V::DecodeParams& v_params, float k_gain,
    const thread AttendArguments& args, int first_row, const thread TokenRun& run,
    thread RowState& state, thread float* sums, uint lane) {
  constexpr uint K_GROUPS = (DK + 15) / 16;
  constexpr uint V_GROUPS = (DV + 15) / 16;
  constexpr int K_LANE_GROUPS = tq_key_groups(DK);
  constexpr int V_LANE_GROUPS = tq_value_groups(DV);
  constexpr int SUMS = V_LANE_GROUPS * GROUP_SUMS;
  constexpr int AHEAD = tq_codes_ahead<V, DV>();

  half2 query[K_LANE_GROUPS * 8];
  load_query_fragments<DK, K_LANE_GROUPS>(queries, lane, query);
  // This lane's groups of the tile at hand. A group past the last one has zero queries, or
  // sums nobody reads: any group will do for it.
  typename K::Cursor k_cursors[K_LANE_GROUPS];
  typename V::Cursor v_cursors[V_LANE_GROUPS];
  TQ_UNROLL
  for (int i = 0; i < K_LANE_GROUPS; i++) {
    uint group = tq_minor(lane) * K_LANE_GROUPS + i;
    if (K_LANE_GROUPS * 4 != K_GROUPS) group = tq_min(group, K_GROUPS - 1u);
    k_cursors[i] = K::make_cursor(k_tokens, group, K_GROUPS);
    K::advance(k_cursors[i], run.first + int(tq_major(lane)));
  }
  TQ_UNROLL
  for (int i = 0; i < V_LANE_GROUPS; i++) {
    uint group = tq_min(tq_major(lane) + 8 * i, V_GROUPS - 1u);
    v_cursors[i] = V::make_cursor(v_tokens, group, V_GROUPS);
    V::advance(v_cursors[i], run.first + 2 * int(tq_minor(lane)));
  }

  state = make_row_state();
  float mean_logit[2] = {0.0f, 0.0f};
  PageCursor pages;
  if (CENTER) pages = make_page_cursor(run.first, args);
  float inverse_k_gain = 1.0f / k_gain;
  TQ_UNROLL
  for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;

  for (int tile = run.first; tile < run.end; tile += TILE_TOKENS) {
    float logits[TILE_TOKENS / 4];
    float scales[TILE_TOKENS / 8];
    float tile_maximum[2] = {-1e30f, -1e30f};
    float tile_scale = 0.0f;
    typename V::Codes v_codes[AHEAD > 0 ? AHEAD : 1];
    if (CENTER) {
      next_tile<DK>(
          pages, query, means, inverse_k_gain, args, lane, mean_logit, tile == run.first);
    }
    tile_logits<K, DK, TILE_TOKENS>(query, k_params, k_cursors, logits);
    load_values<V, DV>(v_cursors, v_codes);  // in flight during the softmax
    TQ_UNROLL
    for (int j = 0; j < TILE_TOKENS / 8; j++) {
      int token = tile + 8 * j + int(tq_major(lane));
      float k_scale = token_scale<K>(k_tokens, token);
      scales[j] = token_scale<V>(v_tokens, token);
      tile_scale = tq_max(tile_scale, scales[j]);
      TQ_UNROLL
      for (int e = 0; e < 2; e++) {
        int row = first_row + int(2 * tq_minor(lane)) + e;
        logits[2 * j + e] = logits[2 * j + e] * k_scale + mean_logit[e];
        if (MASKED && row < args.rows && token < run.end) {
          int column = token + (token < run.mask_gap_at ? 0 : run.mask_gap);
          logits[2 * j + e] += mask[size_t(row) * args.mask_columns + column];
        }
        if (token >= run.row_ends[e]) logits[2 * j + e] = -3e38f;
        tile_maximum[e] = tq_max(tile_maximum[e], logits[2 * j + e]);
      }
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
    add_weighted_values<V, DV>(weights, v_params, v_cursors, v_codes, sums);
    TQ_UNROLL
    for (int i = 0; i < K_LANE_GROUPS; i++) K::advance(k_cursors[i], TILE_TOKENS);
    TQ_UNROLL
    for (int i = 0; i < V_LANE_GROUPS; i++) V::advance(v_cursors[i], TILE_TOKENS);
  }
}

// Merge what the simdgroups of this threadgroup have and write it; values are in units of
// v_gain. Every simdgroup must call it. Pointers are to this split's part, or row 0's of
//   partial_out   float (rows, all splits, DV): unnormalised sums
//   partial_lse   float (rows, all splits, 2): their maximum and denominator
template <int DV, int SIMDGROUPS>
TQ_FUNC void write_partial(
    thread RowState& state, thread float* sums, float v_gain, int first_row, int rows,
    int splits, device float* partial_out, device float* partial_lse,
    threadgroup float* exchange, uint simdgroup, uint lane) {
  constexpr int V_LANE_GROUPS = tq_value_groups(DV);
  constexpr int PART = GROUP_SUMS / SIMDGROUPS;
  TQ_UNROLL
  for (int i = 0; i < 3; i++) {
    ushort stride = ushort(TQ_MAJOR_STRIDES[i]);
    state.denominator[0] += simd_shuffle_xor(state.denominator[0], stride);
    state.denominator[1] += simd_shuffle_xor(state.denominator[1], stride);
  }
  float factors[2];
  merge_row_states<SIMDGROUPS>(
      state.maximum, state.denominator, factors, exchange, simdgroup, lane);
  float sum_scale = state.value_scale * v_gain * (1.0f / WEIGHT_UNIT);
  TQ_UNROLL
  for (int i = 0; i < V_LANE_GROUPS * GROUP_SUMS; i++) sums[i] *= factors[i % 2] * sum_scale;

  int row = first_row + int(2 * tq_minor(lane));
  TQ_UNROLL
  for (int e = 0; e < 2; e++) {
    if (simdgroup == 0u && tq_major(lane) == 0u && row + e < rows) {
      device float* state_out = partial_lse + size_t(row + e) * splits * 2;
      state_out[0] = state.maximum[e];
      state_out[1] = state.denominator[e];
    }
  }
  TQ_UNROLL
  for (int i = 0; i < V_LANE_GROUPS; i++) {
    float merged[PART];
    if (i > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    merge_group_sums<SIMDGROUPS>(sums + GROUP_SUMS * i, merged, exchange, simdgroup, lane);
    int first_element = 16 * (int(tq_major(lane)) + 8 * i) + PART / 2 * int(simdgroup);
    TQ_UNROLL
    for (int k = 0; k < PART; k++) {
      int d = first_element + k / 2;
      if (d < DV && row + k % 2 < rows) {
        partial_out[size_t(row + k % 2) * splits * DV + d] = merged[k];
      }
    }
  }
}

// Threadgroups: (splits of either kind, KV heads * ROW_TILES, batch). SHARED_TABLE: whether
// keys and values look up the same table. recent_* are whole buffers, of which `recent` tokens
// are in use.
TQ_ENTRY(decode_split_kv) {
  // The queries, and when all simdgroups are through with them what they exchange.
  threadgroup float exchange[tq_split_floats(DK, SIMDGROUPS)];
  threadgroup half2 k_table[tq_table_words(K_KIND, K_BITS, SINGLE_TABLE)];
  threadgroup half2 v_table[SHARED_TABLE ? 1 : tq_table_words(V_KIND, V_BITS, SINGLE_TABLE)];
  threadgroup half* queries = (threadgroup half*)exchange;
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
  size_t row = kv_head * args.rows;
  int first_row = int(threadgroup_index.y % ROW_TILES) * TILE_ROWS;
  int split = int(threadgroup_index.x) - args.plain_splits;
  const device T* head_q = q + batch * q_strides[0] + head * (args.rows / args.steps) * q_strides[1];
  const device float* head_mask = mask + (MASKED ? row * args.mask_columns : 0);
  RowState state;
  float sums[tq_value_groups(DV) * GROUP_SUMS];
  if (split < 0) {
    load_queries<T, DK, false, SIMDGROUPS>(
        head_q, q_strides[1], q_strides[2], q_strides[3], k_signs, q_scale[1], first_row, args,
        queries, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    PlainTokens<T> k_tokens = make_plain_tokens(
        sink_keys + kv_head * args.sink * DK,
        recent_keys + batch * recent_keys_strides[0] + head * recent_keys_strides[1],
        int(recent_keys_strides[2]), args);
    PlainTokens<T> v_tokens = make_plain_tokens(
        sink_values + kv_head * args.sink * DV,
        recent_values + batch * recent_values_strides[0] + head * recent_values_strides[1],
        int(recent_values_strides[2]), args);
    typename PlainFormat<T, DK>::DecodeParams k_decode;
    typename PlainFormat<T, DV>::DecodeParams v_decode;
    int tile = int(threadgroup_index.x) * SIMDGROUPS + int(simdgroup);
    TokenRun run = plain_run(tile, first_row, args, lane);
    attend_tokens<PlainFormat<T, DK>, PlainFormat<T, DV>, DK, DV, MASKED, false>(
        queries, k_tokens, v_tokens, head_mask, means, k_decode, v_decode, 1.0f, args, first_row,
        run, state, sums, lane);
  } else {
    load_table<K_KIND, K_BITS, SINGLE_TABLE>(k_params, k_table, thread_index, 32 * SIMDGROUPS);
    if (!SHARED_TABLE) {
      load_table<V_KIND, V_BITS, SINGLE_TABLE>(v_params, v_table, thread_index, 32 * SIMDGROUPS);
    }
    load_queries<T, DK, ROTATE_K, SIMDGROUPS>(
        head_q, q_strides[1], q_strides[2], q_strides[3],
        k_signs + kv_head * (ROTATE_K ? DK : 0), q_scale[0] * k_params[0], first_row, args,
        queries, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    PackedTokens k_tokens = make_packed_tokens(
        k_words + batch * k_words_strides[0] + head * k_words_strides[1],
        k_scales + batch * k_scales_strides[0] + head * k_scales_strides[1]);
    PackedTokens v_tokens = make_packed_tokens(
        v_words + batch * v_words_strides[0] + head * v_words_strides[1],
        v_scales + batch * v_scales_strides[0] + head * v_scales_strides[1]);
    typename K::DecodeParams k_decode = K::make_params(k_params, k_table, lane);
    typename V::DecodeParams v_decode =
        V::make_params(v_params, SHARED_TABLE ? k_table : v_table, lane);
    TokenRun run = packed_run(split, int(simdgroup), SIMDGROUPS, args);
    attend_tokens<K, V, DK, DV, MASKED, CENTER>(
        queries, k_tokens, v_tokens, head_mask,
        means + (CENTER ? batch * means_strides[0] + head * means_strides[1] : 0), k_decode,
        v_decode, k_params[0], args, first_row, run, state, sums, lane);
  }
  int splits = args.plain_splits + args.splits;
  write_partial<DV, SIMDGROUPS>(
      state, sums, split < 0 ? 1.0f : v_params[0], first_row, args.rows, splits,
      partial_out + (row * splits + threadgroup_index.x) * DV,
      partial_lse + (row * splits + threadgroup_index.x) * 2, exchange, simdgroup, lane);
}
