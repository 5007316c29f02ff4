// The value model's loss, gradient and metrics, in one launch as policy_loss.cu. Floor: values, old
// values, returns and mask read once, d_values written once, 17 bytes a token.
#include "rlhf_fast/value_loss.h"

#include "tokens.cuh"

#include "../math/value.h"  // after the float functions it uses

namespace rlhf_fast {
namespace gpu {
namespace {

// By the first warp of the last block.
RLHF_FAST_DEVICE void finish(const ValueLossInputs& in, const ValueLossOutputs& out) {
  const int64_t num_sequences = in.sequences.count;
  double sums[kNumValueSums];
#pragma unroll
  for (int m = 0; m < kNumValueSums; ++m) {
    sums[m] = sum_column(out.partials + m, num_sequences, kNumValueSums);
  }
  const BatchCounts counts = count_batch(out.lengths, num_sequences);
  const float scale = weight_of_counts(in.aggregation, counts.tokens, counts.sequences);
  const int lane = threadIdx.x;
  if (lane == 0) {
    *out.loss = float(sums[int(ValueSum::kLoss)] * scale);
    *out.scale = scale;
  }
  if (lane < kNumValueMetrics) {
    out.metrics[lane] = value_metric(static_cast<ValueMetric>(lane), counts.tokens, sums[0],
                                     sums[1], sums[2], sums[3], sums[4]);
  }
}

__global__ void __launch_bounds__(kTokenBlock)
    value_loss_kernel(ValueLossInputs in, ValueLossOutputs out) {
  const Span span = span_of(in.sequences, blockIdx.x);
  const float length = length_of_block(span, in.mask, out.lengths);
  const float weight =
      token_weight(in.aggregation, weight_before_counts(in.aggregation), blockIdx.x, length);
  Totals<kNumValueSums> sums{};
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
    const bool counts = !in.mask || in.mask[t];
    const ValueTerm<float> term = value_term(
        in, in.values[t], in.old_values ? in.old_values[t] : in.values[t], in.returns[t]);
    if (counts) {
#pragma unroll
      for (int m = 0; m < kNumValueSums; ++m) sums[m] += term.sums[m];
    }
    if (out.d_values) out.d_values[t] = counts ? term.slope * weight : 0.0f;
  }
  sums = sum_block<kTokenBlock>(sums);
  sums[int(ValueSum::kLoss)] *= weight;
  write_partials(out.partials, sums);
  if (is_last_block(out.ticket) && threadIdx.x < 32) finish(in, out);
}

}  // namespace
}  // namespace gpu

void value_loss_cuda(const ValueLossInputs& in, const ValueLossOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::value_loss_kernel, in.sequences.count, gpu::kTokenBlock, target, in, out);
}

}  // namespace rlhf_fast
