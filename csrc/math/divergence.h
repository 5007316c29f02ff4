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

// What one logit of each row contributes to the divergence from m = beta * a + (1 - beta) * b. With
// t = log2(a / b) and u = 2^-|t|, m is the larger probability times a number in [min(beta, 1 -
// beta), 1], so its logarithm is taken where that is small and a ratio has no large numbers to
// lose.
struct MixtureMap {
  static constexpr float kNoPower =
      -127.0f;  // 2 to it is taken for 0; any finite exponent would do
  LogSoftmax a, b;
  float lowest_a, lowest_b;  // distances from the references that give it
  float log2_odds;           // t of two logits that are their rows' references
  float beta, rest;

  RLHF_FAST_HD MixtureMap(const LogSoftmax& a, const LogSoftmax& b, float beta)
      : a(a),
        b(b),
        lowest_a((kNoPower + a.log2_sum) / a.outer2),
        lowest_b((kNoPower + b.log2_sum) / b.outer2),
        log2_odds(b.log2_sum - a.log2_sum),
        beta(beta < 1.2e-38f ? 1.2e-38f : beta),
        rest(1.0f - beta < 1.2e-38f ? 1.2e-38f : 1.0f - beta) {}
};

// Probabilities, and log2 of their ratios to m.
template <class F>
struct Mixture {
  F pa, pb, ratio_a, ratio_b;

  RLHF_FAST_HD Mixture(const MixtureMap& map, F xa, F xb) {
    const Exponential<F, true> power(0.0f, 1.0f, 0.0f, 1.0f), inverse(0.0f, -1.0f, 0.0f, 1.0f);
    const F da = at_least(map.lowest_a, xa - F(map.a.reference));
    const F db = at_least(map.lowest_b, xb - F(map.b.reference));
    const F la = fma(da, F(map.a.outer2), F(-map.a.log2_sum));
    const F lb = fma(db, F(map.b.outer2), F(-map.b.log2_sum));
    const F t = fma(da - db, F(map.a.outer2), F(map.log2_odds));
    const F zero(0.0f), beta(map.beta), rest(map.rest);
    const F u = inverse(abs(t));
    const F larger = power(select_lt(t, zero, lb, la)), smaller = larger * u;
    pa = select_lt(t, zero, smaller, larger);
    pb = select_lt(t, zero, larger, smaller);
    // over the larger one
    const F log2_m = log2(fma(select_lt(t, zero, beta, rest), u, select_lt(t, zero, rest, beta)));
    ratio_a = select_lt(t, zero, t, zero) - log2_m;
    ratio_b = select_lt(t, zero, zero, zero - t) - log2_m;
  }
  RLHF_FAST_HD Mixture(const LogSoftmax& a, const LogSoftmax& b, float beta, F xa, F xb)
      : Mixture(MixtureMap(a, b, beta), xa, xb) {}
};

// Gradients of one row's divergence with respect to both logits, apart from dz/dx and upstream.
//   KL(a || b):  a * (log(a / b) - KL)                 and  b - a
//   JSD:         beta * a * (log(a / m) - KL(a || m))  and the same of 1 - beta and b
struct DivergenceGradient {
  LogSoftmax a, b;
  float kl_a, kl_b;
  float beta;
  float scale;  // upstream gradient times dz/dx

  // Of the Jensen-Shannon divergence, from a probability and log2 of its ratio to m.
  template <class F>
  RLHF_FAST_HD F jsd_a(F pa, F ratio_a) const {
    return F(scale * beta) * pa * fma(F(kLn2), ratio_a, F(-kl_a));
  }
  template <class F>
  RLHF_FAST_HD F jsd_b(F pb, F ratio_b) const {
    return F(scale * (1.0f - beta)) * pb * fma(F(kLn2), ratio_b, F(-kl_b));
  }

  template <bool kJsd, class F>
  RLHF_FAST_HD void operator()(F xa, F xb, F& da, F& db) const {
    if constexpr (kJsd) {
      const Mixture<F> m(a, b, beta, xa, xb);
      da = jsd_a(m.pa, m.ratio_a);
      db = jsd_b(m.pb, m.ratio_b);
    } else {
      const F la = a.log2_p(xa), lb = b.log2_p(xb);
      const F pa = exp2(la), pb = exp2(lb);
      da = F(scale) * fma(F(-kl_a), pa, F(kLn2) * p_log_ratio(pa, la, lb));
      db = F(scale) * (pb - pa);
    }
  }
};

}  // namespace rlhf_fast
