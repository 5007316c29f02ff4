// Policy-gradient losses: value, gradient and metrics of a batch.
//
// One launch: one block per sequence for losses, gradient and the sequence's sums; the last block
// to end adds these up in a fixed order. How many tokens the batch has is known only then, so the
// gradient comes without that factor, which backward multiplies in with the upstream. With the
// ratio at sequence level a block walks its sequence up to three times, from L1.
// Floor: each given input read once, d_logps written once, e.g. 13 bytes a token for PPO with
// advantages per sequence.
#include "rlhf_fast/policy_loss.h"

#include "tokens.cuh"

#include "../math/policy_token.h"  // after the float functions it uses

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kLoss = int(PolicyMetric::num_tokens);  // its place among a sequence's sums

RLHF_FAST_DEVICE PolicyToken<float> token_at(const PolicyLossInputs& in, int64_t t) {
  PolicyToken<float> token;
  token.logp = in.logps[t];
  token.old = in.old_logps ? in.old_logps[t] : token.logp;
  token.advantage = in.advantages[in.params.advantages_are_per_sequence ? blockIdx.x : t];
  token.ref = in.ref_logps ? in.ref_logps[t] : 0.0f;
  token.sampling = in.sampling_logps ? in.sampling_logps[t] : 0.0f;
  token.entropy = in.entropy ? in.entropy[t] : 0.0f;
  token.counts = !in.mask || in.mask[t] ? 1.0f : 0.0f;
  return token;
}

// One warp per number: the loss and each metric.
RLHF_FAST_DEVICE void finish(const PolicyLossInputs& in, const PolicyLossOutputs& out) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t num_sequences = in.sequences.count;
  const BatchCounts counts = count_batch(out.lengths, num_sequences);
  const float scale = weight_of_counts(in.aggregation, counts.tokens, counts.sequences);
  for (int m = warp; m < kNumPolicyMetrics; m += kTokenWarps) {
    const double sum = sum_column(out.partials + m, num_sequences, kNumPolicyMetrics);
    if (lane != 0) continue;
    if (m == kLoss) {
      *out.loss = float(sum * scale);
      *out.scale = scale;
      out.metrics[m] = float(counts.tokens);
    } else {
      out.metrics[m] = float(sum / (counts.tokens > 1.0 ? counts.tokens : 1.0));
    }
  }
}

template <class Formula, bool kSequence>
__global__ void __launch_bounds__(kTokenBlock)
    policy_loss_kernel(PolicyLossInputs in, PolicyLossOutputs out) {
  const Span span = span_of(in.sequences, blockIdx.x);
  const float length = length_of_block(span, in.mask, out.lengths);
  PolicySums<float> sums;
  if (needs_sums(in)) {
    for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
      add_to_sums<Formula>(in, token_at(in, t), sums);
    }
    const Totals<2> total = sum_block<kTokenBlock>(Totals<2>{{sums.log_ratio, sums.sampling}});
    sums = {total[0], total[1]};
  }
  const float weight =
      token_weight(in.aggregation, weight_before_counts(in.aggregation), blockIdx.x, length);
  const PolicySequence sequence = policy_sequence(in.params, weight, length, sums);

  Totals<kNumPolicyMetrics> metrics{};
  Totals<1> through{};
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
    const PolicyToken<float> token = token_at(in, t);
    const bool counts = token.counts > 0.0f;
    const PolicyTokenResult<float> r = policy_token<Formula, kSequence>(in, sequence, token);
    if (counts) {
#pragma unroll
      for (int m = 0; m < kLoss; ++m) metrics[m] += r.metrics[m];
      metrics[kLoss] += r.loss;
      if constexpr (kSequence) through[0] += r.through;
    }
    if (out.d_logps) out.d_logps[t] = counts ? r.direct * sequence.weight : 0.0f;
    if (out.d_entropy) {
      out.d_entropy[t] = counts ? -in.params.entropy_coef * sequence.weight : 0.0f;
    }
  }
  if constexpr (kSequence) {
    const float slope = sum_block<kTokenBlock>(through)[0] * sequence.weight * sequence.ratio_slope;
    const int64_t end = out.d_logps && slope != 0.0f ? span.end : span.begin;
    for (int64_t t = span.begin + threadIdx.x; t < end; t += kTokenBlock) {
      const PolicyToken<float> token = token_at(in, t);
      const float open = Formula::open(in.params, token.logp - token.old, token.advantage);
      if (token.counts > 0.0f) out.d_logps[t] += open * slope;
    }
  }
  metrics = sum_block<kTokenBlock>(metrics);
  metrics[kLoss] *= sequence.weight;
  write_partials(out.partials, metrics);
  if (is_last_block(out.ticket)) finish(in, out);
}

template <class Formula>
void launch_losses(const PolicyLossInputs& in, const PolicyLossOutputs& out, CudaTarget target) {
  dispatch_bool(in.params.ratio_level != RatioLevel::kToken, [&](auto sequence) {
    launch(&policy_loss_kernel<Formula, decltype(sequence)::value>, in.sequences.count, kTokenBlock,
           target, in, out);
  });
}

}  // namespace
}  // namespace gpu

void policy_loss_cuda(const PolicyLossInputs& in, const PolicyLossOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  switch (in.params.loss) {
#define RLHF_FAST_CASE(name, Formula, level) \
  case PolicyLoss::name: gpu::launch_losses<Formula>(in, out, target); break;
    RLHF_FAST_POLICY_LOSSES(RLHF_FAST_CASE)
#undef RLHF_FAST_CASE
  }
}

}  // namespace rlhf_fast
