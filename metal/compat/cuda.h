// Spellings that differ between Metal and CUDA: the CUDA side. Address-space words are
// taken out of the sources by kernels/source.py; a simdgroup is a warp.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half half;
typedef __half2 half2;

#define TQ_FUNC __device__ __forceinline__
#define TQ_UNROLL _Pragma("unroll")

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

TQ_FUNC half2 tq_half2(uint bits) {
  half2 pair;
  memcpy(&pair, &bits, 4);
  return pair;
}
TQ_FUNC half2 tq_fma(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }
TQ_FUNC half2 tq_splat(float a) { return __float2half2_rn(a); }
TQ_FUNC float tq_low(half2 a) { return __low2float(a); }
TQ_FUNC float tq_high(half2 a) { return __high2float(a); }
TQ_FUNC float tq_exp2(float a) { return exp2f(a); }
TQ_FUNC float tq_max(float a, float b) { return fmaxf(a, b); }
TQ_FUNC uint tq_min(uint a, uint b) { return a < b ? a : b; }

TQ_FUNC float simd_shuffle(float a, ushort lane) {
  return __shfl_sync(0xffffffffu, a, lane);
}
TQ_FUNC float simd_shuffle_xor(float a, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, a, mask);
}
TQ_FUNC float simd_sum(float a) {
  for (int step = 1; step < 32; step <<= 1) a += simd_shuffle_xor(a, ushort(step));
  return a;
}
TQ_FUNC float simd_max(float a) {
  for (int step = 1; step < 32; step <<= 1) a = fmaxf(a, simd_shuffle_xor(a, ushort(step)));
  return a;
}
TQ_FUNC half2 tq_half2(float a, float b) { return __floats2half2_rn(a, b); }
