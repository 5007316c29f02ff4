// Every policy loss, once: value and slope of one token, for CUDA threads (F = float) and CPU
// vectors (F = a SIMD type). F brings + - * and, found by its type, fma, exp2 or exp_of, log2,
// divide, select_lt, abs.
//
// A loss is a struct with `term`, its value and slope for one token given
//   x, the log-ratio to the old policy at the loss's level, ratio = exp(x), logp and advantage,
// where the slope is with respect to x if kThroughRatio, else to the token's own logp. A loss that
// changes token log-ratios before they are averaged overrides `tempered` and its derivative `open`.
#pragma once

#include "host_device.h"
#include "logits.h"
#include "rlhf_fast/policy_loss.h"

namespace rlhf_fast {

template <class F>
RLHF_FAST_HD F lower(F a, F b) {  // NaN in `a` stays
  return select_lt(b, a, b, a);
}
template <class F>
RLHF_FAST_HD F higher(F a, F b) {
  return select_lt(a, b, b, a);
}
template <class F>
RLHF_FAST_HD F clamp(F x, float low, float high) {
  return higher(lower(x, F(high)), F(low));
}
// 1 where a < b, else 0
template <class F>
RLHF_FAST_HD F less(F a, F b) {
  return select_lt(a, b, F(1.0f), F(0.0f));
}

// e^x, |x| < 87, where F has a fast exp2 only: with the rounding error of x * log2(e) put back.
template <class F>
RLHF_FAST_HD F exp_of(F x) {
  const F high = x * F(kLog2e);
  const F low = fma(x, F(1.925963033e-8f), fma(x, F(kLog2e), F(0.0f) - high));
  const F e = exp2(high);
  return fma(e * F(kLn2), low, e);
}

template <class F>
struct PolicyTerm {
  F value, slope;
  F low = F(0.0f), high = F(0.0f), dual = F(0.0f);  // 1 where a bound cuts the token off
  F pull = F(0.0f);  // slope in x where the other is in logp (kPullsThroughRatio)
};

struct PolicyFormula {
  static constexpr bool kThroughRatio = false;
  static constexpr bool kPullsThroughRatio = false;
  static constexpr bool kClips = false;  // term has low, high and dual
  static constexpr bool kSamplingInRatio = false;
  template <class F>
  static RLHF_FAST_HD F tempered(const PolicyParams&, F x, F) {
    return x;
  }
  template <class F>
  static RLHF_FAST_HD F open(const PolicyParams&, F, F) {
    return F(1.0f);
  }
};

// REINFORCE; with its advantages also ReMax, arXiv 2310.10505.
struct LogProb : PolicyFormula {
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams&, F, F, F logp, F advantage) {
    return {F(0.0f) - advantage * logp, F(0.0f) - advantage};
  }
};

// PPO, arXiv 1707.06347, equation 7, with two bounds (DAPO, arXiv 2503.14476, equation 10) and dual
// clip, arXiv 1912.09729, equation 5. At sequence level: GSPO, arXiv 2507.18071, equation 5.
struct ClippedRatio : PolicyFormula {
  static constexpr bool kThroughRatio = true;
  static constexpr bool kClips = true;
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F, F ratio, F, F advantage) {
    const F zero(0.0f), never(-__builtin_huge_valf());
    const F lowest = select_lt(advantage, zero, F(1.0f - p.epsilon_low), never);
    const F highest = select_lt(advantage, zero, F(p.dual_clip), F(1.0f + p.epsilon_high));
    const F kept = lower(higher(ratio, lowest), highest), too_high = less(highest, ratio);
    const F value = zero - advantage * kept;
    const F slope = select_lt(ratio, lowest, zero, select_lt(highest, ratio, zero, value));
    return {value, slope, less(ratio, lowest), select_lt(zero, advantage, too_high, zero),
            select_lt(advantage, zero, too_high, zero)};
  }
};

// GSPO-token, arXiv 2507.18071, equation 13: the sequence's ratio, but each token's gradient is its
// own, so that advantages may differ along the sequence.
struct ClippedRatioOfToken : ClippedRatio {
  static constexpr bool kThroughRatio = false;
};

// CISPO, arXiv 2506.13585, equations 4 and 5: the clipped ratio is a constant weight.
struct ClippedWeight : PolicyFormula {
  static constexpr bool kClips = true;
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F, F ratio, F logp, F advantage) {
    const float lowest = 1.0f - p.epsilon_low, highest = 1.0f + p.epsilon_high;
    const F slope = F(0.0f) - clamp(ratio, lowest, highest) * advantage;
    return {slope * logp, slope, less(ratio, F(lowest)), less(F(highest), ratio)};
  }
};

// A-LoL, arXiv 2305.14718, algorithm 1: negative advantages are left out. The ratio is the whole
// sequence's; with the tokens' own it is the variant "A-LoL sequence".
struct PositiveWeight : PolicyFormula {
  static constexpr bool kClips = true;
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F x, F ratio, F logp, F advantage) {
    return ClippedWeight::term(p, x, ratio, logp, higher(advantage, F(0.0f)));
  }
};

// DPPO, arXiv 2602.04879: REINFORCE weighed with the ratio, or dual_clip where that is less,
// without tokens that left the trust region in the direction in which they are pushed. Its
// divergence is that of two distributions over "this token" and "another": Binary-TV, |p - q|,
// here with q - p above or below a bound.
struct WithinTV : PolicyFormula {
  static constexpr bool kClips = true;
  template <class F>
  static RLHF_FAST_HD F probability(F logp) {
    return exp_of(clamp(logp, -87.0f, 0.0f));
  }
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> kept_inside(const PolicyParams& p, F ratio, F logp, F advantage,
                                                F low, F high) {
    const F zero(0.0f), highest(p.dual_clip);
    const F inside = F(1.0f) - select_lt(zero, advantage, high, low);
    const F slope = zero - advantage * lower(ratio, highest) * inside;
    return {slope * logp, slope, select_lt(zero, advantage, zero, low),
            select_lt(zero, advantage, high, zero), less(highest, ratio) * inside};
  }
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F x, F ratio, F logp, F advantage) {
    const F moved = probability(logp) - probability(logp - x);
    return kept_inside(p, ratio, logp, advantage, less(moved, F(-p.epsilon_low)),
                       less(F(p.epsilon_high), moved));
  }
};

// Binary-KL of DPPO, arXiv 2602.04879: p log(p / q) + (1 - p) log((1 - p) / (1 - q)), p that of
// the old policy.
struct WithinKl : WithinTV {
  template <class F>
  static RLHF_FAST_HD F others(F probability) {
    return higher(F(1.0f) - probability, F(1e-7f));
  }
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F x, F ratio, F logp, F advantage) {
    const F zero(0.0f), now = probability(logp), before = probability(logp - x);
    const F rest = others(before), rest_ratio = log2(rest) - log2(others(now));
    const F kl = fma(F(kLn2) * rest, rest_ratio, zero - before * x);
    return kept_inside(p, ratio, logp, advantage,
                       select_lt(now, before, less(F(p.epsilon_low), kl), zero),
                       select_lt(before, now, less(F(p.epsilon_high), kl), zero));
  }
};

// SAPO, arXiv 2511.20347, equations 5 and 6: a sigmoid around ratio 1 in place of the clip.
struct SoftGate : PolicyFormula {
  static constexpr bool kThroughRatio = true;
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F, F ratio, F, F advantage) {
    const F temperature =
        select_lt(F(0.0f), advantage, F(p.sapo_temperature_pos), F(p.sapo_temperature_neg));
    const F one(1.0f);
    const F e = exp_of(higher(temperature * (one - ratio), F(-87.0f)));
    const F gate = divide(one, one + e);
    const F scaled = F(-4.0f) * advantage * gate;
    return {divide(scaled, temperature), scaled * (e * gate) * ratio};
  }
};

// DRO, arXiv 2405.19107: the loss of equation 4, divided by tau (beta) as in section 3.3, less what
// has no gradient in the policy; its value function is the advantage's. The squared log-ratio keeps
// it near.
struct SquaredLogRatio : PolicyFormula {
  static constexpr bool kPullsThroughRatio = true;
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F x, F, F logp, F advantage) {
    const F zero(0.0f), pull = F(p.dro_beta) * x;
    return {
        fma(F(0.5f) * pull, x, zero - advantage * logp), zero - advantage, zero, zero, zero, pull};
  }
};

// GMPO, arXiv 2507.20673, equation 4: the geometric mean of ratios that are clipped one by one,
// where epsilon bounds the log-ratio.
struct GeometricMean : PolicyFormula {
  static constexpr bool kThroughRatio = true;
  template <class F>
  static RLHF_FAST_HD F tempered(const PolicyParams& p, F x, F advantage) {
    return select_lt(advantage, F(0.0f), higher(x, F(-p.epsilon_low)), lower(x, F(p.epsilon_high)));
  }
  template <class F>
  static RLHF_FAST_HD F open(const PolicyParams& p, F x, F advantage) {
    const F cut =
        select_lt(advantage, F(0.0f), less(x, F(-p.epsilon_low)), less(F(p.epsilon_high), x));
    return F(1.0f) - cut;
  }
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams&, F, F ratio, F, F advantage) {
    const F value = F(0.0f) - advantage * ratio;
    return {value, value};
  }
};

// VESPO, arXiv 2602.10693, equation 20: a gamma density of the whole sequence's ratio, 1 at ratio
// 1, is a constant weight. The ratio between trainer and sampler is part of it.
struct GammaWeight : PolicyFormula {
  static constexpr bool kSamplingInRatio = true;
  static constexpr float kLogSmallest = -18.420680744f;  // log(1e-8)
  template <class F>
  static RLHF_FAST_HD F tempered(const PolicyParams&, F x, F) {
    return clamp(x, -20.0f, 20.0f);
  }
  template <class F>
  static RLHF_FAST_HD PolicyTerm<F> term(const PolicyParams& p, F x, F, F logp, F advantage) {
    const F log_ratio = clamp(x, kLogSmallest, 20.0f);
    const F k = select_lt(advantage, F(0.0f), F(p.vespo_k_neg), F(p.vespo_k_pos));
    const F rate = select_lt(advantage, F(0.0f), F(p.vespo_lambda_neg), F(p.vespo_lambda_pos));
    const F log_weight = fma(k, log_ratio, rate * (F(1.0f) - exp_of(log_ratio)));
    const F slope = F(0.0f) - exp_of(clamp(log_weight, -87.0f, 87.0f)) * advantage;
    return {slope * logp, slope};
  }
};

}  // namespace rlhf_fast
