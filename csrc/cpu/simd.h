// One vector of floats in three bodies: AVX-512, AVX2 and portable. Each file in this folder is
// compiled once per body with RLHF_FAST_ISA set to the name of its namespace; nothing here may have
// external linkage outside that namespace, or the linker could pick an AVX-512 copy for all.
#pragma once

#include <cstdint>
#include <cstring>

#include "rlhf_fast/common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rlhf_fast::RLHF_FAST_ISA {

#define RLHF_FAST_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
  Vec() = default;
  RLHF_FAST_INLINE Vec(__m512 x) : v(x) {}
  RLHF_FAST_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};
RLHF_FAST_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec divide(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
RLHF_FAST_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
// a > b ? a : b, so a NaN in `a` is passed over and one in `b` is kept; `min` likewise
RLHF_FAST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
}
RLHF_FAST_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a.v, 8); }
RLHF_FAST_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
// The n that brings x * 2^-n into [sqrt(1/2), sqrt(2)).
RLHF_FAST_INLINE Vec exponent_near(Vec x) { return _mm512_getexp_ps((x * Vec(1.41421356f)).v); }
// The lanes of `a` from n on, then the first n of `fill`.
template <int n>
RLHF_FAST_INLINE Vec shift_down(Vec a, Vec fill) {
  return _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(fill.v), _mm512_castps_si512(a.v), n));
}
RLHF_FAST_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a.v); }
RLHF_FAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
RLHF_FAST_INLINE Vec load(const bool* p) {  // 0 or 1
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
}
RLHF_FAST_INLINE Vec load(const BFloat16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
RLHF_FAST_INLINE Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
RLHF_FAST_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
RLHF_FAST_INLINE void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 8));
}
#if defined(__AVX512BF16__)
RLHF_FAST_INLINE void store(BFloat16* p, Vec a) {
  const __m256bh x = _mm512_cvtneps_pbh(a.v);
  std::memcpy(static_cast<void*>(p), &x, sizeof x);
}
#else
// The bfloat16 in the upper half of each lane; the lower half is noise.
RLHF_FAST_INLINE __m512i rounded_to_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
}
RLHF_FAST_INLINE void store(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bf16(a), 16)));
}
#endif

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
  Vec() = default;
  RLHF_FAST_INLINE Vec(__m256 x) : v(x) {}
  RLHF_FAST_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};
RLHF_FAST_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec divide(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
RLHF_FAST_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
RLHF_FAST_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
RLHF_FAST_INLINE Vec round(Vec a) { return _mm256_round_ps(a.v, 8); }
RLHF_FAST_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
RLHF_FAST_INLINE Vec exponent_near(Vec x) {
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256((x * Vec(1.41421356f)).v), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(127)));
}
template <int n>
RLHF_FAST_INLINE Vec shift_down(Vec a, Vec fill) {
  const __m256i low = _mm256_castps_si256(a.v);
  const __m256i high = _mm256_castps_si256(_mm256_permute2f128_ps(a.v, fill.v, 0x21));
  if constexpr (n == 4) return _mm256_castsi256_ps(high);
  return _mm256_castsi256_ps(_mm256_alignr_epi8(high, low, 4 * (n % 4)));
}
RLHF_FAST_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a.v); }
RLHF_FAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
RLHF_FAST_INLINE Vec load(const bool* p) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
}
RLHF_FAST_INLINE Vec load(const BFloat16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
RLHF_FAST_INLINE Vec load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
RLHF_FAST_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
RLHF_FAST_INLINE void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 8));
}
RLHF_FAST_INLINE void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

#else

// The compiler's own vectors: SSE2, NEON or whatever the machine's baseline has.
struct Vec {
  static constexpr int kWidth = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
  Floats v;
  Vec() = default;
  RLHF_FAST_INLINE Vec(Floats x) : v(x) {}
  RLHF_FAST_INLINE explicit Vec(float x) : v(Floats{x, x, x, x}) {}
  RLHF_FAST_INLINE explicit Vec(Bits x) { std::memcpy(&v, &x, sizeof v); }
  RLHF_FAST_INLINE Bits bits() const {
    Bits b;
    std::memcpy(&b, &v, sizeof b);
    return b;
  }
};
RLHF_FAST_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
RLHF_FAST_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
RLHF_FAST_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
RLHF_FAST_INLINE Vec divide(Vec a, Vec b) { return Vec(a.v / b.v); }
RLHF_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(a.v * b.v + c.v); }
RLHF_FAST_INLINE Vec abs(Vec a) { return Vec(a.bits() & 0x7fffffffu); }
RLHF_FAST_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return Vec(a.v < b.v ? yes.v : no.v);
}
RLHF_FAST_INLINE Vec max(Vec a, Vec b) { return select_lt(b, a, a, b); }
RLHF_FAST_INLINE Vec min(Vec a, Vec b) { return select_lt(a, b, a, b); }
RLHF_FAST_INLINE Vec round(Vec a) {
  const Vec magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  return (a + magic) - magic;
}
RLHF_FAST_INLINE Vec scale_by_power(Vec a, Vec n) {
  const Vec biased = n + Vec(8388608.0f + 127.0f);  // the exponent lands in the low mantissa
  return a * Vec(biased.bits() << 23);
}
RLHF_FAST_INLINE Vec exponent_near(Vec x) {
  const Vec::Bits biased = (x * Vec(1.41421356f)).bits() >> 23;
  return Vec(__builtin_convertvector(biased, Vec::Floats)) - Vec(127.0f);
}
template <class T>
RLHF_FAST_INLINE Vec::Bits load_halves(const T* p) {
  Vec::Halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Vec::Bits);
}
template <class T>
RLHF_FAST_INLINE void store_halves(T* p, Vec::Bits bits) {
  const Vec::Halves h = __builtin_convertvector(bits, Vec::Halves);
  std::memcpy(static_cast<void*>(p), &h, sizeof h);
}
template <int n>
RLHF_FAST_INLINE Vec shift_down(Vec a, Vec fill) {
  float lanes[2 * Vec::kWidth];
  std::memcpy(lanes, &a.v, sizeof a.v);
  std::memcpy(lanes + Vec::kWidth, &fill.v, sizeof fill.v);
  std::memcpy(&a.v, lanes + n, sizeof a.v);
  return a;
}
RLHF_FAST_INLINE float first_lane(Vec a) { return a.v[0]; }
RLHF_FAST_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof a.v);
  return a;
}
RLHF_FAST_INLINE Vec load(const bool* p) {
  return Vec(Vec::Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])});
}
RLHF_FAST_INLINE Vec load(const BFloat16* p) { return Vec(load_halves(p) << 16); }
RLHF_FAST_INLINE Vec load(const Float16* p) {
  const Vec::Bits h = load_halves(p);
  const Vec::Bits sign = (h & 0x8000u) << 16;
  // Moving the exponent and multiplying by 2^112 is exact for normal and subnormal halves.
  const Vec finite = Vec((h & 0x7fffu) << 13) * Vec(5.192296858534828e33f);
  const Vec::Bits special = (h & 0x7c00u) == 0x7c00u ? Vec::Bits{} + 0x7f800000u : Vec::Bits{};
  return Vec(finite.bits() | special | sign);
}
RLHF_FAST_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
RLHF_FAST_INLINE void store(BFloat16* p, Vec a) {
  const Vec::Bits bits = a.bits();
  const Vec::Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  store_halves(p, (bits & 0x7fffffffu) > 0x7f800000u ? Vec::Bits{} + 0x7fc0u : rounded);
}
RLHF_FAST_INLINE void store(Float16* p, Vec a) {
  const Vec::Bits sign = a.bits() >> 16 & 0x8000u;
  const Vec::Bits bits = a.bits() & 0x7fffffffu;
  Vec::Bits half = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  // Below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits.
  half = bits < 0x38800000u ? (Vec(bits) + Vec(0.5f)).bits() - 0x3f000000u : half;
  half = bits >= 0x477ff000u ? Vec::Bits{} + 0x7c00u : half;  // 65520 and above: infinity
  half = bits > 0x7f800000u ? Vec::Bits{} + 0x7e00u : half;
  store_halves(p, half | sign);
}

#endif

// As the formulas of csrc/math have them for one number: a NaN in `a` stays.
RLHF_FAST_INLINE Vec higher(Vec a, Vec b) { return max(b, a); }
RLHF_FAST_INLINE Vec lower(Vec a, Vec b) { return min(b, a); }

// The upper half of the lanes onto the lower half, and so on.
#if defined(__AVX2__)
RLHF_FAST_INLINE float sum_of(__m128 a) {
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
RLHF_FAST_INLINE float sum_of(__m256 a) {
  return sum_of(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
#if defined(__AVX512F__)
RLHF_FAST_INLINE float sum_of(__m512 a) {
  return sum_of(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
#endif
RLHF_FAST_INLINE float sum_of(Vec a) { return sum_of(a.v); }
#else
RLHF_FAST_INLINE float sum_of(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
#endif
RLHF_FAST_INLINE float max_of(Vec a) {
  float lanes[Vec::kWidth];
  std::memcpy(lanes, &a, sizeof lanes);
  float m = lanes[0];
  for (int i = 1; i < Vec::kWidth; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
}

// The first `count` elements, zeros after them; and the reverse.
template <class T>
RLHF_FAST_INLINE Vec load_part(const T* p, int64_t count) {
  T padded[Vec::kWidth] = {};
  std::memcpy(padded, p, size_t(count) * sizeof(T));
  return load(static_cast<const T*>(padded));
}
template <class T>
RLHF_FAST_INLINE void store_part(T* p, Vec a, int64_t count) {
  T padded[Vec::kWidth];
  store(padded, a);
  std::memcpy(p, padded, size_t(count) * sizeof(T));
}
template <class T>
RLHF_FAST_INLINE float load_one(const T* p) {
  float lanes[Vec::kWidth];
  store(lanes, load_part(p, 1));
  return lanes[0];
}
template <class T>
RLHF_FAST_INLINE void store_one(T* p, float x) {
  store_part(p, Vec(x), 1);
}
// The first `count` lanes of a, the others set to `fill`.
RLHF_FAST_INLINE Vec keep_lanes(Vec a, int64_t count, float fill) {
  float lanes[Vec::kWidth];
  store(lanes, a);
  for (int64_t i = count; i < Vec::kWidth; ++i) lanes[i] = fill;
  return load(static_cast<const float*>(lanes));
}
// A vector formula for one number, so that a label's value is bitwise the one its lane would give.
template <class Formula>
RLHF_FAST_INLINE float in_one_lane(float x, Formula formula) {
  float lanes[Vec::kWidth];
  store(lanes, formula(Vec(x)));
  return lanes[0];
}

// Two vectors of neighbouring elements. Which lane holds which element is up to the dtype, the same
// for every pointer; store_pair puts them back.
template <class T>
RLHF_FAST_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p);
  b = load(p + Vec::kWidth);
}
template <class T>
RLHF_FAST_INLINE void store_pair(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + Vec::kWidth, b);
}
#if defined(__AVX512F__)
// Even and odd elements: one instruction each instead of two.
RLHF_FAST_INLINE void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  const __m512i x = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
}
#if defined(__AVX512BF16__)
RLHF_FAST_INLINE void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(b.v, a.v);  // all of a, then all of b
  __m512i x;
  std::memcpy(static_cast<void*>(&x), &halves, sizeof x);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, x));
}
#else
RLHF_FAST_INLINE void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m512i even = _mm512_srli_epi32(rounded_to_bf16(a), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded_to_bf16(b)));
}
#endif
#endif

RLHF_FAST_INLINE Vec at_least(float least, Vec a) { return max(Vec(least), a); }  // keeps NaN

// Asks for the memory that a loop over p[0, count) will need a little later, beyond what the
// processor fetches by itself: it stops at pages. Past the end this is harmless.
template <int count, int kAhead = 8192, class T>
RLHF_FAST_INLINE void prefetch(const T* p) {
  constexpr int kLine = 64;  // bytes, as kAhead
  for (int i = 0; i < count * int(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + i);
  }
}

// Asks for p[0, count) to be brought into the second-level cache, for long after this loop.
template <int count, class T>
RLHF_FAST_INLINE void prefetch_far(const T* p) {
  constexpr int kLine = 64;
  for (int i = 0; i < count * int(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, 0, 2);
  }
}

// Calls body with a null pointer of the element type.
template <class Body>
RLHF_FAST_INLINE void dispatch_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(static_cast<float*>(nullptr));
    case DType::kFloat16: return body(static_cast<Float16*>(nullptr));
    case DType::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
  }
}

template <class T>
RLHF_FAST_INLINE T* row_pointer(const Rows& rows, int64_t r) {
  const int64_t offset = r / rows.inner * rows.outer_stride + r % rows.inner * rows.inner_stride;
  return static_cast<T*>(rows.data) + offset;
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
