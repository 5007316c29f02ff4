// Policy-gradient losses: value, gradient and metrics of a batch. Compiled once per instruction
// set.
//
// A sequence is one thread's work, so its sums do not depend on the number of threads. Token by
// token each number is read once. With the ratio at sequence level a sequence is walked up to three
// times, from L1: for the ratio, for the losses, and to hand each token its share of the slope. Two
// walks are enough where all of its tokens have the same loss.
#include "rlhf_fast/policy_loss.h"

#include "exponential.h"
#include "isa.h"
#include "tokens.h"

#include "../math/policy_token.h"  // after the vector type it uses

namespace rlhf_fast {

// Throws if the loss is NaN because an advantage is. Defined once, below.
void check_advantages(const PolicyLossInputs& in, float loss);

namespace RLHF_FAST_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int kLoss = int(PolicyMetric::num_tokens);  // its place among a sequence's sums

RLHF_FAST_INLINE bool is_plain(const PolicyLossInputs& in, const PolicyLossOutputs& out) {
  return !in.ref_logps && !in.sampling_logps && !in.entropy && !out.d_entropy;
}

// kPlain: without reference, sampler's log-probs and entropy. The compiler is told, as only then
// everything fits into registers.
template <class Formula, bool kSequence, bool kPlain>
class Sequence {
 public:
  Sequence(const PolicyLossInputs& in, const PolicyLossOutputs& out, int64_t s)
      : in_(in),
        out_(out),
        s_(s),
        span_(span_of(in.sequences, s)),
        advantage_(in.params.advantages_are_per_sequence ? in.advantages[s] : 0.0f) {}

  RLHF_FAST_INLINE void run(float batch_weight) {
    if (kPlain && !is_plain(in_, out_)) __builtin_unreachable();
    const float length = out_.lengths[s_];
    const float weight = token_weight(in_.aggregation, batch_weight, s_, length);
    const bool alike = kSequence && Formula::kThroughRatio && is_one_action(in_);
    PolicySums<float> sums;
    if (alike) {
      sums = add_up<true>();
    } else if (needs_sums(in_)) {
      sums = add_up<false>();
    }
    sequence_ = policy_sequence(in_.params, weight, length, sums);
    const double through = alike ? one_loss(length) : losses();
    if constexpr (kSequence) {
      if (out_.d_logps && (through != 0.0 || handed_out())) {
        // 1 / length is in the weight as well: rounded alike, the two would err together.
        const bool mean = in_.params.ratio_level == RatioLevel::kSequenceMean && length > 0.0f;
        hand_out(float(mean ? through / length : through));
      }
    }
  }

 private:
  RLHF_FAST_INLINE PolicyToken<Vec> token(int64_t t, int64_t count) const {
    auto optional = [&](const float* p) __attribute__((always_inline)) {
      return p ? load_stream(p, t, count) : Vec(0.0f);
    };
    PolicyToken<Vec> token;
    token.logp = load_stream(in_.logps, t, count);
    token.old = in_.old_logps ? load_stream(in_.old_logps, t, count) : token.logp;
    token.advantage = in_.params.advantages_are_per_sequence
                          ? Vec(advantage_)
                          : load_stream(in_.advantages, t, count);
    token.ref = optional(in_.ref_logps);
    token.sampling = optional(in_.sampling_logps);
    token.entropy = optional(in_.entropy);
    token.counts = load_counts(in_.mask, t, count);
    return token;
  }

  float* partials() const { return out_.partials + s_ * kNumPolicyMetrics; }

  // With the metrics that losses() adds up otherwise.
  template <bool kMetrics>
  RLHF_FAST_INLINE PolicySums<float> add_up() const {
    const float bound = in_.params.log_ratio_bound;
    PolicySums<Vec> sums;
    const Vec zero(0.0f);
    Vec k1 = zero, k2 = zero, k3 = zero;
    double log_ratio = 0.0, sampling = 0.0;
    for_each_vector(
        span_,
        [&](int64_t t, int64_t count) __attribute__((always_inline)) {
          if (none_counts(in_.mask, t, count)) return;
          const PolicyToken<Vec> own = token(t, count);
          add_to_sums<Formula>(in_, own, sums);
          if constexpr (kMetrics) {
            const Vec x = select_lt(zero, own.counts, own.logp - own.old, zero);
            const Vec bounded = clamp(x, -bound, bound);
            const OldKl<Vec> kl(x, bounded, exp_of(bounded));
            k1 = k1 + kl.k1;
            k2 = k2 + kl.k2;
            k3 = k3 + kl.k3;
          }
        },
        [&]() __attribute__((always_inline)) {
          log_ratio += sum_of(sums.log_ratio);
          if (in_.sampling_logps) sampling += sum_of(sums.sampling);
          sums = PolicySums<Vec>{};
        });
    if constexpr (kMetrics) {
      partials()[int(PolicyMetric::old_kl_k1)] = sum_of(k1);
      partials()[int(PolicyMetric::old_kl_k2)] = sum_of(k2);
      partials()[int(PolicyMetric::old_kl_k3)] = sum_of(k3);
    }
    return {float(log_ratio), float(sampling)};
  }

  // Whether all of the gradient goes through the sequence's ratio and is written by hand_out.
  bool handed_out() const { return kSequence && Formula::kThroughRatio && !in_.ref_logps; }

  // Where each token has the same loss: returns the slope in the sequence's ratio.
  RLHF_FAST_INLINE double one_loss(float length) const {
    PolicyToken<Vec> token{};
    token.advantage = Vec(advantage_);
    const PolicyTokenResult<Vec> r = policy_token<Formula, kSequence>(in_, sequence_, token);
    for (int m = 0; m < kLoss; ++m) {
      const bool is_known = m >= int(PolicyMetric::old_kl_k1) && m <= int(PolicyMetric::old_kl_k3);
      if (!is_known) partials()[m] = length > 0.0f ? length * first_lane(r.metrics[m]) : 0.0f;
    }
    const double total = length > 0.0f ? double(length) * sequence_.weight : 0.0;
    partials()[kLoss] = total == 0.0 ? 0.0f : float(total * first_lane(r.loss));
    return total == 0.0 ? 0.0 : total * first_lane(r.through);
  }

  // Writes what does not go through the sequence's ratio; returns the slope in that ratio.
  RLHF_FAST_INLINE double losses() const {
    const Vec zero(0.0f), weight(sequence_.weight);
    const Vec d_entropy(-in_.params.entropy_coef * sequence_.weight);
    float* d_logps = handed_out() ? nullptr : out_.d_logps;
    Vec sums[kNumPolicyMetrics], through = zero;
    for (Vec& sum : sums) sum = zero;
    double total_loss = 0.0, total_through = 0.0;
    for_each_vector(
        span_,
        [&](int64_t t, int64_t count) __attribute__((always_inline)) {
          if (none_counts(in_.mask, t, count)) {
            if (d_logps) store(d_logps + t, zero);
            if (out_.d_entropy) store(out_.d_entropy + t, zero);
            return;
          }
          const PolicyToken<Vec> own = token(t, count);
          const PolicyTokenResult<Vec> r = policy_token<Formula, kSequence>(in_, sequence_, own);
          auto counted = [&](Vec x) __attribute__((always_inline)) {
            return select_lt(zero, own.counts, x, zero);
          };
          auto add = [&](PolicyMetric m) __attribute__((always_inline)) {
            sums[int(m)] = add_counted(sums[int(m)], own.counts, r.metrics[int(m)]);
          };
          if constexpr (Formula::kClips) {
            add(PolicyMetric::clip_low);
            add(PolicyMetric::clip_high);
            add(PolicyMetric::clip_dual);
          }
          add(PolicyMetric::ratio);
          add(PolicyMetric::old_kl_k1);
          add(PolicyMetric::old_kl_k2);
          add(PolicyMetric::old_kl_k3);
          if (in_.ref_logps) add(PolicyMetric::ref_kl);
          if (in_.entropy) add(PolicyMetric::entropy);
          if (in_.sampling_logps) {
            add(PolicyMetric::sampling_weight);
            add(PolicyMetric::sampling_kl);
            add(PolicyMetric::sampling_clipped);
          }
          sums[kLoss] = add_counted(sums[kLoss], own.counts, r.loss);
          if constexpr (kSequence) through = add_counted(through, own.counts, r.through);
          if (d_logps) {
            prefetch<Vec::kWidth, 2048>(d_logps + t);
            store_some(d_logps, t, count, counted(r.direct * weight));
          }
          if (out_.d_entropy) store_some(out_.d_entropy, t, count, counted(d_entropy));
        },
        [&]() __attribute__((always_inline)) {
          total_loss += sum_of(sums[kLoss]);
          if constexpr (kSequence) total_through += sum_of(through);
          sums[kLoss] = through = zero;
        });
    for (int m = 0; m < kLoss; ++m) partials()[m] = sum_of(sums[m]);
    partials()[kLoss] = float(total_loss * sequence_.weight);
    return total_through * sequence_.weight;
  }

  RLHF_FAST_INLINE void hand_out(float slope) const {
    const Vec zero(0.0f);
    const bool first = handed_out();
    for_each_vector(
        span_,
        [&](int64_t t, int64_t count) __attribute__((always_inline)) {
          if (none_counts(in_.mask, t, count)) {
            if (first) store(out_.d_logps + t, zero);
            return;
          }
          const PolicyToken<Vec> own = token(t, count);
          const Vec open = Formula::open(in_.params, own.logp - own.old, own.advantage);
          const Vec share = select_lt(zero, own.counts, open * Vec(slope), zero);
          const Vec before = first ? zero : load_some(out_.d_logps, t, count);
          store_some(out_.d_logps, t, count, before + share);
        },
        [] {});
  }

  const PolicyLossInputs in_;  // a copy, which no store to a result can change
  const PolicyLossOutputs out_;
  const int64_t s_;
  const Span span_;
  const float advantage_;
  PolicySequence sequence_;
};

template <class Formula, bool kSequence, bool kPlain>
void all_sequences(const PolicyLossInputs& in, const PolicyLossOutputs& out, float weight,
                   int num_threads) {
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   prefetch_next(in.sequences, in.mask, s, in.logps, in.old_logps, out.d_logps);
                   Sequence<Formula, kSequence, kPlain>(in, out, s).run(weight);
                 }
               });
}

template <class Formula>
void all_losses(const PolicyLossInputs& in, const PolicyLossOutputs& out, float weight,
                int num_threads) {
  const bool sequence = in.params.ratio_level != RatioLevel::kToken;
  const bool plain = is_plain(in, out);
  const auto run =
      sequence
          ? (plain ? &all_sequences<Formula, true, true> : &all_sequences<Formula, true, false>)
          : (plain ? &all_sequences<Formula, false, true> : &all_sequences<Formula, false, false>);
  run(in, out, weight, num_threads);
}

}  // namespace

void policy_loss(const PolicyLossInputs& in, const PolicyLossOutputs& out, int num_threads) {
  const Lengths lengths = measure(in.sequences, in.mask, in.aggregation, out.lengths, num_threads);
  switch (in.params.loss) {
#define RLHF_FAST_CASE(name, Formula, level) \
  case PolicyLoss::name: all_losses<Formula>(in, out, lengths.weight, num_threads); break;
    RLHF_FAST_POLICY_LOSSES(RLHF_FAST_CASE)
#undef RLHF_FAST_CASE
  }
  auto sum = [&](int m) {
    return sum_column(out.partials, in.sequences.count, kNumPolicyMetrics, m);
  };
  const double num_tokens = lengths.num_tokens;
  for (int m = 0; m < kLoss; ++m) {
    out.metrics[m] = float(sum(m) / (num_tokens > 1.0 ? num_tokens : 1.0));
  }
  out.metrics[kLoss] = float(num_tokens);
  *out.loss = float(sum(kLoss));
  *out.scale = 1.0f;
  check_advantages(in, *out.loss);
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(policy_loss, PolicyLossInputs, PolicyLossOutputs)

}  // namespace rlhf_fast

#if defined(RLHF_FAST_ISA_IS_BASELINE)

#include <cmath>
#include <stdexcept>
#include <string>

void rlhf_fast::check_advantages(const PolicyLossInputs& in, float loss) {
  if (std::isfinite(loss)) return;
  for (int64_t s = 0; s < in.sequences.count; ++s) {
    const Span span = span_of(in.sequences, s);
    for (int64_t t = span.begin; t < span.end; ++t) {
      const float advantage = in.advantages[in.params.advantages_are_per_sequence ? s : t];
      if ((in.mask && !in.mask[t]) || std::isfinite(advantage)) continue;
      throw std::invalid_argument(
          "policy_loss: advantages must be finite where the mask holds, got " +
          std::to_string(advantage) + " at token " + std::to_string(t - span.begin) +
          " of sequence " + std::to_string(s) + "; check the rewards they come from");
    }
  }
}

#endif
