// Policy-gradient losses: value, gradient and metrics of a batch. Compiled once per instruction
// set.
//
// A sequence is one thread's work, so its sums do not depend on the number of threads. With the
// ratio at sequence level it is walked up to three times, from L1: for the ratio, for the losses,
// and to hand each token its share of the slope. Otherwise each number is read once.
#include "rlhf_fast/policy_loss.h"

#include "../math/sequences.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"

#include "../math/policy.h"  // after the vector type it uses

namespace rlhf_fast {

// Throws if the loss is NaN because an advantage is. Defined once, below.
void check_advantages(const PolicyLossInputs& in, float loss);

namespace RLHF_FAST_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int kLoss = int(PolicyMetric::num_tokens);  // its place among a sequence's sums

template <class T>
RLHF_FAST_INLINE Vec load_some(const T* p, int64_t t, int64_t count) {
  return count == kWidth ? load(p + t) : load_part(p + t, count);
}

template <class Formula, bool kSequence>
class Sequence {
 public:
  Sequence(const PolicyLossInputs& in, const PolicyLossOutputs& out, int64_t s)
      : in_(in),
        out_(out),
        s_(s),
        span_(span_of(in.sequences, s)),
        advantage_(in.params.advantages_are_per_sequence ? in.advantages[s] : 0.0f) {}

  void run(float batch_weight) {
    PolicySums<float> sums;
    if (needs_sums(in_)) sums = add_up();
    if (in_.sequence_weights) batch_weight *= in_.sequence_weights[s_];
    sequence_ = policy_sequence(in_.params, batch_weight, out_.lengths[s_], sums);
    const float through = losses();
    if constexpr (kSequence) {
      if (through != 0.0f) hand_out(through * sequence_.ratio_slope);
    }
  }

 private:
  template <class Body>
  RLHF_FAST_INLINE void for_each(Body body) const {
    int64_t t = span_.begin;
    for (; t + kWidth <= span_.end; t += kWidth) body(t, int64_t(kWidth));
    if (t < span_.end) body(t, span_.end - t);
  }

  RLHF_FAST_INLINE PolicyToken<Vec> token(int64_t t, int64_t count) const {
    auto optional = [&](const float* p) __attribute__((always_inline)) {
      return p ? load_some(p, t, count) : Vec(0.0f);
    };
    PolicyToken<Vec> token;
    token.logp = load_some(in_.logps, t, count);
    token.old = in_.old_logps ? load_some(in_.old_logps, t, count) : token.logp;
    token.advantage = in_.params.advantages_are_per_sequence ? Vec(advantage_)
                                                             : load_some(in_.advantages, t, count);
    token.ref = optional(in_.ref_logps);
    token.sampling = optional(in_.sampling_logps);
    token.entropy = optional(in_.entropy);
    token.counts = in_.mask ? load_some(in_.mask, t, count) : Vec(1.0f);
    if (count < kWidth) token.counts = keep_lanes(token.counts, count, 0.0f);
    return token;
  }

  PolicySums<float> add_up() const {
    PolicySums<Vec> sums;
    for_each([&](int64_t t, int64_t count) __attribute__((always_inline)) {
      add_to_sums<Formula>(in_, token(t, count), sums);
    });
    return {sum_of(sums.log_ratio), sum_of(sums.sampling)};
  }

  // Writes what does not go through the sequence's ratio; returns the slope in that ratio.
  float losses() const {
    const Vec zero(0.0f), weight(sequence_.weight);
    const Vec d_entropy(-in_.params.entropy_coef * sequence_.weight);
    Vec sums[kNumPolicyMetrics], through = zero;
    for (Vec& sum : sums) sum = zero;
    for_each([&](int64_t t, int64_t count) __attribute__((always_inline)) {
      const PolicyToken<Vec> own = token(t, count);
      const PolicyTokenResult<Vec> r = policy_token<Formula, kSequence>(in_, sequence_, own);
      auto counted = [&](Vec x) __attribute__((always_inline)) {
        return select_lt(zero, own.counts, x, zero);
      };
      for (int m = 0; m < kLoss; ++m) sums[m] = sums[m] + counted(r.metrics[m]);
      sums[kLoss] = sums[kLoss] + counted(r.loss);
      if constexpr (kSequence) through = through + counted(r.through);
      put(out_.d_logps, t, count, counted(r.direct * weight));
      if (out_.d_entropy) put(out_.d_entropy, t, count, counted(d_entropy));
    });
    float* partials = out_.partials + s_ * kNumPolicyMetrics;
    for (int m = 0; m < kNumPolicyMetrics; ++m) partials[m] = sum_of(sums[m]);
    partials[kLoss] *= sequence_.weight;
    return sum_of(through) * sequence_.weight;
  }

  void hand_out(float slope) const {
    for_each([&](int64_t t, int64_t count) __attribute__((always_inline)) {
      const PolicyToken<Vec> own = token(t, count);
      const Vec share = Formula::open(in_.params, own.logp - own.old, own.advantage) * Vec(slope);
      const Vec before = load_some(out_.d_logps, t, count);
      put(out_.d_logps, t, count, before + select_lt(Vec(0.0f), own.counts, share, Vec(0.0f)));
    });
  }

  RLHF_FAST_INLINE static void put(float* to, int64_t t, int64_t count, Vec x) {
    count == kWidth ? store(to + t, x) : store_part(to + t, x, count);
  }

  const PolicyLossInputs& in_;
  const PolicyLossOutputs& out_;
  const int64_t s_;
  const Span span_;
  const float advantage_;
  PolicySequence sequence_;
};

int64_t count_tokens(const bool* mask, Span span) {
  int64_t sum = 0;
  for (int64_t t = span.begin; t < span.end;) {
    const int64_t end = t + 128 < span.end ? t + 128 : span.end;
    uint8_t part = 0;  // the compiler adds bytes, many at a time
    for (; t < end; ++t) part = uint8_t(part + mask[t]);
    sum += part;
  }
  return sum;
}

template <class Formula, bool kSequence>
void all_sequences(const PolicyLossInputs& in, const PolicyLossOutputs& out, float weight,
                   int64_t piece, int num_threads) {
  parallel_for(in.sequences.count, piece, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) Sequence<Formula, kSequence>(in, out, s).run(weight);
  });
}

void finish(const PolicyLossInputs& in, const PolicyLossOutputs& out, double num_tokens) {
  double sums[kNumPolicyMetrics] = {};
  for (int64_t s = 0; s < in.sequences.count; ++s) {
    for (int m = 0; m < kNumPolicyMetrics; ++m) sums[m] += out.partials[s * kNumPolicyMetrics + m];
  }
  *out.loss = float(sums[kLoss]);
  for (int m = 0; m < kLoss; ++m) {
    out.metrics[m] = float(sums[m] / (num_tokens > 1.0 ? num_tokens : 1.0));
  }
  out.metrics[kLoss] = float(num_tokens);
}

}  // namespace

void policy_loss(const PolicyLossInputs& in, const PolicyLossOutputs& out, int num_threads) {
  const int64_t count = in.sequences.count, total = in.sequences.total;
  const int64_t piece = 1 + count * 8192 / (total + 1);
  parallel_for(count, piece, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Span span = span_of(in.sequences, s);
      out.lengths[s] = float(in.mask ? count_tokens(in.mask, span) : span.end - span.begin);
    }
  });
  double num_tokens = 0.0, num_sequences = 0.0;
  for (int64_t s = 0; s < count; ++s) {
    num_tokens += out.lengths[s];
    num_sequences += out.lengths[s] > 0.0f;
  }
  const float weight =
      in.params.scale / policy_denominator(in, float(num_tokens), float(num_sequences));
  const bool sequence = in.params.ratio_level != RatioLevel::kToken;
  switch (in.params.loss) {
#define RLHF_FAST_CASE(name, Formula, level)                                       \
  case PolicyLoss::name:                                                           \
    sequence ? all_sequences<Formula, true>(in, out, weight, piece, num_threads)   \
             : all_sequences<Formula, false>(in, out, weight, piece, num_threads); \
    break;
    RLHF_FAST_POLICY_LOSSES(RLHF_FAST_CASE)
#undef RLHF_FAST_CASE
  }
  finish(in, out, num_tokens);
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
