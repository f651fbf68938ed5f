// Queries into the codes' basis, and outputs out of it: ChannelTransform.encode_query and
// ChannelTransform.decode. A simdgroup takes TOKENS tokens of a head. The entry is at the end.

#include "hadamard.h"
#include "arguments.h"

// x: `count` vectors of DIM elements; signs: DIM, times the channels' gains, before the transform
// or, if INVERSE, behind it. All are loaded before any is rotated.
template <typename T, int DIM, int TOKENS, bool INVERSE>
TQ_FUNC void rotate_vectors(
    const device T* x, size_t token_stride, size_t element_stride, int count,
    const device float* signs, device T* out, size_t out_stride, uint lane) {
  constexpr int PER_LANE = DIM / 32;
  float y[TOKENS * PER_LANE];
  float own_signs[PER_LANE];
  TQ_UNROLL
  for (int t = 0; t < TOKENS; t++) {
    const device T* vector = x + size_t(tq_min(t, count - 1)) * token_stride;
    load_elements<T, DIM>(vector, element_stride, lane, y + PER_LANE * t);
  }
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    own_signs[i] = signs[int(lane) + 32 * i] * tq_rsqrt(float(DIM));
  }
  TQ_UNROLL
  for (int t = 0; t < TOKENS; t++) {
    thread float* of_token = y + PER_LANE * t;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) of_token[i] *= INVERSE ? 1.0f : own_signs[i];
    simd_hadamard<PER_LANE>(of_token, lane);
    if (t >= count) continue;
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      float element = of_token[i] * (INVERSE ? own_signs[i] : 1.0f);
      out[size_t(t) * out_stride + lane + 32u * uint(i)] = T(element);
    }
  }
}

// Simdgroups: one to every TOKENS tokens of a head, in the order (batch, head, tokens). out:
// (batch, head, token), or (batch, token, head) if INVERSE, as models go on with it.
TQ_ENTRY(rotate) {
  RotateArguments args = load_arguments(arguments);
  uint tokens = uint(args.tokens);
  uint heads = uint(args.heads);
  uint runs = (tokens + uint(TOKENS) - 1u) / uint(TOKENS);
  uint index = threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup;
  uint row = index / runs;
  size_t token = index % runs * uint(TOKENS);
  size_t batch = row / heads;
  if (batch >= size_t(args.batch)) return;
  size_t head = row % heads;
  size_t kv_head = batch * size_t(args.kv_heads) + head / (heads / uint(args.kv_heads));
  size_t vector = INVERSE ? (batch * tokens + token) * heads + head : size_t(row) * tokens + token;
  rotate_vectors<T, DIM, TOKENS, INVERSE>(
      x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2], x_strides[2],
      x_strides[3], int(tokens) - int(token), signs + kv_head * DIM, out + vector * DIM,
      INVERSE ? size_t(heads) * DIM : size_t(DIM), thread_index_in_simdgroup);
}
