// Sums or means of token values per sequence, and their gradient: one launch each way.
//
// One block per sequence. Forward reads every value once (4 bytes a token, 1 more with a mask, 4
// with weights); each thread adds every kBlock-th token and the block adds up its threads in a
// fixed order, so results are repeatable and do not depend on the batch. Backward writes 4 bytes a
// token. Neither forms anything of the padded shape.
#include "rlhf_fast/segment_sum.h"

#include "launch.cuh"
#include "portable.cuh"
#include "rows.cuh"

#include "../math/sequences.h"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kSumBlock = 256;

__global__ void __launch_bounds__(kSumBlock)
    segment_sum_kernel(SegmentSumInputs in, SegmentSumOutputs out) {
  const int64_t s = blockIdx.x;
  const Span span = span_of(in.sequences, s);
  Totals<2> sum{};  // and count
#pragma unroll 4
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kSumBlock) {
    const bool counts = !in.mask || in.mask[t];
    const float x = in.weights ? in.values[t] * in.weights[t] : in.values[t];
    sum[0] += counts ? x : 0.0f;
    sum[1] += counts ? 1.0f : 0.0f;
  }
  sum = sum_block<kSumBlock>(sum);
  if (threadIdx.x == 0) {
    out.sums[s] = in.mean && sum[1] > 0.0f ? sum[0] / sum[1] : sum[0];
    out.counts[s] = sum[1];
  }
}

__global__ void __launch_bounds__(kSumBlock)
    segment_sum_backward_kernel(SegmentSumInputs in, SegmentSumGrads grads) {
  const int64_t s = blockIdx.x;
  const Span span = span_of(in.sequences, s);
  const bool divide = in.mean && grads.counts[s] > 0.0f;
  const float g = divide ? grads.grad_sums[s] / grads.counts[s] : grads.grad_sums[s];
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kSumBlock) {
    const float share = in.weights ? g * in.weights[t] : g;
    grads.grad_values[t] = !in.mask || in.mask[t] ? share : 0.0f;
  }
}

}  // namespace
}  // namespace gpu

void segment_sum_cuda(const SegmentSumInputs& in, const SegmentSumOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::segment_sum_kernel, in.sequences.count, gpu::kSumBlock, target, in, out);
}

void segment_sum_backward_cuda(const SegmentSumInputs& in, const SegmentSumGrads& grads,
                               CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::segment_sum_backward_kernel, in.sequences.count, gpu::kSumBlock, target, in,
              grads);
}

}  // namespace rlhf_fast
