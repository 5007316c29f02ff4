// One vector of floats in three bodies: AVX-512, AVX2 and plain loops. Each file in this folder is
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
  static constexpr bool kScaleSaturates = true;
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
// a > b ? a : b, so a NaN in `a` is passed over and one in `b` is kept
RLHF_FAST_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
RLHF_FAST_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
}
RLHF_FAST_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a.v, 8); }
RLHF_FAST_INLINE Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
RLHF_FAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
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
RLHF_FAST_INLINE void store(BFloat16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr bool kScaleSaturates = false;
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
RLHF_FAST_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
RLHF_FAST_INLINE Vec round(Vec a) { return _mm256_round_ps(a.v, 8); }
RLHF_FAST_INLINE Vec scale_by_power(Vec a, Vec n) {
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
RLHF_FAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
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
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

#else

struct Vec {  // the loops below become SSE, NEON or whatever the machine's baseline has
  static constexpr int kWidth = 8;
  static constexpr bool kScaleSaturates = false;
  float v[kWidth];
  Vec() = default;
  RLHF_FAST_INLINE explicit Vec(float x) {
    for (float& e : v) e = x;
  }
};
#define RLHF_FAST_LANES(expression)                    \
  Vec r;                                               \
  for (int i = 0; i < Vec::kWidth; ++i) r.v[i] = (expression); \
  return r
RLHF_FAST_INLINE Vec operator+(Vec a, Vec b) { RLHF_FAST_LANES(a.v[i] + b.v[i]); }
RLHF_FAST_INLINE Vec operator-(Vec a, Vec b) { RLHF_FAST_LANES(a.v[i] - b.v[i]); }
RLHF_FAST_INLINE Vec operator*(Vec a, Vec b) { RLHF_FAST_LANES(a.v[i] * b.v[i]); }
RLHF_FAST_INLINE Vec divide(Vec a, Vec b) { RLHF_FAST_LANES(a.v[i] / b.v[i]); }
RLHF_FAST_INLINE Vec fma(Vec a, Vec b, Vec c) { RLHF_FAST_LANES(a.v[i] * b.v[i] + c.v[i]); }
RLHF_FAST_INLINE Vec abs(Vec a) { RLHF_FAST_LANES(__builtin_fabsf(a.v[i])); }
RLHF_FAST_INLINE Vec max(Vec a, Vec b) { RLHF_FAST_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
RLHF_FAST_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  RLHF_FAST_LANES(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
RLHF_FAST_INLINE Vec round(Vec a) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to nearest even
  RLHF_FAST_LANES((a.v[i] + kMagic) - kMagic);
}
RLHF_FAST_INLINE Vec scale_by_power(Vec a, Vec n) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) {
    const float biased = n.v[i] + (127.0f + 8388608.0f);  // the integer lands in the low mantissa
    uint32_t bits;
    std::memcpy(&bits, &biased, 4);
    bits <<= 23;
    float power;
    std::memcpy(&power, &bits, 4);
    r.v[i] = a.v[i] * power;
  }
  return r;
}
RLHF_FAST_INLINE Vec load(const float* p) { RLHF_FAST_LANES(p[i]); }
RLHF_FAST_INLINE Vec load(const BFloat16* p) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) {
    const uint32_t bits = uint32_t(p[i].bits) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
RLHF_FAST_INLINE Vec load(const Float16* p) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) {
    const uint32_t sign = uint32_t(p[i].bits & 0x8000) << 16;
    // Moving the exponent and multiplying by 2^112 is exact for normal and subnormal halves.
    uint32_t bits = uint32_t(p[i].bits & 0x7fff) << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    x *= 5.192296858534828e33f;
    std::memcpy(&bits, &x, 4);
    if ((p[i].bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= sign;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
RLHF_FAST_INLINE void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
RLHF_FAST_INLINE void store(BFloat16* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    bits += 0x7fff + (bits >> 16 & 1);
    p[i].bits = nan ? 0x7fc0 : uint16_t(bits >> 16);
  }
}
RLHF_FAST_INLINE void store(Float16* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
      half = 0x7e00;
    } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
      half = 0x7c00;
    } else if (bits < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded subnormal behind
      float x;
      std::memcpy(&x, &bits, 4);
      x += 0.5f;
      std::memcpy(&half, &x, 4);
      half -= 0x3f000000;
    } else {
      half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    p[i].bits = uint16_t(half | sign);
  }
}
#undef RLHF_FAST_LANES

#endif

// 2^x for x in [-126, 127], within 1 ulp; NaN stays NaN. 2^0 is exactly 1.
RLHF_FAST_INLINE Vec exp2_bounded(Vec x) {
  const Vec n = round(x);
  const Vec f = x - n;
  Vec p = fma(f, Vec(1.32647261e-3f), Vec(9.67151299e-3f));
  p = fma(p, f, Vec(5.55073358e-2f));
  p = fma(p, f, Vec(2.40222424e-1f));
  p = fma(p, f, Vec(6.93147004e-1f));
  p = fma(p, f, Vec(1.0f));
  return scale_by_power(p, n);
}
RLHF_FAST_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  return exp2_bounded(x);  // scalef itself saturates
#else
  // Below -126.5 the answer is 0, not the smallest normal number.
  const Vec floor(-126.0f);
  const Vec bounded = select_lt(Vec(127.0f), x, Vec(127.0f), max(floor, x));
  return select_lt(x, floor, Vec(0.0f), exp2_bounded(bounded));
#endif
}

RLHF_FAST_INLINE float sum_of(Vec a) {
  float lanes[Vec::kWidth];
  std::memcpy(lanes, &a, sizeof lanes);
  for (int step = Vec::kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}
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
  const int64_t offset =
      r / rows.inner * rows.outer_stride + r % rows.inner * rows.inner_stride;
  return static_cast<T*>(rows.data) + offset;
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
