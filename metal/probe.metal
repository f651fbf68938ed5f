// What the other kernels take for granted of a GPU, shown by the same words: lanes, fragments,
// sums of products, halves, threadgroup memory. What must come out is
// mlx_turboquant/proof/facts.py's. The entry is at the end.

#include "compat/base.h"
#include "compat/fragments.h"
#include "arguments.h"

// Rows of the left operand of a product, and its elements; rows of the right one.
constant constexpr int PROBE_SIZE = 16;
constant constexpr int PROBE_ROWS = 8;

// Each thread's word of threadgroup memory is read by another: how many of its own are wrong.
template <int WORDS, int THREADS>
TQ_FUNC float wrong_words(threadgroup uint* words, uint seed, uint index) {
  for (uint i = index; i < uint(WORDS); i += uint(THREADS)) words[i] = i * 2654435761u + seed;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint wrong = 0u;
  for (uint i = index; i < uint(WORDS); i += uint(THREADS)) {
    uint other = uint(WORDS) - 1u - i;
    wrong += words[other] == other * 2654435761u + seed ? 0u : 1u;
  }
  return float(wrong);
}

// What a simdgroup's lanes hear of each other: out[THREADS * fact].
template <int THREADS>
TQ_FUNC void show_lanes(device float* out, uint lane) {
  out[0] = simd_sum(1.0f);
  out[THREADS] = simd_max(float((lane * 7u + 3u) % 32u));
  out[2 * THREADS] = (simd_any(lane == 17u) ? 1.0f : 0.0f) + (simd_any(lane > 31u) ? 2.0f : 0.0f);
  out[3 * THREADS] = float(simd_shuffle(lane, ushort((lane * 5u + 3u) % 32u)));
  TQ_UNROLL
  for (int bit = 0; bit < 5; bit++) {
    out[(4 + bit) * THREADS] = simd_shuffle_xor(float(lane), ushort(1 << bit));
  }
}

// left (16, 8 pairs) times right (8, 16), transposed, as logits are made: left is tokens by
// elements. The queries take the way that matrix_rows.h gives them.
TQ_FUNC void show_logits(
    const device uint* left, const device half* right, float start, threadgroup half2* queries,
    device float* out, uint lane) {
  threadgroup half* halves = reinterpret_cast<threadgroup half*>(queries);
  for (uint i = lane; i < uint(PROBE_ROWS * PROBE_SIZE); i += 32u) {
    int row = int(i) / PROBE_SIZE;
    uint k = i % uint(PROBE_SIZE);
    uint owner = tq_query_lane(uint(row), k % 8u / 2u, k % 2u);
    halves[2u * (2u * owner + k / 8u) + uint(tq_query_half(row, int(k % 2u)))] = right[i];
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const device uint* low = left + tq_major(lane) * 8u + tq_minor(lane);
  const device uint* high = low + 8 * 8;
  float sums[4] = {start, start, start, start};
  tq_logits_product(
      sums, queries[2u * lane], queries[2u * lane + 1u], tq_half2(low[0]), tq_half2(low[4]),
      tq_half2(high[0]), tq_half2(high[4]));
  for (int i = 0; i < 4; i++) out[32 * i] = sums[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The same as values are added up: left is elements by tokens, weights (16, 4 pairs) are tokens
// by rows.
TQ_FUNC void show_values(
    const device uint* left, const device uint* weights, float start, device float* out,
    uint lane) {
  const device uint* even = left + tq_major(lane) * 8u + tq_minor(lane);
  const device uint* odd = even + 8 * 8;
  const device uint* own = weights + tq_major(lane) * 4u + tq_minor(lane);
  float sums[4] = {start, start, start, start};
  tq_values_product(
      sums, tq_half2(even[0]), tq_half2(odd[0]), tq_half2(even[4]), tq_half2(odd[4]),
      tq_weights(tq_half2(own[0])), tq_weights(tq_half2(own[8 * 4])));
  for (int i = 0; i < 4; i++) out[32 * i] = sums[i];
}

// One threadgroup. halves, floats and powers have a number for each lane; left, right, weights
// and starts are `cases` products. lanes: float (17, THREADS); products: float (cases, 2, 4, 32).
TQ_ENTRY(probe) {
  threadgroup half2 queries[64];
  threadgroup uint words[WORDS];
  ProbeArguments args = load_arguments(arguments);
  uint index = thread_index_in_threadgroup;
  uint lane = thread_index_in_simdgroup;
  uint simdgroup = simdgroup_index_in_threadgroup;
  device float* own = lanes + index;
  own[0] = float(lane);
  own[THREADS] = float(simdgroup);
  own[2 * THREADS] = wrong_words<WORDS, THREADS>(words, uint(args.seed), index);
  own[3 * THREADS] = float(halves[lane]);
  own[4 * THREADS] = float(half(floats[lane]));
  own[5 * THREADS] = tq_exp2(powers[lane]);
  own[6 * THREADS] = float(tq_major(lane));
  own[7 * THREADS] = float(tq_minor(lane));
  show_lanes<THREADS>(own + 8 * THREADS, lane);
  if (simdgroup > 0u) return;
  for (int i = 0; i < args.cases; i++) {
    const device uint* of_left = left + 128 * i;
    device float* out = products + 256 * i + int(lane);
    show_logits(of_left, right + 128 * i, starts[i], queries, out, lane);
    show_values(of_left, weights + 64 * i, starts[i], out + 128, lane);
  }
}
