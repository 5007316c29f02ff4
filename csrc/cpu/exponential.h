// Exponentials and logarithms of vectors.
#pragma once

#include <cmath>
#include <limits>

#include "../math/logits.h"
#include "simd.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

// 2^x for x in [-127, 127], within 1 ulp, but 0 below -126.5; NaN stays NaN. 2^0 is exactly 1.
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
  return exp2_bounded(select_lt(Vec(127.0f), x, Vec(127.0f), max(Vec(-127.0f), x)));
#endif
}

// e^x for |x| <= 87, within 0.7 ulp; NaN stays NaN. e^0 is exactly 1.
RLHF_FAST_INLINE Vec exp_of(Vec x) {
  const Vec n = round(x * Vec(kLog2e));
  const Vec f = fma(n, Vec(2.12194440e-4f), fma(n, Vec(-0.693359375f), x));  // x - n log(2)
  const Vec f2 = f * f;  // in pairs: shorter chains than one by one
  const Vec low = fma(f, Vec(1.66664302e-1f), Vec(4.99999940e-1f));
  const Vec high = fma(f2, Vec(1.38436072e-3f), fma(f, Vec(8.37419555e-3f), Vec(4.16680053e-2f)));
  const Vec p = fma(fma(high, f2, low), f, Vec(1.0f));
  return scale_by_power(fma(p, f, Vec(1.0f)), n);
}

#if defined(__AVX512F__)

// For each of 32 intervals of [1, 2): the middle's reciprocal, and log2 of that one's reciprocal.
struct LogTable {
  alignas(64) float reciprocal[32], log[32];
  constexpr LogTable() : reciprocal(), log() {
    for (int i = 0; i < 32; ++i) {
      reciprocal[i] = float(64.0 / (65.0 + 2.0 * i));
      const double x = 1.0 / reciprocal[i], t = (x - 1.0) / (x + 1.0);
      double power = t, sum = 0.0;
      for (int k = 1; k < 40; k += 2, power *= t * t) sum += power / k;
      log[i] = float(2.8853900817779268 * sum);
    }
  }
};
inline constexpr LogTable kLogTable{};

// log2(x) of a positive normal x, within 2 ulp or 2e-7; NaN stays NaN.
RLHF_FAST_INLINE Vec log2(Vec x) {
  auto entry = [&](const float* table) __attribute__((always_inline)) {
    const __m512i top = _mm512_srli_epi32(_mm512_castps_si512(x.v), 18);
    return Vec(_mm512_permutex2var_ps(_mm512_load_ps(table), top, _mm512_load_ps(table + 16)));
  };
  const Vec m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const Vec f = fma(m, entry(kLogTable.reciprocal), Vec(-1.0f));  // |f| <= 1/65
  const Vec p = fma(fma(f, Vec(4.80998009e-1f), Vec(-7.21420467e-1f)), f, Vec(1.44269502f));
  return fma(p, f, Vec(_mm512_getexp_ps(x.v)) + entry(kLogTable.log));
}

#else

// log2(x) of a positive normal x, within 2 ulp or 2e-7; NaN stays NaN.
RLHF_FAST_INLINE Vec log2(Vec x) {
  // x = m * 2^n with m in [sqrt(1/2), sqrt(2))
  const Vec n = exponent_near(x);
  const Vec m = scale_by_power(x, Vec(0.0f) - n) - Vec(1.0f);
  Vec p = fma(m, Vec(1.25836773e-1f), Vec(-2.07269624e-1f));
  p = fma(p, m, Vec(2.15715647e-1f));
  p = fma(p, m, Vec(-2.38944843e-1f));
  p = fma(p, m, Vec(2.87916243e-1f));
  p = fma(p, m, Vec(-3.60703677e-1f));
  p = fma(p, m, Vec(4.80910629e-1f));
  p = fma(p, m, Vec(-7.21347332e-1f));
  p = fma(p, m, Vec(1.44269502f));
  return fma(p, m, n);
}

#endif

}  // namespace RLHF_FAST_ISA

// The largest exponents that v lies below give 0 exactly. What lies 127 binary orders or more above
// the reference gives garbage: the caller finds it by the maximum.
#if defined(__AVX512F__)

// x * scale = n + f with n a multiple of 1/32; 2^n is a table's entry with an exponent added, 2^f a
// parabola. Two operations fewer than a polynomial alone, and the product is never rounded.
//
// Not relative: v is taken as it is, and a whole number of binary orders instead of the reference
// is subtracted in the same operation that multiplies; what is left over goes into the factor. Only
// for references that are `near` 0.
template <bool kRelative>
class Exponential<RLHF_FAST_ISA::Vec, kRelative> {
  using Vec = RLHF_FAST_ISA::Vec;

 public:
  static bool near(float reference, float scale) { return std::fabs(reference * scale) < 16384.0f; }

  RLHF_FAST_INLINE Exponential(float reference, float scale, float shift, float factor)
      : origin_(kRelative ? reference : 0.0f), scale_(scale) {
    const double total = shift + (kRelative ? 0.0 : double(reference) * scale);
    const double whole = std::rint(total);
    const double rest = factor * std::exp2(whole - total);
    const double lowest = (whole - 127.0) / scale, least = std::numeric_limits<float>::lowest();
    lowest_ = Vec(float(lowest < least ? least : lowest));
    offset_ = Vec(float(kRounding - whole));
    // 2^f within 5.3e-8 for |f| <= 1/64
    c0_ = Vec(float(rest));
    c1_ = Vec(float(rest * 0.69315734));
    c2_ = Vec(float(rest * 0.24022884));
    table_[0] = _mm512_load_si512(kTable.bits);
    table_[1] = _mm512_load_si512(kTable.bits + 16);
  }

  // v's distance from the reference or, if that is not relative, from 0; not below what gives 0.
  RLHF_FAST_INLINE Vec distance(Vec v) const {
    if constexpr (kRelative) v = v - origin_;
    return max(lowest_, v);
  }
  RLHF_FAST_INLINE Vec operator()(Vec distance) const {
    const Parts e = parts(distance);
    return e.power * e.rest;
  }
  RLHF_FAST_INLINE Vec add_to(Vec sum, Vec distance) const {
    const Parts e = parts(distance);
    return fma(e.power, e.rest, sum);
  }

 private:
  static constexpr float kRounding = 393216.0f;  // 1.5 * 2^18: sums with it are multiples of 1/32

  struct Table {
    alignas(64) uint32_t bits[32];  // of 2^(i/32), less what shifting i adds
    constexpr Table() : bits() {
      double power = 1.0;
      for (uint32_t i = 0; i < 32; ++i, power *= 1.0218971486541166) {
        bits[i] = 0x3f800000u + uint32_t((power - 1.0) * 8388608.0 + 0.5) - (i << 18);
      }
    }
  };
  static constexpr Table kTable{};

  struct Parts {
    Vec power, rest;
  };
  RLHF_FAST_INLINE Parts parts(Vec distance) const {
    const Vec n = fma(distance, scale_, offset_);
    const Vec f = fma(distance, scale_, offset_ - n);
    const __m512i bits = _mm512_castps_si512(n.v);
    const __m512i entry = _mm512_permutex2var_epi32(table_[0], bits, table_[1]);
    const Vec power = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(bits, 18), entry));
    return {power, fma(fma(f, c2_, c1_), f, c0_)};
  }

  Vec origin_, scale_, lowest_, offset_, c0_, c1_, c2_;
  __m512i table_[2];
};

#else

template <bool kRelative>
class Exponential<RLHF_FAST_ISA::Vec, kRelative> {
  using Vec = RLHF_FAST_ISA::Vec;

 public:
  static constexpr bool near(float, float) { return false; }

  RLHF_FAST_INLINE Exponential(float reference, float scale, float shift, float factor)
      : reference_(reference),
        scale_(scale),
        shift_(-shift),
        lowest_((shift - 127.0f) / scale),
        factor_(factor) {}

  RLHF_FAST_INLINE Vec distance(Vec v) const { return max(lowest_, v - reference_); }
  RLHF_FAST_INLINE Vec operator()(Vec distance) const {
    return factor_ * RLHF_FAST_ISA::exp2_bounded(fma(distance, scale_, shift_));
  }
  RLHF_FAST_INLINE Vec add_to(Vec sum, Vec distance) const { return sum + (*this)(distance); }

 private:
  Vec reference_, scale_, shift_, lowest_, factor_;
};

#endif

}  // namespace rlhf_fast
