// The Walsh-Hadamard transform inside one simdgroup. Sylvester order, not normalised:
// entry (i, j) is (-1)^popcount(i & j), as in mx.hadamard_transform.

// x: element lane + 32 * i of a vector of 32 * PER elements, PER a power of two.
template <int PER>
TQ_FUNC void simd_hadamard(thread float* x, uint lane) {
  TQ_UNROLL
  for (int i = 0; i < PER; i++) {
    TQ_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      float other = simd_shuffle_xor(x[i], ushort(step));
      x[i] = (lane & uint(step)) ? other - x[i] : x[i] + other;
    }
  }
  TQ_UNROLL
  for (int step = 1; step < PER; step *= 2) {
    TQ_UNROLL
    for (int i = 0; i < PER; i++) {
      if (i & step) continue;
      float low = x[i];
      float high = x[i + step];
      x[i] = low + high;
      x[i + step] = low - high;
    }
  }
}

// Load a vector of DIM elements in that order, zeros behind it; rotate it if ROTATE:
// signs first, then the transform. The caller applies DIM^-0.5.
template <typename T, int DIM, bool ROTATE>
TQ_FUNC void load_rot(
    const device T* x, size_t stride, const device float* signs, uint lane,
    thread float* x_rot) {
  constexpr int PER = (DIM + 31) / 32;
  TQ_UNROLL
  for (int i = 0; i < PER; i++) {
    int d = int(lane) + 32 * i;
    x_rot[i] = d < DIM ? float(x[d * stride]) : 0.0f;
    if (ROTATE) x_rot[i] *= signs[d];
  }
  if (ROTATE) simd_hadamard<PER>(x_rot, lane);
}
