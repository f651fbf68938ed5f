// Decode attention, pass 1 (split-KV): one threadgroup attends query rows of one KV head to a
// split, a run of tokens, and writes an unnormalised partial result: ROW_TILES tiles of 8 rows
// by matrix products, or FMA_ROWS of them, if not 0, by multiply-adds (query_rows.h). The
// first splits are of tokens that are not packed (sink and recent), in the model's basis, the
// others of packed ones, in the codes'. Pass 2 is merge_states.metal. The entry is at the end.
//
// Its simdgroups go through the split in rounds. In each, a simdgroup makes the logits of a tile
// of 32 tokens of its own (tiles.h says which lane decodes what), and the weights of all tiles
// go through threadgroup memory; then it adds up a part of the elements of all tiles' values.
// So every code is decoded once, for all rows, straight into the operands of products, no
// partial sum is held twice, and the threadgroup's result needs no merging. Logits are in units
// of log2. Products are of halves, every sum is float.

#include "formats.h"
#include "fma_rows.h"
#include "format_plain.h"
#include "matrix_rows.h"
#include "page_means.h"
#include "softmax_state.h"
#include "token_runs.h"

// Units of values that a simdgroup adds up, of those that there are.
constexpr int tq_own_units(int padded, int simdgroups) {
  return (tq_units(padded) + simdgroups - 1) / simdgroups;
}

// Threadgroup memory of a round, in words: weights of every tile, in two buffers that rounds use
// in turns, so that one barrier a round is enough, and whether a simdgroup's tile exceeds the
// bounds.
constexpr int tq_round_words(int simdgroups, int tile_words) {
  return 2 * simdgroups * (tile_words + 1);
}

// Whether codes of so many words of a lane are loaded long before their use; more would not
// leave registers. 0: they are no codes.
constexpr bool tq_is_ahead(int words) { return words > 0 && words <= 16; }
constexpr int tq_units_ahead(int words, int padded) {
  return tq_is_ahead(words) ? tq_units(padded) : 1;
}

// What the simdgroups of a threadgroup share.
struct Shared {
  threadgroup half2* queries;
  threadgroup uint* rounds;
  threadgroup float* maxima;
  threadgroup float* logits_of_means;
};

// The mask of the KV head's queries, float in log2 units, from this row's first column on; what
// is the same for all of an axis has a stride of 0.
struct Mask {
  const device float* origin;
  size_t head_stride, step_stride, column_stride;
};

// This lane's logits of its simdgroup's tile: scales, those of means, and what is not seen. The
// mask is read if MASKED.
template <typename Rows, bool MASKED>
TQ_FUNC void finish_logits(
    const thread float* k_scales, const thread float* mean_logits, const thread Mask& mask,
    const thread AttendArguments& args, int first_row, const thread TokenRun& run, int tile,
    thread float* logits, uint lane) {
  TQ_UNROLL
  for (int i = 0; i < Rows::LANE_TOKENS * Rows::LANE_ROWS; i++) {
    int e = i % Rows::LANE_ROWS;
    thread float& logit = logits[Rows::logit_at(e, i / Rows::LANE_ROWS)];
    logit = logit * k_scales[i / Rows::LANE_ROWS] + mean_logits[e];
  }
  if (!MASKED && TILE_TOKENS * (tile + 1) <= run.end - run.hidden
      && TILE_TOKENS * tile >= run.seen_from) {
    return;
  }
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    int row = first_row + Rows::row(lane, e);
    int end = row_end(run, row, args);
    const device float* row_mask = mask.origin;
    if (MASKED) {
      int query_head = row / args.steps;
      row_mask += query_head * mask.head_stride
                  + (row - query_head * args.steps) * mask.step_stride;
    }
    TQ_UNROLL
    for (int i = 0; i < Rows::LANE_TOKENS; i++) {
      thread float& logit = logits[Rows::logit_at(e, i)];
      int token = TILE_TOKENS * tile + Rows::token(lane, i);
      bool is_seen = token < end && (token >= run.seen_from || token < run.keep);
      if (MASKED && row < args.rows && is_seen) {
        logit += row_mask[column_of(run, token) * mask.column_stride];
      }
      if (!is_seen) logit = -3e38f;
    }
  }
}

// This lane's codes of keys of the tile at a place, of the first UNITS units; and their logits.
template <typename K, int UNITS, typename Tokens>
TQ_FUNC void load_keys(
    const thread Tokens& tokens, int place, uint lane, thread typename K::Unit* keys) {
  TQ_UNROLL
  for (int u = 0; u < UNITS; u++) {
    keys[u] = K::load(tokens, place, u, unit_columns<K::PADDED>(u), lane);
  }
}
template <typename K, typename Rows>
TQ_FUNC void add_logits(
    const thread typename K::Params& params, const thread typename K::Unit* keys,
    const threadgroup half2* queries, uint lane, thread float* logits) {
  TQ_UNROLL
  for (int u = 0; u < tq_units(K::PADDED); u++) {
    half2 query[Rows::LANE_QUERIES];
    Rows::template load_unit_query<K::PADDED>(queries, u, lane, query);
    Rows::template add_unit_logits<K, 4>(
        params, keys[u], unit_columns<K::PADDED>(u), query, logits);
  }
}

// The same where codes are too many for registers: one unit ahead, the first one given.
template <typename K, typename Rows, typename Tokens>
TQ_FUNC void add_logits_by_unit(
    const thread Tokens& tokens, const thread typename K::Params& params, int place,
    const thread typename K::Unit& first, const threadgroup half2* queries, uint lane,
    thread float* logits) {
  constexpr int UNITS = tq_units(K::PADDED);
  typename K::Unit next = first;
  TQ_ROLL
  for (int u = 0; u < UNITS; u++) {
    typename K::Unit keys = next;
    if (u + 1 < UNITS) {
      next = K::load(tokens, place, u + 1, unit_columns<K::PADDED>(u + 1), lane);
    }
    half2 query[Rows::LANE_QUERIES];
    Rows::template load_unit_query<K::PADDED>(queries, u, lane, query);
    if (unit_columns<K::PADDED>(u) == 4) {
      Rows::template add_unit_logits<K, 4>(params, keys, 4, query, logits);
    } else {
      Rows::template add_unit_logits<K, 4>(params, keys, 2, query, logits);
    }
  }
}

// A simdgroup's units of the values of the tile at a place; past the last unit it takes that one, for nothing.
template <typename V, int SIMDGROUPS, typename Tokens>
TQ_FUNC void load_values(
    const thread Tokens& tokens, int place, uint simdgroup, uint lane,
    thread typename V::Unit* values) {
  constexpr int UNITS = tq_units(V::PADDED);
  constexpr int OWN = tq_own_units(V::PADDED, SIMDGROUPS);
  TQ_UNROLL
  for (int i = 0; i < OWN; i++) {
    int unit = tq_min(int(simdgroup) * OWN + i, UNITS - 1);
    values[i] = V::load(tokens, place, unit, unit_columns<V::PADDED>(unit), lane);
  }
}
template <typename V, typename Rows, int SIMDGROUPS>
TQ_FUNC void add_values(
    const thread typename V::Params& params, const thread typename V::Unit* values,
    const threadgroup uint* weights, uint simdgroup, uint lane, thread float* sums) {
  constexpr int OWN = tq_own_units(V::PADDED, SIMDGROUPS);
  half2 of_tile[Rows::LANE_QUERIES];
  Rows::load_weights(weights, lane, of_tile);
  TQ_UNROLL
  for (int i = 0; i < OWN; i++) {
    if (unit_columns<V::PADDED>(int(simdgroup) * OWN + i) == 4) {
      Rows::template add_unit_values<V, OWN>(params, values[i], 4, of_tile, i, sums);
    } else {
      Rows::template add_unit_values<V, OWN>(params, values[i], 2, of_tile, i, sums);
    }
  }
}

// Codes of keys, of the first unit at least, and scales of a simdgroup's next tile, loaded a
// round before they are needed. Tokens that are not packed take one round: no keys are ahead.
// And the places of the tiles of the round at hand, which are loaded a round before that.
template <typename K, typename Rows>
struct Ahead {
  typename K::Unit keys[tq_units_ahead(K::LANE_WORDS, K::PADDED)];
  typename Rows::Scale k_scales[Rows::SCALES];
  typename Rows::Scale v_scales[Rows::SCALES];
  int places;
};
template <typename K, typename V, typename Rows, typename KTokens, typename VTokens>
TQ_FUNC void load_ahead(
    const thread KTokens& k_tokens, const thread VTokens& v_tokens, int place, uint lane,
    thread Ahead<K, Rows>& ahead) {
  if (K::LANE_WORDS > 0) {
    load_keys<K, tq_units_ahead(K::LANE_WORDS, K::PADDED)>(k_tokens, place, lane, ahead.keys);
  }
  load_scales<K>(k_tokens, place, lane, ahead.k_scales);
  load_scales<V>(v_tokens, place, lane, ahead.v_scales);
}

// Attend to a run of tokens, the first of which are loaded ahead: fills `state` and `sums`, in
// units of its value_scale over WEIGHT_UNIT, as add_unit_values leaves them.
// K and V are the formats of keys and values; keys decode in units of k_gain.
template <
    typename K, typename V, int DK, typename Rows, int SIMDGROUPS, bool MASKED, bool CENTER,
    typename KTokens, typename VTokens>
TQ_FUNC void attend_tokens(
    const thread Shared& shared, const thread KTokens& k_tokens, const thread VTokens& v_tokens,
    const thread Mask& mask, const thread typename K::Params& k_params,
    const thread typename V::Params& v_params, float k_gain, const thread AttendArguments& args,
    int first_row, const thread TokenRun& run, thread Ahead<K, Rows>& ahead,
    const thread Means<DK, K::PADDED>& means, thread SoftmaxState<Rows>& state,
    thread float* sums, uint simdgroup, uint lane) {
  constexpr int OWN_UNITS = tq_own_units(V::PADDED, SIMDGROUPS);
  constexpr int SUMS = Rows::UNIT_SUMS * OWN_UNITS;
  constexpr bool K_AHEAD = tq_is_ahead(K::LANE_WORDS);
  constexpr bool V_AHEAD = tq_is_ahead(V::LANE_WORDS);
  constexpr int WEIGHTS = SIMDGROUPS * Rows::TILE_WORDS;

  state = make_softmax_state<Rows>();
  TQ_UNROLL
  for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;
  PageCursor pages;
  if (CENTER) {
    pages = make_logits_of_means<DK, K::PADDED, Rows>(
        shared.queries, means, 1.0f / k_gain, run, args, shared.logits_of_means, simdgroup, lane);
  }
  uint buffer = 0u;

  TQ_ROLL
  for (int round_tile = run.first_tile; round_tile < run.end_tile; round_tile += SIMDGROUPS) {
    int tile = round_tile + int(simdgroup);
    bool has_tile = tile < run.end_tile;
    int next_places =
        load_places<SIMDGROUPS>(k_tokens, round_tile + SIMDGROUPS, run.end_tile, lane);
    float mean_logits[Rows::LANE_ROWS];
    TQ_UNROLL
    for (int e = 0; e < Rows::LANE_ROWS; e++) mean_logits[e] = 0.0f;
    if (CENTER) {
      const threadgroup float* of_page = shared.logits_of_means + pages.page * Rows::ROWS;
      TQ_UNROLL
      for (int e = 0; e < Rows::LANE_ROWS; e++) {
        mean_logits[e] = has_tile ? of_page[Rows::row(lane, e)] : 0.0f;
      }
      next_round<SIMDGROUPS>(pages, args);
    }

    float logits[Rows::LOGITS];
    TQ_UNROLL
    for (int i = 0; i < Rows::LOGITS; i++) logits[i] = 0.0f;
    if (K_AHEAD) {
      add_logits<K, Rows>(k_params, ahead.keys, shared.queries, lane, logits);
    } else {
      int place = nth_place(ahead.places, simdgroup);
      if (K::LANE_WORDS == 0) load_keys<K, 1>(k_tokens, place, lane, ahead.keys);
      add_logits_by_unit<K, Rows>(
          k_tokens, k_params, place, ahead.keys[0], shared.queries, lane, logits);
    }
    // Fewer registers then, before values take theirs.
    Rows::share_logits(logits, lane);
    float k_scales[Rows::LANE_TOKENS];
    float v_scales[Rows::LANE_TOKENS];
    Rows::widen_scales(ahead.k_scales, k_scales);
    Rows::widen_scales(ahead.v_scales, v_scales);
    // Values of this round, in flight during the softmax.
    constexpr int TILES_AHEAD = V_AHEAD ? SIMDGROUPS : 1;
    typename V::Unit values[OWN_UNITS * TILES_AHEAD];
    TQ_UNROLL
    for (int t = 0; t < TILES_AHEAD; t++) {
      load_values<V, SIMDGROUPS>(
          v_tokens, nth_place(ahead.places, uint(t)), simdgroup, lane, values + OWN_UNITS * t);
    }
    finish_logits<Rows, MASKED>(
        k_scales, mean_logits, mask, args, first_row, run, has_tile ? tile : run.end_tile, logits,
        lane);

    threadgroup uint* weights = shared.rounds + buffer * uint(WEIGHTS);
    threadgroup uint* exceeding = shared.rounds + 2 * WEIGHTS + buffer * uint(SIMDGROUPS);
    float added[Rows::LANE_ROWS];
    // One raise is enough, so there is no third pass, whatever numbers are.
    bool raises = true;
    TQ_ROLL
    for (int pass = 0; raises; pass++) {
      if (pass == 0 && simd_any(exceeds_bounds<Rows>(state, logits, v_scales))) {
        if (lane == 0u) exceeding[simdgroup] = 1u;
      } else {
        if (lane == 0u) exceeding[simdgroup] = 0u;
        float scaled[Rows::LANE_ROWS * Rows::LANE_TOKENS];
        TQ_UNROLL
        for (int e = 0; e < Rows::LANE_ROWS; e++) {
          added[e] = 0.0f;
          TQ_UNROLL
          for (int i = 0; i < Rows::LANE_TOKENS; i++) {
            float weight = tq_exp2(logits[Rows::logit_at(e, i)] - state.maximum[e]);
            added[e] += weight;
            scaled[Rows::logit_at(e, i)] = weight * (v_scales[i] * state.weight_factor);
          }
        }
        Rows::store_weights(scaled, weights + simdgroup * uint(Rows::TILE_WORDS), lane);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint any_exceeding = 0u;
      TQ_UNROLL
      for (int s = 0; s < SIMDGROUPS; s++) any_exceeding |= exceeding[s];
      raises = any_exceeding != 0u;
      if (raises) {
        raise_bounds<Rows, SIMDGROUPS, SUMS>(
            state, logits, v_scales, sums, shared.maxima, simdgroup, lane);
      }
    }
    TQ_UNROLL
    for (int e = 0; e < Rows::LANE_ROWS; e++) state.denominator[e] += added[e];

    // What the next round needs is in flight from now on.
    load_ahead<K, V, Rows>(
        k_tokens, v_tokens, nth_place(next_places, simdgroup), lane, ahead);
    if (V_AHEAD) {
      TQ_UNROLL
      for (int t = 0; t < SIMDGROUPS; t++) {
        add_values<V, Rows, SIMDGROUPS>(
            v_params, values + (V_AHEAD ? OWN_UNITS * t : 0), weights + Rows::TILE_WORDS * t, simdgroup,
            lane, sums);
      }
    } else {
      TQ_ROLL
      for (int t = 0; t < SIMDGROUPS; t++) {
        typename V::Unit next[OWN_UNITS];
        int place = nth_place(ahead.places, uint(tq_min(t + 1, SIMDGROUPS - 1)));
        load_values<V, SIMDGROUPS>(v_tokens, place, simdgroup, lane, next);
        add_values<V, Rows, SIMDGROUPS>(
            v_params, values, weights + Rows::TILE_WORDS * t, simdgroup, lane, sums);
        TQ_UNROLL
        for (int i = 0; i < OWN_UNITS; i++) values[i] = next[i];
      }
    }
    ahead.places = next_places;
    buffer ^= 1u;
  }
}

// Write the threadgroup's result; values are in units of v_gain. Every simdgroup must call it.
// Pointers are to this split's part, of row 0 of
//   partial_out   float (rows, all splits, DV): unnormalised sums
//   partial_lse   float (rows, all splits, 2): their maximum and denominator
template <int DV, int PADDED, typename Rows, int SIMDGROUPS>
TQ_FUNC void write_partial(
    thread SoftmaxState<Rows>& state, thread float* sums, float v_gain, int first_row,
    int rows, int splits, device float* partial_out, device float* partial_lse,
    threadgroup float* exchange, uint simdgroup, uint lane) {
  constexpr int OWN_UNITS = tq_own_units(PADDED, SIMDGROUPS);
  add_denominators<Rows, SIMDGROUPS>(state, exchange, simdgroup, lane);
  Rows::template share_sums<OWN_UNITS>(sums, lane);
  float scale = state.value_scale * v_gain * (1.0f / WEIGHT_UNIT);
  TQ_UNROLL
  for (int e = 0; e < Rows::LANE_ROWS; e++) {
    int row = first_row + Rows::row(lane, e);
    if (row >= rows) continue;
    if (simdgroup == 0u && Rows::leads(lane)) {
      device float* state_out = partial_lse + size_t(row) * splits * 2;
      state_out[0] = state.maximum[e];
      state_out[1] = state.denominator[e];
    }
    device float* out = partial_out + size_t(row) * splits * DV;
    TQ_UNROLL
    for (int i = 0; i < Rows::LANE_COLUMNS * OWN_UNITS; i++) {
      int column = UNIT_COLUMNS * OWN_UNITS * int(simdgroup) + Rows::column(lane, i);
      int d = int(tq_major(lane)) * tq_columns(PADDED) + column;
      if (column < tq_columns(PADDED) && d < DV) {
        out[d] = sums[Rows::template sum_at<OWN_UNITS>(e, i)] * scale;
      }
    }
  }
}

// Threadgroups: (splits of either kind, KV heads * ROW_GROUPS, batch), a row group is the rows
// of one; where rows of the batch have fewer splits, the last threadgroups have nothing to do.
// SHARED_TABLE: whether keys and values look up the same table. recent_* are whole buffers, of
// which `recent` tokens are in use. tiles: places of all rows' tiles, one row behind the other.
TQ_ENTRY(decode_split_kv) {
  typedef Format<K_KIND, false, DK, K_BITS, K_TERMS> K;
  typedef Format<V_KIND, true, DV, V_BITS, V_TERMS> V;
  typedef QueryRows<(FMA_ROWS > 0), (FMA_ROWS > 0 ? FMA_ROWS : ROW_TILES)> Rows;
  // Of a type that makes their addresses multiples of 16 bytes.
  threadgroup uint4 query_words[Rows::UNIT_QUERIES * tq_units(K::PADDED) / 4];
  threadgroup uint4 round_words[(tq_round_words(SIMDGROUPS, Rows::TILE_WORDS) + 3) / 4];
  threadgroup float maxima[tq_maxima_floats(SIMDGROUPS, Rows::ROWS)];
  threadgroup float logits_of_means[CENTER ? tq_means_floats(SIMDGROUPS, Rows::ROWS) : 1];
  threadgroup half2 k_table[tq_table_words(K_KIND, K_BITS)];
  // What is needed behind the loops, and would take registers in them: the number of the first
  // row's partial result, query rows, splits, and whether the tokens are packed.
  threadgroup int ending[4];
  threadgroup half2 v_table[SHARED_TABLE ? 1 : tq_table_words(V_KIND, V_BITS)];
  Shared shared;
  shared.queries = (threadgroup half2*)query_words;
  shared.rounds = (threadgroup uint*)round_words;
  shared.maxima = maxima;
  shared.logits_of_means = logits_of_means;
  uint3 threadgroup_index = threadgroup_position_in_grid;
  AttendArguments args = load_arguments(arguments, threadgroup_index.z);
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  uint thread_index = thread_index_in_threadgroup;
  int splits = args.plain_splits + args.splits;
  uint batch = threadgroup_index.z;
  uint head = threadgroup_index.y / ROW_GROUPS;
  uint kv_head = batch * args.kv_heads + head;
  int first_row = int(threadgroup_index.y % ROW_GROUPS) * Rows::ROWS;
  int split = int(threadgroup_index.x) - args.plain_splits;
  const device T* head_q =
      q + batch * q_strides[0] + head * (args.rows / args.steps) * q_strides[1];
  Mask head_mask;
  head_mask.origin = mask;
  if (MASKED) {
    head_mask.head_stride = mask_strides[1];
    head_mask.step_stride = mask_strides[2];
    head_mask.column_stride = mask_strides[3];
    head_mask.origin += batch * mask_strides[0]
                        + head * (args.rows / args.steps) * mask_strides[1]
                        + first_column(args) * mask_strides[3];
  }
  if (split >= args.splits) return;
  if (thread_index == 0u) {
    ending[0] = args.first_partial + int(head) * args.rows * splits + int(threadgroup_index.x);
    ending[1] = args.rows;
    ending[2] = splits;
    ending[3] = split >= 0;
  }
  SoftmaxState<Rows> state;
  float sums[Rows::UNIT_SUMS * tq_own_units(V::PADDED, SIMDGROUPS)];
  if (split < 0) {
    typedef PlainFormat<T, false, DK, K::PADDED> PlainKeys;
    typedef PlainFormat<T, true, DV, V::PADDED> PlainValues;
    PlainTokens<T> k_tokens = make_plain_tokens(
        sink_keys + batch * sink_keys_strides[0] + head * sink_keys_strides[1], args.sink,
        recent_keys + batch * recent_keys_strides[0] + head * recent_keys_strides[1]
            + args.first_recent * recent_keys_strides[2],
        args.recent, int(recent_keys_strides[2]));
    PlainTokens<T> v_tokens = make_plain_tokens(
        sink_values + batch * sink_values_strides[0] + head * sink_values_strides[1], args.sink,
        recent_values + batch * recent_values_strides[0] + head * recent_values_strides[1]
            + args.first_recent * recent_values_strides[2],
        args.recent, int(recent_values_strides[2]));
    TokenRun run = plain_run(int(threadgroup_index.x), SIMDGROUPS, args);
    Ahead<PlainKeys, Rows> ahead;
    Means<DK, K::PADDED> no_means;
    ahead.places = load_places<SIMDGROUPS>(k_tokens, run.first_tile, run.end_tile, lane);
    load_ahead<PlainKeys, PlainValues, Rows>(k_tokens, v_tokens, run.first_tile, lane, ahead);
    load_queries<T, DK, K::PADDED, Rows, false, SIMDGROUPS>(
        head_q, q_strides[1], q_strides[2], q_strides[3], k_signs, q_scale[1], first_row, args,
        (threadgroup half*)query_words, simdgroup, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    typename PlainKeys::Params k_decode;
    typename PlainValues::Params v_decode;
    attend_tokens<PlainKeys, PlainValues, DK, Rows, SIMDGROUPS, MASKED, false>(
        shared, k_tokens, v_tokens, head_mask, k_decode, v_decode, 1.0f, args, first_row,
        run, ahead, no_means, state, sums, simdgroup, lane);
  } else {
    uint pool = args.pool_row;
    const device int* row_tiles = tiles + args.table;
    PackedTokens k_tokens = make_packed_tokens(
        k_words + pool * k_words_strides[0] + head * k_words_strides[1],
        k_scales + pool * k_scales_strides[0] + head * k_scales_strides[1], row_tiles);
    PackedTokens v_tokens = make_packed_tokens(
        v_words + pool * v_words_strides[0] + head * v_words_strides[1],
        v_scales + pool * v_scales_strides[0] + head * v_scales_strides[1], row_tiles);
    TokenRun run = packed_run(split, args);
    Ahead<K, Rows> ahead;
    ahead.places = load_places<SIMDGROUPS>(k_tokens, run.first_tile, run.end_tile, lane);
    load_ahead<K, V, Rows>(
        k_tokens, v_tokens, nth_place(ahead.places, simdgroup), lane, ahead);
    PageRows pages;
    if (CENTER) {
      const device half* head_means = means + pool * means_strides[0] + head * means_strides[1];
      pages = find_means(head_means, row_tiles, run, args, simdgroup, lane);
    }
    load_table<K_KIND, K_BITS>(k_params, k_table, thread_index, 32 * SIMDGROUPS);
    if (!SHARED_TABLE) {
      load_table<V_KIND, V_BITS>(v_params, v_table, thread_index, 32 * SIMDGROUPS);
    }
    load_queries<T, DK, K::PADDED, Rows, ROTATE_K, SIMDGROUPS>(
        head_q, q_strides[1], q_strides[2], q_strides[3],
        k_signs + kv_head * (ROTATE_K ? DK : 0), q_scale[0] * k_params[0], first_row, args,
        (threadgroup half*)query_words, simdgroup, lane);
    Means<DK, K::PADDED> split_means;
    if (CENTER) load_means<DK, K::PADDED>(pages, lane, split_means);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    typename K::Params k_decode = K::make_params(k_params, k_table, lane);
    typename V::Params v_decode =
        V::make_params(v_params, SHARED_TABLE ? k_table : v_table, lane);
    attend_tokens<K, V, DK, Rows, SIMDGROUPS, MASKED, CENTER>(
        shared, k_tokens, v_tokens, head_mask, k_decode, v_decode, k_params[0], args, first_row,
        run, ahead, split_means, state, sums, simdgroup, lane);
  }
  size_t partial = ending[0];
  write_partial<DV, V::PADDED, Rows, SIMDGROUPS>(
      state, sums, ending[3] ? v_params[0] : 1.0f, first_row, ending[1], ending[2],
      partial_out + partial * DV, partial_lse + partial * 2, maxima, simdgroup, lane);
}
