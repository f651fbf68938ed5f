// New tokens into the rotated basis: signs, Walsh-Hadamard transform, scale, cast. One
// simdgroup rotates one vector.

#include "hadamard.h"

// x: a vector of DIM elements, `stride` apart; out: DIM contiguous ones.
template <typename T, int DIM, bool ROTATE>
TQ_FUNC void rotate_vector(
    const device T* x, size_t stride, const device float* signs, device T* out, uint lane) {
  constexpr int PER = (DIM + 31) / 32;
  float x_rot[PER];
  load_rot<T, DIM, ROTATE>(x, stride, signs, lane, x_rot);
  float unit = ROTATE ? tq_rsqrt(float(DIM)) : 1.0f;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) {
    int d = int(lane) + 32 * i;
    if (d < DIM) out[d] = T(x_rot[i] * unit);
  }
}
