// What all policy losses share: one token from its inputs to loss, derivatives and metrics, and the
// sums over a sequence that its tokens need.
#pragma once

#include "policy.h"

namespace rlhf_fast {

// One token's inputs; what was not given counts as 0 and is not looked at.
template <class F>
struct PolicyToken {
  F logp, old, advantage, ref, sampling, entropy;
  F counts;  // 1 where the mask holds
};

// What a whole sequence contributes to its tokens.
struct PolicySequence {
  float weight = 1.0f;         // of a token's loss in the batch's
  float log_ratio = 0.0f;      // at sequence level
  float ratio_slope = 1.0f;    // d log_ratio / d (a token's log-ratio)
  float sampling = 0.0f;       // log-ratio between trainer and sampler, summed
  float sampling_mean = 0.0f;  // and averaged
};

// Log-ratio between trainer and sampler; 0 where the sampler reported none.
template <class F>
RLHF_FAST_HD F sampling_log_ratio(const PolicyToken<F>& t) {
  const F x = t.old - t.sampling;
  return select_lt(abs(x), F(__builtin_huge_valf()), x, F(0.0f));
}

template <class F>
struct SamplingWeight {
  F log_weight, kept, clipped;
};
template <class F>
RLHF_FAST_HD SamplingWeight<F> sampling_weight(const PolicyParams& p, const PolicySequence& s,
                                               F log_ratio) {
  const float low = p.sampling_log_low, high = p.sampling_log_high;
  const F value = p.sampling_level == SamplingLevel::kSequence ? F(s.sampling) : log_ratio;
  const F gate = p.sampling_level == SamplingLevel::kSequenceGate ? F(s.sampling_mean) : value;
  const F clipped = less(gate, F(low)) + less(F(high), gate);
  if (p.sampling_correction == SamplingCorrection::kTruncate) {
    return {clamp(clamp(value, low, high), -80.0f, 80.0f), F(1.0f), clipped};
  }
  return {clamp(value, -80.0f, 80.0f), F(1.0f) - clipped, clipped};
}

template <class F>
struct PolicyTokenResult {
  F loss;     // before the sequence's weight
  F direct;   // its derivative in the token's logp
  F through;  // and in the log-ratio, where that is the sequence's
  F metrics[kNumPolicyMetrics - 1];
};

// KL to the reference: adds value and derivatives.
template <bool kSequence, class F>
RLHF_FAST_HD void add_reference_kl(const PolicyParams& p, const PolicyToken<F>& t, F ratio,
                                   F ratio_slope, F own_ratio, PolicyTokenResult<F>& r) {
  const F zero(0.0f), one(1.0f);
  const F delta = t.ref - t.logp;
  F value = zero - delta, slope = one;
  if (p.kl_estimator == KlEstimator::kK2) {
    value = F(0.5f) * delta * delta;
    slope = zero - delta;
  } else if (p.kl_estimator == KlEstimator::kK3) {
    const F e = exp_of(clamp(delta, -80.0f, 80.0f));
    value = (e - one) - delta;
    slope = one - e;
  }
  slope = select_lt(F(p.kl_bound), abs(value), zero, slope);
  value = clamp(value, -p.kl_bound, p.kl_bound);
  r.metrics[int(PolicyMetric::ref_kl)] = value;
  if (p.kl_correction == KlCorrection::kImportance) {
    F& coupled = kSequence ? r.through : r.direct;
    coupled = fma(F(p.kl_coef) * value, ratio_slope, coupled);
    value = value * ratio;
    slope = slope * ratio;
  } else if (p.kl_correction != KlCorrection::kNone) {
    slope = zero - delta;
    if (p.kl_correction == KlCorrection::kWeightedStraightThrough) {
      slope = slope * lower(own_ratio, F(10.0f));
    }
  }
  r.loss = fma(F(p.kl_coef), value, r.loss);
  r.direct = fma(F(p.kl_coef), slope, r.direct);
}

// Estimates of KL(old policy || policy) from one token; `own` is its log-ratio within bounds.
template <class F>
struct OldKl {
  F k1, k2, k3;

  RLHF_FAST_HD OldKl(F log_ratio, F own, F own_ratio)
      : k1(F(0.0f) - log_ratio),
        k2(F(0.5f) * log_ratio * log_ratio),
        k3((own_ratio - F(1.0f)) - own) {}
};

// Loss, derivatives and metrics of one token.
template <class Formula, bool kSequence, class F>
RLHF_FAST_HD PolicyTokenResult<F> policy_token(const PolicyLossInputs& in, const PolicySequence& s,
                                               const PolicyToken<F>& t) {
  const PolicyParams& p = in.params;
  const F zero(0.0f), one(1.0f);
  PolicyTokenResult<F> r;
  auto metric = [&](PolicyMetric m) -> F& { return r.metrics[int(m)]; };

  const F log_ratio = t.logp - t.old;
  const F own = clamp(log_ratio, -p.log_ratio_bound, p.log_ratio_bound);
  const F own_ratio = exp_of(own);
  const F raw = kSequence ? F(s.log_ratio) : Formula::tempered(p, log_ratio, t.advantage);
  const F x = clamp(raw, -p.log_ratio_bound, p.log_ratio_bound);
  const F ratio = exp_of(x);  // the compiler sees where it is own_ratio
  PolicyTerm<F> term = Formula::term(p, x, ratio, t.logp, t.advantage);
  const F bound(p.log_ratio_bound);  // beyond it x does not move
  F slope = Formula::kThroughRatio ? select_lt(bound, abs(raw), zero, term.slope) : term.slope;
  if (!kSequence) slope = slope * Formula::open(p, log_ratio, t.advantage);
  F weight = one;
  metric(PolicyMetric::ref_kl) = zero;
  metric(PolicyMetric::sampling_weight) = zero;
  metric(PolicyMetric::sampling_kl) = zero;
  metric(PolicyMetric::sampling_clipped) = zero;
  if (in.sampling_logps) {
    const F mismatch = sampling_log_ratio(t);
    const SamplingWeight<F> w = sampling_weight(p, s, mismatch);
    const F applied = exp_of(w.log_weight) * w.kept;
    if (!Formula::kSamplingInRatio) weight = applied;
    metric(PolicyMetric::sampling_weight) = applied;
    metric(PolicyMetric::sampling_kl) = zero - mismatch;
    metric(PolicyMetric::sampling_clipped) = w.clipped;
  }
  r.loss = term.value * weight;
  r.through = Formula::kThroughRatio && kSequence ? slope * weight : zero;
  r.direct = Formula::kThroughRatio && kSequence ? zero : slope * weight;
  if (Formula::kPullsThroughRatio) {
    F& pulled = kSequence ? r.through : r.direct;
    pulled = pulled + select_lt(bound, abs(raw), zero, term.pull) * weight;
  }
  if (in.ref_logps) {
    add_reference_kl<kSequence>(p, t, ratio, select_lt(bound, abs(raw), zero, ratio), own_ratio, r);
  }
  if (in.entropy) r.loss = fma(F(-p.entropy_coef), t.entropy, r.loss);

  metric(PolicyMetric::clip_low) = term.low;
  metric(PolicyMetric::clip_high) = term.high;
  metric(PolicyMetric::clip_dual) = term.dual;
  metric(PolicyMetric::ratio) = ratio;
  const OldKl<F> old_kl(log_ratio, own, own_ratio);
  metric(PolicyMetric::old_kl_k1) = old_kl.k1;
  metric(PolicyMetric::old_kl_k2) = old_kl.k2;
  metric(PolicyMetric::old_kl_k3) = old_kl.k3;
  metric(PolicyMetric::entropy) = t.entropy;
  return r;
}

// The sums over a sequence that its tokens need at sequence level.
template <class F>
struct PolicySums {
  F log_ratio = F(0.0f), sampling = F(0.0f);
};
template <class Formula, class F>
RLHF_FAST_HD void add_to_sums(const PolicyLossInputs& in, const PolicyToken<F>& t,
                              PolicySums<F>& sums) {
  const F zero(0.0f);
  F x = Formula::tempered(in.params, t.logp - t.old, t.advantage);
  F mismatch = zero;
  if (in.sampling_logps) {
    mismatch = sampling_log_ratio(t);
    if (Formula::kSamplingInRatio) {
      const SamplingWeight<F> w = sampling_weight(in.params, PolicySequence{}, mismatch);
      const F smallest(GammaWeight::kLogSmallest);
      x = x +
          select_lt(zero, w.kept, clamp(w.log_weight, GammaWeight::kLogSmallest, 20.0f), smallest);
    }
  }
  sums.log_ratio = sums.log_ratio + select_lt(zero, t.counts, x, zero);
  sums.sampling = sums.sampling + select_lt(zero, t.counts, mismatch, zero);
}

// `weight`: of a token's loss in the batch's.
RLHF_FAST_HD PolicySequence policy_sequence(const PolicyParams& p, float weight, float length,
                                            const PolicySums<float>& sums) {
  const float inverse = length > 0.0f ? 1.0f / length : 0.0f;
  const bool mean = p.ratio_level == RatioLevel::kSequenceMean;
  return {weight, mean ? sums.log_ratio * inverse : sums.log_ratio, mean ? inverse : 1.0f,
          sums.sampling, sums.sampling * inverse};
}

// Whether all tokens of a sequence have the same loss, where that is a function of its ratio.
RLHF_FAST_HD bool is_one_action(const PolicyLossInputs& in) {
  return in.params.advantages_are_per_sequence && !in.ref_logps && !in.sampling_logps &&
         !in.entropy;
}

// Whether a sequence's sums are needed before its tokens.
RLHF_FAST_HD bool needs_sums(const PolicyLossInputs& in) {
  return in.params.ratio_level != RatioLevel::kToken ||
         (in.sampling_logps && in.params.sampling_level != SamplingLevel::kToken);
}

}  // namespace rlhf_fast
