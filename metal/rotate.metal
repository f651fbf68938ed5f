// Queries into the codes' basis, and outputs out of it: ChannelTransform.encode_query and
// ChannelTransform.decode. A simdgroup takes a vector. The entry is at the end.

#include "hadamard.h"
#include "arguments.h"

// x: DIM elements; signs: DIM, times the channels' gains, before the transform or, if INVERSE,
// behind it.
template <typename T, int DIM, bool INVERSE>
TQ_FUNC void rotate_vector(
    const device T* x, size_t element_stride, const device float* signs, device T* out, uint lane) {
  constexpr int PER_LANE = DIM / 32;
  float y[PER_LANE];
  load_elements<T, DIM>(x, element_stride, lane, y);
  rotate<DIM, !INVERSE>(y, signs, lane);
  if (INVERSE) simd_hadamard<PER_LANE>(y, lane);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    float norm = tq_rsqrt(float(DIM));
    out[d] = T(y[i] * (INVERSE ? signs[d] * norm : norm));
  }
}

// Simdgroups: one to a vector, in the order of the output: (batch, head, token), or (batch,
// token, head) if INVERSE, as models go on with it.
TQ_ENTRY(rotate) {
  RotateArguments args = load_arguments(arguments);
  uint tokens = uint(args.tokens);
  uint heads = uint(args.heads);
  uint index = threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup;
  size_t batch = index / (heads * tokens);
  if (batch >= size_t(args.batch)) return;
  uint in_batch = index % (heads * tokens);
  size_t head = INVERSE ? in_batch % heads : in_batch / tokens;
  size_t token = INVERSE ? in_batch / heads : in_batch % tokens;
  size_t kv_head = batch * size_t(args.kv_heads) + head / (heads / uint(args.kv_heads));
  rotate_vector<T, DIM, INVERSE>(
      x + batch * x_strides[0] + head * x_strides[1] + token * x_strides[2], x_strides[3],
      signs + kv_head * DIM, out + size_t(index) * DIM, thread_index_in_simdgroup);
}
