// Spellings that differ between Metal and CUDA: the Metal side. See compat/cuda.h.
#define TQ_FUNC inline __attribute__((__always_inline__))
#define TQ_UNROLL _Pragma("clang loop unroll(full)")

TQ_FUNC half2 tq_half2(uint bits) { return as_type<half2>(bits); }
TQ_FUNC half2 tq_fma(half2 a, half2 b, half2 c) { return metal::fma(a, b, c); }
TQ_FUNC half2 tq_splat(float a) { return half2(half(a), half(a)); }
TQ_FUNC float tq_low(half2 a) { return float(a.x); }
TQ_FUNC float tq_high(half2 a) { return float(a.y); }
TQ_FUNC float tq_exp2(float a) { return metal::fast::exp2(a); }
TQ_FUNC float tq_max(float a, float b) { return metal::max(a, b); }
TQ_FUNC uint tq_min(uint a, uint b) { return metal::min(a, b); }
TQ_FUNC half2 tq_half2(float a, float b) { return half2(half(a), half(b)); }
