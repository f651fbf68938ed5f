// Several sums over a simdgroup at once, in half of the shuffles or fewer.

#include "compat/base.h"

// Sums of COUNT values, a power of two up to 32: x[0] becomes one of them (see below).
// Each sum is ((x0 + x1) + (x2 + x3)) + ..., lane by lane, whatever COUNT is.
template <int COUNT>
TQ_FUNC void simd_sums(thread float* x, uint lane) {
  TQ_UNROLL
  for (int s = 0; s < 5; s++) {
    ushort stride = ushort(1 << s);
    int kept = COUNT >> (s + 1);
    if (kept == 0) {
      x[0] += simd_shuffle_xor(x[0], stride);
      continue;
    }
    bool is_upper = (lane & uint(stride)) != 0u;
    TQ_UNROLL
    for (int i = 0; i < kept; i++) {
      float mine = is_upper ? x[i + kept] : x[i];
      float theirs = is_upper ? x[i] : x[i + kept];
      x[i] = mine + simd_shuffle_xor(theirs, stride);
    }
  }
}
// The first lane that has the sum of a value: bit s of it halves COUNT for the s-th time.
template <int COUNT>
TQ_FUNC ushort simd_sums_lane(int value) {
  int lane = 0;
  TQ_UNROLL
  for (int s = 0; s < 5; s++) {
    int kept = COUNT >> (s + 1);
    if (kept > 0 && (value & kept) != 0) lane |= 1 << s;
  }
  return ushort(lane);
}
