// Vectors to trellis codes and one scale each: equalise, rotate, centre, normalise, search,
// pack. The definition is ChannelTransform.encode in transform.py, Trellis.encode in
// codecs/trellis.py and best_windows in codecs/viterbi.py. One simdgroup encodes VECTORS
// vectors: forward one by one, back side by side. The entry is at the end.

#include "scale_rules.h"
#include "trellis_search.h"
#include "arguments.h"

// Word `index` of a stream of pairs of EVEN + ODD bits: each window's own bits, its lowest.
template <int EVEN, int ODD>
TQ_FUNC uint pack_windows(const threadgroup float* windows, int index) {
  int pair = 32 * index / (EVEN + ODD);
  int bit = pair * (EVEN + ODD) - 32 * index;  // of the word; the first pair may begin before
  uint word = 0u;
  for (; bit < 32; bit += EVEN + ODD, pair++) {
    uint even = uint(windows[2 * pair]) & ((1u << EVEN) - 1u);
    uint odd = uint(windows[2 * pair + 1]) & ((1u << ODD) - 1u);
    uint code = even | (odd << EVEN);
    word |= bit >= 0 ? code << bit : code >> -bit;
  }
  return word;
}

// x: the first of the vectors, DIM contiguous elements, vector v x_offsets[v] elements from
// it; signs and mean as for encode_scalar.metal, with offsets likewise. vector_count: how
// many of VECTORS there are; the others repeat one. table: 256 levels by window of even
// elements and 256 of odd ones as the search sees them, the unit they are in, and 512 as they
// are, likewise. EVEN and ODD: own bits. Scratch of
// this simdgroup's own: steps (VECTORS * COUNT), costs (2 * MAX_STATES), survivors (VECTORS *
// COUNT * 4). words and scales: of the first vector.
template <
    typename T, int DIM, int COUNT, int EVEN, int ODD, int VECTORS, bool ROTATE, bool CENTER,
    int RULE>
TQ_FUNC void encode_vectors(
    const device T* x, const device float* signs, const device half* mean,
    const thread size_t* x_offsets, const thread size_t* sign_offsets,
    const thread size_t* mean_offsets, int vector_count, const device float* table,
    threadgroup float* steps, threadgroup float* costs, threadgroup uint* survivors,
    device uint* words, device half* scales, uint lane) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  constexpr int STEPS_PER_LANE = COUNT / 32;
  constexpr int STEPS_BEFORE_END =
      tq_overlap(EVEN + ODD) < COUNT / 2 ? tq_overlap(EVEN + ODD) : COUNT / 2;
  constexpr int LANES_PER_VECTOR = 32 / VECTORS;
  constexpr int SURVIVOR_WORDS = COUNT * 4;
  constexpr int WORDS = COUNT * (EVEN + ODD) / 64;
  float level_unit = table[512];
  LaneBranches even = make_branches<EVEN, ODD>(table, lane);
  LaneBranches odd = make_branches<ODD, EVEN>(table + 256, lane);
  float y[VECTORS][STEPS_PER_LANE];
  float rms[VECTORS];
  uint end_states[VECTORS];
  TQ_UNROLL
  for (int v = 0; v < VECTORS; v++) {
    rms[v] = load_rms_normalized<T, DIM, ROTATE, CENTER>(
        x + x_offsets[v], signs + sign_offsets[v], mean + mean_offsets[v], lane, y[v]);
    TQ_UNROLL
    for (int i = 0; i < STEPS_PER_LANE; i++) {
      if (i >= PER_LANE) y[v][i] = 0.0f;
      float target = tq_round(y[v][i] / level_unit);
      steps[COUNT * v + COUNT - 1 - (int(lane) + 32 * i)] = tq_min(tq_max(target, -CLIP), CLIP);
    }
    // Round the end once, to see which state the circle goes through there.
    start_costs<ODD, EVEN>(costs, true, 0u, lane);
    search_forward<COUNT, EVEN, ODD>(
        steps + COUNT * v, COUNT - STEPS_BEFORE_END, 2 * STEPS_BEFORE_END, even, odd, costs,
        survivors + SURVIVOR_WORDS * v, lane);
    end_states[v] = cheapest_state<ODD, EVEN>(costs, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  // From here on LANES_PER_VECTOR lanes go back for each vector.
  int own_vector = int(lane) / LANES_PER_VECTOR;
  const threadgroup uint* own_survivors = survivors + SURVIVOR_WORDS * own_vector;
  uint state = end_states[0];
  TQ_UNROLL
  for (int v = 1; v < VECTORS; v++) state = own_vector == v ? end_states[v] : state;
  for (int t = 2 * STEPS_BEFORE_END - 1; t > STEPS_BEFORE_END; t -= 2) {
    state = traced_window<EVEN, ODD>(own_survivors, t, state) >> EVEN;
    state = traced_window<ODD, EVEN>(own_survivors, t - 1, state) >> ODD;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int v = 0; v < VECTORS; v++) {
    uint boundary_state = simd_shuffle(state, ushort(LANES_PER_VECTOR * v));
    start_costs<ODD, EVEN>(costs, false, boundary_state, lane);
    search_forward<COUNT, EVEN, ODD>(
        steps + COUNT * v, 0, COUNT, even, odd, costs, survivors + SURVIVOR_WORDS * v, lane);
  }
  // Windows take the place of the targets, in the order of elements.
  threadgroup float* own_windows = steps + COUNT * own_vector;
  for (int i = 0; i < STEPS_PER_LANE; i++) {
    TQ_UNROLL
    for (int e = 0; e < 32; e += 2) {
      int d = 32 * i + e;
      uint even_window = traced_window<EVEN, ODD>(own_survivors, COUNT - 1 - d, state);
      state = even_window >> EVEN;
      uint odd_window = traced_window<ODD, EVEN>(own_survivors, COUNT - 2 - d, state);
      state = odd_window >> ODD;
      if (int(lane) % LANES_PER_VECTOR == 0) {
        own_windows[d] = float(even_window);
        own_windows[d + 1] = float(odd_window);
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  TQ_UNROLL
  for (int v = 0; v < VECTORS; v++) {
    if (v >= vector_count) break;
    const threadgroup float* windows = steps + COUNT * v;
    float dot = 0.0f;
    float code_sq = 0.0f;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      int d = int(lane) + 32 * i;
      uint window = uint(windows[d]);
      float level = d < DIM ? table[513u + (lane % 2u) * 256u + window] : 0.0f;
      dot += y[v][i] * level;
      code_sq += level * level;
    }
    for (int w = int(lane); w < WORDS; w += 32) {
      words[size_t(WORDS) * v + w] = pack_windows<EVEN, ODD>(windows, w);
    }
    dot = simd_sum(dot);
    code_sq = simd_sum(code_sq);
    if (lane == 0u) scales[v] = scale_from_products<RULE, DIM>(rms[v], dot, code_sq);
  }
}

// Simdgroups: one to VECTORS vectors, in the order (batch, head, token).
TQ_ENTRY(encode_trellis) {
  // Read four at a time, which have to lie on multiples of 16 bytes.
  threadgroup float4 step_quads[COUNT * VECTORS * SIMDGROUPS / 4];
  threadgroup float4 cost_quads[2 * MAX_STATES * SIMDGROUPS / 4];
  threadgroup uint survivors[4 * COUNT * VECTORS * SIMDGROUPS];
  threadgroup float* steps = (threadgroup float*)step_quads;
  threadgroup float* costs = (threadgroup float*)cost_quads;
  EncodeArguments args = load_arguments(arguments);
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  // 32 bits are enough to count vectors, and GPUs divide them much faster than 64.
  uint tokens = uint(args.tokens);
  uint heads = uint(args.kv_heads);
  uint vectors = uint(args.batch) * heads * tokens;
  uint first_vector =
      (threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup) * uint(VECTORS);
  if (first_vector >= vectors) return;
  size_t first = first_vector;
  int vector_count = int(tq_min(vectors - first_vector, uint(VECTORS)));
  size_t x_offsets[VECTORS];
  size_t sign_offsets[VECTORS];
  size_t mean_offsets[VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    uint vector = first_vector + uint(v < vector_count ? v : 0);
    uint all_heads = vector / tokens;
    size_t token = vector - all_heads * tokens;
    size_t batch = all_heads / heads;
    size_t head = all_heads % heads;
    size_t page = uint(args.first + int(token)) / uint(args.page);
    x_offsets[v] = batch * x_strides[0] + head * x_strides[1] + token * x_strides[2];
    sign_offsets[v] = ROTATE ? size_t(all_heads) * DIM : 0;
    mean_offsets[v] = CENTER ? batch * means_strides[0] + head * means_strides[1]
                                   + page * means_strides[2]
                             : 0;
  }
  encode_vectors<T, DIM, COUNT, EVEN, ODD, VECTORS, ROTATE, CENTER, RULE>(
      x, signs, means, x_offsets, sign_offsets, mean_offsets, vector_count, table,
      steps + COUNT * VECTORS * simdgroup, costs + 2 * MAX_STATES * simdgroup,
      survivors + 4 * COUNT * VECTORS * simdgroup,
      words + first * (COUNT * (EVEN + ODD) / 64), scales + first, lane);
}
