// The formulas of divergences between two softmax rows, for CUDA threads and CPU vectors alike
// (see logits.h). Logarithms are in base 2 until the end of a row.
#pragma once

#include "logits.h"

namespace rlhf_fast {

// One side of the comparison: log2 of its probabilities.
struct LogSoftmax {
  float reference;
  float outer2;
  float log2_sum;

  template <class F>
  RLHF_FAST_HD F log2_p(F logit) const {
    return fma(logit - F(reference), F(outer2), F(-log2_sum));
  }
};

// p * log2(p / other), 0 where p is 0 even if log2(other) is -inf.
template <class F>
RLHF_FAST_HD F p_log_ratio(F p, F log2_p, F log2_other) {
  return select_lt(F(0.0f), p, p * (log2_p - log2_other), p * F(0.0f));
}

// What one logit of each row contributes to the divergence from m = beta * a + (1 - beta) * b:
// probabilities, and log2 of their ratios to m. Where there is no probability worth the name, any
// finite logarithm will do: it is multiplied by that probability.
template <class F>
struct Mixture {
  static constexpr float kNoPower = -151.0f;  // 2 to it is 0
  F pa, pb, ratio_a, ratio_b;

  RLHF_FAST_HD Mixture(const LogSoftmax& a, const LogSoftmax& b, float beta, F xa, F xb) {
    const F la = at_least(kNoPower, a.log2_p(xa)), lb = at_least(kNoPower, b.log2_p(xb));
    pa = exp2(la);
    pb = exp2(lb);
    const F lm = log2(at_least(1.2e-38f, fma(F(beta), pa, F(1.0f - beta) * pb)));
    ratio_a = la - lm;
    ratio_b = lb - lm;
  }
};

// Gradients of one row's divergence with respect to both logits, apart from dz/dx and upstream.
//   KL(a || b):  a * (log(a / b) - KL)                 and  b - a
//   JSD:         beta * a * (log(a / m) - KL(a || m))  and the same of 1 - beta and b
struct DivergenceGradient {
  LogSoftmax a, b;
  float kl_a, kl_b;
  float beta;
  float scale;  // upstream gradient times dz/dx

  template <bool kJsd, class F>
  RLHF_FAST_HD void operator()(F xa, F xb, F& da, F& db) const {
    if constexpr (kJsd) {
      const Mixture<F> m(a, b, beta, xa, xb);
      da = F(scale * beta) * m.pa * fma(F(kLn2), m.ratio_a, F(-kl_a));
      db = F(scale * (1.0f - beta)) * m.pb * fma(F(kLn2), m.ratio_b, F(-kl_b));
    } else {
      const F la = a.log2_p(xa), lb = b.log2_p(xb);
      const F pa = exp2(la), pb = exp2(lb);
      da = F(scale) * fma(F(-kl_a), pa, F(kLn2) * p_log_ratio(pa, la, lb));
      db = F(scale) * (pb - pa);
    }
  }
};

}  // namespace rlhf_fast
