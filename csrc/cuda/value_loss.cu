// The value model's loss, gradient and metrics, in three launches as policy_loss.cu: lengths, one
// block per sequence, one block for the sums. Floor: values, old values, returns and mask read
// once, d_values written once, 17 bytes a token.
#include "rlhf_fast/value_loss.h"

#include "tokens.cuh"

#include "../math/value.h"  // after the float functions it uses

namespace rlhf_fast {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kTokenBlock)
    value_loss_kernel(ValueLossInputs in, ValueLossOutputs out) {
  const Span span = span_of(in.sequences, blockIdx.x);
  const float weight = weight_of_block(in.aggregation, out.lengths, in.sequences.count);
  Floats<kNumValueSums> sums{};
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
  sums = sum_block(sums);
  sums[int(ValueSum::kLoss)] *= weight;
  write_partials(out.partials, sums);
}

__global__ void __launch_bounds__(32)
    value_finish_kernel(ValueLossOutputs out, int64_t num_sequences) {
  double sums[kNumValueSums];
#pragma unroll
  for (int m = 0; m < kNumValueSums; ++m) {
    sums[m] = sum_column(out.partials + m, num_sequences, kNumValueSums);
  }
  const double num_tokens = sum_column(out.lengths, num_sequences, 1);
  const int lane = threadIdx.x;
  if (lane == 0) *out.loss = float(sums[int(ValueSum::kLoss)]);
  if (lane < kNumValueMetrics) {
    out.metrics[lane] = value_metric(static_cast<ValueMetric>(lane), num_tokens, sums[0], sums[1],
                                     sums[2], sums[3], sums[4]);
  }
}

}  // namespace
}  // namespace gpu

void value_loss_cuda(const ValueLossInputs& in, const ValueLossOutputs& out, CudaTarget target) {
  const gpu::DeviceGuard guard(target.device);
  const int64_t count = in.sequences.count;
  gpu::launch(&gpu::token_lengths_kernel, count, gpu::kTokenBlock, target, in.sequences, in.mask,
              out.lengths);
  gpu::launch(&gpu::value_loss_kernel, count, gpu::kTokenBlock, target, in, out);
  gpu::launch(&gpu::value_finish_kernel, 1, 32, target, out, count);
}

}  // namespace rlhf_fast
