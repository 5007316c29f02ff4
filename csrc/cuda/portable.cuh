// The only file that names vendor intrinsics, inline PTX or the emulator: each device primitive the
// kernels use, with its twin for machines without a GPU (see docs/architecture.md).
#pragma once

#include <cuda_runtime.h>  // in an emulated build, csrc/emulation/cuda_runtime.h

#include <cstdint>
#include <cstring>

#include "rlhf_fast/common.h"

#if !defined(RLHF_FAST_EMULATE)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
// __shared__ T name[count], and the block's dynamic shared memory as T*.
#define RLHF_FAST_SHARED(T, name, count) __shared__ T name[count]
#define RLHF_FAST_DYNAMIC_SHARED(T, name)                      \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
#else
#define RLHF_FAST_SHARED(T, name, count) \
  static char name##_key;                \
  T* name = static_cast<T*>(emulation::static_shared(&name##_key, sizeof(T) * (count)))
#define RLHF_FAST_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(emulation::dynamic_shared())
#endif

#define RLHF_FAST_DEVICE __device__ __forceinline__

// The names that the formulas of csrc/math expect of a float. They stand in this namespace, before
// those formulas are included, because argument-dependent lookup does not find them for a float.
namespace rlhf_fast {
#if !defined(RLHF_FAST_EMULATE)
RLHF_FAST_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RLHF_FAST_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float exp2(float x) { return emulation::approximate_exp2(x); }
inline float log2(float x) { return emulation::approximate_log2(x); }
#endif
// Within an ulp or so. Tokens' losses take this one: beside their memory it costs nothing.
RLHF_FAST_DEVICE float exp_of(float x) { return ::expf(x); }
RLHF_FAST_DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
RLHF_FAST_DEVICE float abs(float a) { return ::fabsf(a); }
RLHF_FAST_DEVICE float divide(float a, float b) { return a / b; }
RLHF_FAST_DEVICE float select_lt(float a, float b, float yes, float no) { return a < b ? yes : no; }
RLHF_FAST_DEVICE float at_least(float least, float a) { return a < least ? least : a; }
}  // namespace rlhf_fast

namespace rlhf_fast::gpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct alignas(16) Vec16 {
  uint32_t word[4];
};

#if !defined(RLHF_FAST_EMULATE)

RLHF_FAST_DEVICE float to_float(float x) { return x; }
RLHF_FAST_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
RLHF_FAST_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
RLHF_FAST_DEVICE void from_float(float& to, float x) { to = x; }
RLHF_FAST_DEVICE void from_float(BFloat16& to, float x) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
RLHF_FAST_DEVICE void from_float(Float16& to, float x) {
  to.bits = __half_as_ushort(__float2half_rn(x));
}

// Thread-block clusters: this block's place, a barrier for all threads of all its blocks, and
// another block's shared memory. Before sm_90 every block is its own cluster.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
RLHF_FAST_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
RLHF_FAST_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
RLHF_FAST_DEVICE float load_from_block(const float* shared, unsigned rank) {
  float x;
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [there];\n\t}"
      : "=f"(x)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "r"(rank));
  return x;
}
#else
constexpr bool kHasClusters = false;
RLHF_FAST_DEVICE unsigned cluster_rank() { return 0; }
RLHF_FAST_DEVICE void cluster_sync() { __syncthreads(); }
RLHF_FAST_DEVICE float load_from_block(const float* shared, unsigned) { return *shared; }
#endif

RLHF_FAST_DEVICE float log_natural(float x) { return logf(x); }
// Not contracted with an addition that follows.
RLHF_FAST_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }

// Streaming 16-byte access: each byte is used once, so it need not displace others from the cache.
RLHF_FAST_DEVICE Vec16 load_streaming(const void* p) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
RLHF_FAST_DEVICE void store_streaming(void* p, Vec16 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

#else

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Float16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return static_cast<float>(h);
}
inline void from_float(float& to, float x) { to = x; }
inline void from_float(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = nan ? 0x7fff : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void from_float(Float16& to, float x) {
  const _Float16 h = static_cast<_Float16>(x);
  std::memcpy(&to, &h, 2);
}
constexpr bool kHasClusters = true;
inline unsigned cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_sync() { emulation::sync_cluster(); }
inline float load_from_block(const float* shared, unsigned rank) {
  return *static_cast<float*>(emulation::cluster_address(const_cast<float*>(shared), rank));
}
inline float log_natural(float x) { return ::logf(x); }
inline float times(float a, float b) { return a * b; }
inline Vec16 load_streaming(const void* p) {
  Vec16 v;
  std::memcpy(&v, __builtin_assume_aligned(p, 16), 16);
  return v;
}
inline void store_streaming(void* p, Vec16 v) {
  std::memcpy(__builtin_assume_aligned(p, 16), &v, 16);
}

#endif

// 16 bytes of T.
template <class T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  union {
    Vec16 raw;
    T item[kSize];
  };
  RLHF_FAST_DEVICE Pack() : raw{} {}
};

}  // namespace rlhf_fast::gpu
