// Spellings that differ between Metal and CUDA: the CUDA side. Address-space words are
// taken out of the sources by kernels/source.py; a simdgroup is a warp.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half half;
typedef __half2 half2;

#define TQ_FUNC __device__ __forceinline__
#define TQ_UNROLL _Pragma("unroll")
#define TQ_ROLL _Pragma("unroll 1")

struct tq_uint3 {
  uint x, y, z;
};
#define threadgroup_position_in_grid (tq_uint3{blockIdx.x, blockIdx.y, blockIdx.z})
#define thread_index_in_threadgroup (threadIdx.x)
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define uint3 tq_uint3

enum class mem_flags { mem_none, mem_threadgroup };
TQ_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
TQ_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

TQ_FUNC half2 tq_half2(uint bits) {
  half2 pair;
  memcpy(&pair, &bits, 4);
  return pair;
}
TQ_FUNC uint tq_bits(half2 pair) {
  uint bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
TQ_FUNC half2 tq_half2(float a, float b) { return __floats2half2_rn(a, b); }
TQ_FUNC half2 tq_fma(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
TQ_FUNC float tq_fma(half a, half b, float c) {
  return fmaf(__half2float(a), __half2float(b), c);
}
TQ_FUNC half2 tq_splat(float a) { return __float2half2_rn(a); }
TQ_FUNC float tq_exp2(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
TQ_FUNC float tq_log2(float a) { return log2f(a); }
TQ_FUNC float tq_max(float a, float b) { return fmaxf(a, b); }
TQ_FUNC float tq_rsqrt(float a) { return rsqrtf(a); }
TQ_FUNC float tq_sqrt(float a) { return sqrtf(a); }
TQ_FUNC float tq_min(float a, float b) { return fminf(a, b); }
TQ_FUNC uint tq_float_bits(float a) { return __float_as_uint(a); }
TQ_FUNC float tq_float(uint bits) { return __uint_as_float(bits); }
TQ_FUNC float tq_round(float a) { return rintf(a); }
TQ_FUNC void tq_load4(const float* from, float* four) {
  float4 loaded = *reinterpret_cast<const float4*>(from);
  four[0] = loaded.x, four[1] = loaded.y, four[2] = loaded.z, four[3] = loaded.w;
}
TQ_FUNC void tq_load2(const half* from, half2* two) {
  uint2 loaded = *reinterpret_cast<const uint2*>(from);
  two[0] = tq_half2(loaded.x), two[1] = tq_half2(loaded.y);
}
TQ_FUNC void tq_load4(const half2* from, half2* four) {
  uint4 loaded = *reinterpret_cast<const uint4*>(from);
  four[0] = tq_half2(loaded.x), four[1] = tq_half2(loaded.y);
  four[2] = tq_half2(loaded.z), four[3] = tq_half2(loaded.w);
}
TQ_FUNC void tq_load4(const uint* from, half2* four) {
  tq_load4(reinterpret_cast<const half2*>(from), four);
}
TQ_FUNC void tq_store4(uint* to, const half2* four) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(tq_bits(four[0]), tq_bits(four[1]), tq_bits(four[2]), tq_bits(four[3]));
}
TQ_FUNC int tq_min(int a, int b) { return a < b ? a : b; }
TQ_FUNC uint tq_min(uint a, uint b) { return a < b ? a : b; }
TQ_FUNC uint tq_low_halves(uint a, uint b) { return __byte_perm(a, b, 0x5410); }
TQ_FUNC uint tq_funnel(uint low, uint high, uint shift) {
  return __funnelshift_r(low, high, shift);
}
TQ_FUNC uint tq_funnel_half(uint low, uint high, bool shifts) {
  return tq_funnel(low, high, shifts ? 16u : 0u);
}
TQ_FUNC uint tq_shift_byte(uint x, bool shifts) { return x >> (shifts ? 8u : 0u); }
TQ_FUNC uint tq_outer_halves(uint a, uint b) { return __byte_perm(a, b, 0x7610); }
TQ_FUNC uint tq_high_halves(uint a, uint b) { return __byte_perm(a, b, 0x7632); }

TQ_FUNC float simd_shuffle_xor(float a, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, a, mask);
}
TQ_FUNC uint simd_shuffle_xor(uint a, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, a, mask);
}
TQ_FUNC uint simd_shuffle(uint a, ushort lane) {
  return __shfl_sync(0xffffffffu, a, lane);
}
TQ_FUNC float simd_sum(float a) {
  for (int step = 1; step < 32; step <<= 1) a += simd_shuffle_xor(a, ushort(step));
  return a;
}
TQ_FUNC float simd_max(float a) {
  for (int step = 1; step < 32; step <<= 1) a = fmaxf(a, simd_shuffle_xor(a, ushort(step)));
  return a;
}
TQ_FUNC bool simd_any(bool a) { return __any_sync(0xffffffffu, a) != 0; }

TQ_FUNC uint tq_and_or(uint x, uint mask, uint bits) {
  uint result;  // the compiler makes two instructions of it
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}
