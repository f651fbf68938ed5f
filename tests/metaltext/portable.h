// What of Metal our kernels use, for clang as C++14 (portable.py): address spaces that do not
// convert, vectors, functions. It computes nothing: what has no builtin is declared only, or,
// where code is generated to be counted (counts.py), an instruction named in a comment.
#pragma once

#define device __attribute__((address_space(1)))
#define threadgroup __attribute__((address_space(3)))
#define constant __attribute__((address_space(4)))
#define thread

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef decltype(sizeof(0)) size_t;
typedef long int64_t;
typedef uint uint32_t;
typedef int int32_t;
typedef ushort uint16_t;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat16_t;

typedef half half2 __attribute__((ext_vector_type(2)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef ushort ushort2 __attribute__((ext_vector_type(2)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
// C++ has no T(a, b) of these. A name that no parenthesis follows stays a type.
#define half2(...) half2{__VA_ARGS__}
#define ushort2(...) ushort2{__VA_ARGS__}
#define uint4(...) uint4{__VA_ARGS__}

template <typename To, typename From>
inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, x);
}

namespace metal {
template <typename T> inline T fma(T a, T b, T c) { return __builtin_elementwise_fma(a, b, c); }
template <typename T> inline T min(T a, T b) { return b < a ? b : a; }
template <typename T> inline T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float rint(float a) { return __builtin_rintf(a); }
namespace fast {
inline float exp2(float a) { return __builtin_elementwise_exp2(a); }
}
namespace precise {
inline float log2(float a) { return __builtin_elementwise_log2(a); }
inline float sqrt(float a) { return __builtin_sqrtf(a); }
inline float rsqrt(float a) { return 1.0f / __builtin_sqrtf(a); }
}
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
}
using namespace metal;

#ifdef __AMDGCN__
// Each stands in the code once, as an instruction that cannot move, as on a GPU.
#define MSL_LANES __attribute__((convergent, always_inline)) inline
MSL_LANES void threadgroup_barrier(mem_flags) { asm volatile("; BARRIER" ::: "memory"); }
MSL_LANES void simdgroup_barrier(mem_flags) { asm volatile("; SIMD_BARRIER" ::: "memory"); }
template <typename T>
MSL_LANES T msl_shuffle(T x, uint lane) {
  T y;
  asm volatile("; SHUFFLE %0 %1 %2" : "=v"(y) : "v"(x), "v"(lane));
  return y;
}
MSL_LANES float simd_sum(float x) {
  float y;
  asm volatile("; SIMD_REDUCE %0 %1" : "=v"(y) : "v"(x));
  return y;
}
MSL_LANES float simd_max(float x) { return simd_sum(x); }
MSL_LANES bool simd_any(bool x) {
  uint y;
  asm volatile("; SIMD_VOTE %0 %1" : "=v"(y) : "v"(uint(x)));
  return y != 0u;
}
MSL_LANES void msl_multiply(half2 a, half2 b, float& c, float& d) {
  asm volatile("; MATRIX %0 %1 %2 %3" : "+v"(c), "+v"(d) : "v"(a), "v"(b));
}
#define thread_index_in_threadgroup (uint(__builtin_amdgcn_workitem_id_x()))
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31u)
// The same of all its lanes, which a compiler for Metal knows and this one does not.
#define simdgroup_index_in_threadgroup \
  (uint(__builtin_amdgcn_readfirstlane(int(thread_index_in_threadgroup >> 5))))
#define threadgroup_position_in_grid                                           \
  (uint3{uint(__builtin_amdgcn_workgroup_id_x()),                              \
         uint(__builtin_amdgcn_workgroup_id_y()),                              \
         uint(__builtin_amdgcn_workgroup_id_z())})
#define kernel __attribute__((amdgpu_kernel))
#else
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <typename T> T msl_shuffle(T x, uint lane);
float simd_sum(float x);
float simd_max(float x);
bool simd_any(bool x);
void msl_multiply(half2 a, half2 b, float& c, float& d);
extern const uint thread_index_in_threadgroup, thread_index_in_simdgroup;
extern const uint simdgroup_index_in_threadgroup;
extern const uint3 threadgroup_position_in_grid;
#define kernel
#endif

template <typename T> inline T simd_shuffle(T x, ushort lane) { return msl_shuffle(x, lane); }
template <typename T>
inline T simd_shuffle_xor(T x, ushort mask) {
  return msl_shuffle(x, thread_index_in_simdgroup ^ mask);
}

template <typename T>
void msl_store(device T* to, const thread T& from);

template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  T elements[ROWS * COLUMNS / 32];
  thread T* thread_elements() { return elements; }
};
inline void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<float, 8, 8>& d, const thread simdgroup_matrix<half, 8, 8>& a,
    const thread simdgroup_matrix<half, 8, 8>& b, const thread simdgroup_matrix<float, 8, 8>& c) {
  half2 left = {a.elements[0], a.elements[1]};
  half2 right = {b.elements[0], b.elements[1]};
  d = c;
  msl_multiply(left, right, d.elements[0], d.elements[1]);
}
