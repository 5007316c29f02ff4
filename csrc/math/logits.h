// The formulas of softmax rows, written once for CUDA threads (F = float) and for CPU vectors
// (F = a SIMD type). F brings + - * and, found by its type, fma, exp2, divide, select_lt, abs.
//
// A logit x becomes v(x) = x, or tanh(x * inner) with a softcap, or -inf below the threshold of a
// truncated distribution; the natural logit is z = v * outer. Exponents are differences of v from a
// reference, rounded once: exp(z - z_ref) = 2^((v - v_ref) * outer2). So a row of one logit has
// log-prob exactly 0.
#pragma once

#include "host_device.h"

namespace rlhf_fast {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// tanh, within 2 ulp: odd polynomial below 0.625, exponential above.
template <class F>
RLHF_FAST_HD F tanh_of(F y) {
  const F a = abs(y);
  const F q = y * y;
  F poly = fma(q, F(2.14753696e-3f), F(-8.18267465e-3f));
  poly = fma(poly, q, F(2.17029676e-2f));
  poly = fma(poly, q, F(-5.39472029e-2f));
  poly = fma(poly, q, F(1.33332103e-1f));
  poly = fma(poly, q, F(-3.33333313e-1f));
  const F small = fma(y * q, poly, y);
  const F e = exp2(select_lt(F(15.0f), a, F(15.0f), a) * F(2.0f * kLog2e));  // keeps NaN
  const F large = F(1.0f) - divide(F(2.0f), e + F(1.0f));
  const F signed_large = select_lt(y, F(0.0f), F(0.0f) - large, large);
  return select_lt(a, F(0.625f), small, signed_large);
}

// What v(x) has to take care of.
enum class Form { kPlain, kTruncated, kSoftcap };  // kSoftcap: possibly truncated too

// How one row's logits become probabilities.
struct LogitMap {
  float inner;   // logit_scale / softcap; only with a softcap
  float outer;   // z = v * outer
  float outer2;  // the same in base 2
  float slope;   // dz/dx at x = 0
  bool has_softcap;
  float threshold;  // logits below it have no probability

  RLHF_FAST_HD LogitMap(float logit_scale, float softcap, float temperature,
                        float threshold = -__builtin_huge_valf())
      : inner(softcap > 0.0f ? logit_scale / softcap : 0.0f),
        outer((softcap > 0.0f ? softcap : logit_scale) / temperature),
        outer2(outer * kLog2e),
        slope(logit_scale / temperature),
        has_softcap(softcap > 0.0f),
        threshold(threshold) {}

  template <Form kForm, class F>
  RLHF_FAST_HD F value(F x) const {
    F v = x;
    if constexpr (kForm == Form::kSoftcap) v = tanh_of(x * F(inner));
    if constexpr (kForm != Form::kPlain) {
      v = select_lt(x, F(threshold), F(-__builtin_huge_valf()), v);
    }
    return v;
  }

  // dz/dx where v = value(x)
  template <Form kForm, class F>
  RLHF_FAST_HD F derivative(F v) const {
    if constexpr (kForm == Form::kSoftcap) {
      return fma(v * F(-slope), v, F(slope));
    } else {
      return F(slope);
    }
  }
};

// factor * 2^((v - reference) * scale - shift) of many v, in two steps. CPU vectors have their own
// (csrc/cpu/exponential.h), for which kRelative tells something.
template <class F, bool kRelative>
struct Exponential {
  float reference, scale, shift, factor;
  RLHF_FAST_HD Exponential(float reference, float scale, float shift, float factor)
      : reference(reference), scale(scale), shift(shift), factor(factor) {}
  RLHF_FAST_HD F distance(F v) const { return v - F(reference); }
  RLHF_FAST_HD F operator()(F distance) const {
    return F(factor) * exp2(fma(distance, F(scale), F(-shift)));
  }
};

// What the gradient of one row is made of: dz/dx * p * (base + entropy * log2(p)) at each logit,
// apart from the label's own term;  p = exp(z - lse),   lse = z(reference) + log_sum
// where, with upstream gradients g of log-prob, entropy H and lse,
//   base = g_lse - g_logp - g_entropy * H   and   entropy = -g_entropy * ln(2).
struct RowGradient {
  float reference;
  float log2_sum;
  float base;
  float entropy;

  // Without a softcap dz/dx is one number, which is multiplied in here.
  RLHF_FAST_HD RowGradient(const LogitMap& map, float reference, float log_sum, float base,
                           float grad_entropy)
      : reference(reference),
        log2_sum(log_sum * kLog2e),
        base(map.has_softcap ? base : base * map.slope),
        entropy(-kLn2 * grad_entropy * (map.has_softcap ? 1.0f : map.slope)) {}
};

// The gradient as a function of v.
template <class F, Form kForm, bool kEntropy, bool kRelative = true>
class GradientFormula {
 public:
  RLHF_FAST_HD GradientFormula(const LogitMap& map, const RowGradient& row)
      : map_(map),
        row_(row),
        power_(row.reference, map.outer2, row.log2_sum, kConstant ? row.base : 1.0f) {}

  RLHF_FAST_HD F operator()(F v) const {
    const F distance = power_.distance(v);
    const F p = power_(distance);
    if constexpr (kConstant) return p;
    F c = F(row_.base);
    if constexpr (kEntropy) {
      const F logp2 = fma(distance, F(map_.outer2), F(-row_.log2_sum));
      // A logit of -inf has p = 0 and must not make 0 * inf.
      const F bounded = select_lt(logp2, F(-128.0f), F(-128.0f), logp2);
      c = fma(F(row_.entropy), bounded, c);
    }
    if constexpr (kForm == Form::kSoftcap) {
      c = c * map_.template derivative<kForm>(v);
      // A truncated v is -inf, the others lie within 1: no 0 * inf here either.
      return select_lt(v, F(-2.0f), F(0.0f), p * c);
    }
    return p * c;
  }

 private:
  static constexpr bool kConstant = kForm != Form::kSoftcap && !kEntropy;  // what p is times
  LogitMap map_;
  RowGradient row_;
  Exponential<F, kRelative> power_;
};

}  // namespace rlhf_fast
