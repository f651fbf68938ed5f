// Spellings that differ between Metal and CUDA: the Metal side. A source that includes
// "compat/base.h" gets compat/metal/base.h or compat/cuda/base.h (kernels/source.py).
#define TQ_FUNC inline __attribute__((__always_inline__))
#define TQ_UNROLL _Pragma("clang loop unroll(full)")
// Where instructions would be more than their cache holds.
#define TQ_ROLL _Pragma("clang loop unroll(disable)")

TQ_FUNC half2 tq_half2(uint bits) { return as_type<half2>(bits); }
TQ_FUNC uint tq_bits(half2 pair) { return as_type<uint>(pair); }
TQ_FUNC half2 tq_half2(float a, float b) { return half2(half(a), half(b)); }
TQ_FUNC half2 tq_fma(half2 a, half2 b, half2 c) { return metal::fma(a, b, c); }
// a * b + c in float; Apple's GPUs take halves as operands of it as they are.
TQ_FUNC float tq_fma(half a, half b, float c) { return metal::fma(float(a), float(b), c); }
TQ_FUNC half2 tq_splat(float a) { return half2(half(a), half(a)); }
TQ_FUNC float tq_exp2(float a) { return metal::fast::exp2(a); }
TQ_FUNC float tq_log2(float a) { return metal::precise::log2(a); }
TQ_FUNC float tq_max(float a, float b) { return metal::max(a, b); }
TQ_FUNC float tq_rsqrt(float a) { return metal::precise::rsqrt(a); }
TQ_FUNC float tq_sqrt(float a) { return metal::precise::sqrt(a); }
TQ_FUNC float tq_min(float a, float b) { return metal::min(a, b); }
TQ_FUNC uint tq_float_bits(float a) { return as_type<uint>(a); }
TQ_FUNC float tq_float(uint bits) { return as_type<float>(bits); }
TQ_FUNC float tq_round(float a) { return metal::rint(a); }
// Four floats from an address that is a multiple of 16 bytes.
TQ_FUNC void tq_load4(const threadgroup float* from, thread float* four) {
  float4 loaded = *reinterpret_cast<const threadgroup float4*>(from);
  four[0] = loaded.x, four[1] = loaded.y, four[2] = loaded.z, four[3] = loaded.w;
}
// Two pairs of halves from an address that is a multiple of 8 bytes.
TQ_FUNC void tq_load2(const device half* from, thread half2* two) {
  uint2 loaded = *reinterpret_cast<const device uint2*>(from);
  two[0] = tq_half2(loaded.x), two[1] = tq_half2(loaded.y);
}
// Four couples from an address, or to one, that is a multiple of 16 bytes.
TQ_FUNC void tq_load4(const threadgroup uint* from, thread half2* four) {
  uint4 loaded = *reinterpret_cast<const threadgroup uint4*>(from);
  four[0] = tq_half2(loaded.x), four[1] = tq_half2(loaded.y);
  four[2] = tq_half2(loaded.z), four[3] = tq_half2(loaded.w);
}
TQ_FUNC void tq_load4(const threadgroup half2* from, thread half2* four) {
  tq_load4(reinterpret_cast<const threadgroup uint*>(from), four);
}
TQ_FUNC void tq_store4(threadgroup uint* to, const thread half2* four) {
  *reinterpret_cast<threadgroup uint4*>(to) =
      uint4(tq_bits(four[0]), tq_bits(four[1]), tq_bits(four[2]), tq_bits(four[3]));
}
TQ_FUNC int tq_min(int a, int b) { return metal::min(a, b); }
TQ_FUNC uint tq_min(uint a, uint b) { return metal::min(a, b); }
// Halves of registers are registers to Apple's GPUs: these move them, and shift nothing.
TQ_FUNC uint tq_two_halves(ushort low, ushort high) {
  return as_type<uint>(ushort2(low, high));
}
TQ_FUNC uint tq_low_halves(uint a, uint b) {
  return tq_two_halves(as_type<ushort2>(a).x, as_type<ushort2>(b).x);
}
TQ_FUNC uint tq_outer_halves(uint a, uint b) {
  return tq_two_halves(as_type<ushort2>(a).x, as_type<ushort2>(b).y);
}
TQ_FUNC uint tq_high_halves(uint a, uint b) {
  return tq_two_halves(as_type<ushort2>(a).y, as_type<ushort2>(b).y);
}

// The 32 bits from bit `shift` < 32 of low on, which high follows.
TQ_FUNC uint tq_funnel(uint low, uint high, uint shift) {
  return (low >> shift) | ((high << 1) << (31u - shift));
}
// The same from bit 16 on if `shifts`, else from bit 0 on.
TQ_FUNC uint tq_funnel_half(uint low, uint high, bool shifts) {
  return shifts ? tq_two_halves(as_type<ushort2>(low).y, as_type<ushort2>(high).x) : low;
}
// x shifted right by 8 if `shifts`. Apple's GPUs shift by constants twice as fast.
TQ_FUNC uint tq_shift_byte(uint x, bool shifts) { return shifts ? x >> 8 : x; }
// (x & mask) | bits
TQ_FUNC uint tq_and_or(uint x, uint mask, uint bits) { return (x & mask) | bits; }
