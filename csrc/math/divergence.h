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

// log2 of the mixture beta * a + (1 - beta) * b. Where it has no probability worth the name, any
// finite number will do: it is multiplied by that probability.
template <class F>
RLHF_FAST_HD F log2_mixture(F pa, F pb, float beta) {
  const F m = fma(F(beta), pa, F(1.0f - beta) * pb);
  return log2(select_lt(m, F(1.2e-38f), F(1.2e-38f), m));
}

// p * log2(p / other), 0 where p is 0 even if log2(other) is -inf.
template <class F>
RLHF_FAST_HD F p_log_ratio(F p, F log2_p, F log2_other) {
  return select_lt(F(0.0f), p, p * (log2_p - log2_other), p * F(0.0f));
}

// Gradients of one row's divergence with respect to both logits, apart from dz/dx and upstream.
//   KL(a || b):  a * (log(a / b) - KL)                 and  b - a
//   JSD:         beta * a * (log(a / m) - KL(a || m))  and  (1 - beta) * b * (log(b / m) - KL(b ||
//   m))
struct DivergenceGradient {
  LogSoftmax a, b;
  float kl_a, kl_b;
  float beta;
  float scale;  // upstream gradient times dz/dx

  template <bool kJsd, class F>
  RLHF_FAST_HD void operator()(F xa, F xb, F& da, F& db) const {
    const F la = a.log2_p(xa), lb = b.log2_p(xb);
    const F pa = exp2(la), pb = exp2(lb);
    if constexpr (kJsd) {
      const F lm = log2_mixture(pa, pb, beta);
      da = F(scale * beta) * fma(F(-kl_a), pa, F(kLn2) * p_log_ratio(pa, la, lm));
      db = F(scale * (1.0f - beta)) * fma(F(-kl_b), pb, F(kLn2) * p_log_ratio(pb, lb, lm));
    } else {
      da = F(scale) * fma(F(-kl_a), pa, F(kLn2) * p_log_ratio(pa, la, lb));
      db = F(scale) * (pb - pa);
    }
  }
};

}  // namespace rlhf_fast
