// A vector over its root mean square, and the one number stored besides its codes:
// `rms_normalize` and `scale_from_products` of codecs/scale_rules.py.

#include "hadamard.h"

// x: DIM contiguous elements; signs: DIM, over the channels' gains, read if ROTATE; mean:
// DIM, in the codes' basis, read if CENTER. y: element lane + 32 * i of what is left over
// its root mean square, which is returned; zeros behind the last.
template <typename T, int DIM, bool ROTATE, bool CENTER>
TQ_FUNC float load_rms_normalized(
    const device T* x, const device float* signs, const device half* mean, uint lane,
    thread float* y) {
  constexpr int PER_LANE = (DIM + 31) / 32;
  float norm_sq = 0.0f;
  load_elements<T, DIM>(x, 1, lane, y);
  rotate<DIM, ROTATE>(y, signs, lane);
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) {
    int d = int(lane) + 32 * i;
    if (ROTATE) y[i] *= tq_rsqrt(float(DIM));
    if (CENTER && d < DIM) y[i] -= float(mean[d]);
    norm_sq += y[i] * y[i];
  }
  float rms = tq_sqrt(simd_sum(norm_sq) / float(DIM));
  float divisor = rms > 0.0f ? rms : 1.0f;
  TQ_UNROLL
  for (int i = 0; i < PER_LANE; i++) y[i] = y[i] / divisor;
  return rms;
}

// RULE: the index of one in `RULES`; any other than these is "unbiased".
constant constexpr int PLAIN = 0;
constant constexpr int NORM = 1;
constant constexpr int LEAST_SQUARES = 2;

// dot: <y, c>, code_sq: ||c||^2, of a vector y of DIM elements over its rms and its
// codeword c.
template <int RULE, int DIM>
TQ_FUNC half scale_from_products(float rms, float dot, float code_sq) {
  float scale = rms;
  if (RULE == NORM) {
    scale *= tq_sqrt(float(DIM) / tq_max(code_sq, 1e-30f));
  } else if (RULE == LEAST_SQUARES) {
    scale *= dot / tq_max(code_sq, 1e-30f);
  } else if (RULE != PLAIN) {
    scale *= float(DIM) / tq_max(dot, 1e-30f);
  }
  return half(scale < 65504.0f ? scale : 65504.0f);
}
