// The Walsh-Hadamard transform inside one simdgroup. Sylvester order, not normalised:
// entry (i, j) is (-1)^popcount(i & j), as in mx.hadamard_transform.

#include "compat/base.h"

// x: element lane + 32 * i of a vector of 32 * PER_LANE elements, PER_LANE a power of two.
template <int PER_LANE>
TQ_FUNC void simd_hadamard(thread float* x, uint lane) {
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    TQ_UNROLL
    for (int stride = 1; stride < 32; stride *= 2) {
      float other = simd_shuffle_xor(x[i], ushort(stride));
      x[i] = (lane & uint(stride)) ? other - x[i] : x[i] + other;
    }
  }
  TQ_UNROLL
  for (int stride = 1; stride < PER_LANE; stride *= 2) {
    TQ_UNROLL
    for (int i = 0; i < PER_LANE; i++) {
      if (i & stride) continue;
      float low = x[i];
      float high = x[i + stride];
      x[i] = low + high;
      x[i + stride] = low - high;
    }
  }
}

// Load a vector of DIM elements in that order, zeros behind it.
template <typename T, int DIM>
TQ_FUNC void load_elements(
    const device T* x, size_t element_stride, uint lane, thread float* elements) {
  TQ_UNROLL
  for (int i = 0; i < (DIM + 31) / 32; i++) {
    int d = int(lane) + 32 * i;
    elements[i] = d < DIM ? float(x[d * element_stride]) : 0.0f;
  }
}

// Rotate it if ROTATE: signs first, then the transform. The caller applies DIM^-0.5.
template <int DIM, bool ROTATE>
TQ_FUNC void rotate(thread float* x, const device float* signs, uint lane) {
  if (!ROTATE) return;
  constexpr int PER_LANE = (DIM + 31) / 32;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) x[i] *= signs[int(lane) + 32 * i];
  simd_hadamard<PER_LANE>(x, lane);
}
