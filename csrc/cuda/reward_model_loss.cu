// Regression losses of reward heads with their gradients, in one launch.
//
// One block, one thread an entry: it counts the entries first, since a mean divides the gradient
// too, then computes losses, gradients and their sum, in a fixed order. About 9 bytes read and 8
// written an entry; a batch is a few thousand of them.
#include "rlhf_fast/reward_model_loss.h"

#include "launch.cuh"
#include "portable.cuh"
#include "rows.cuh"

#include "../math/regression.h"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kRewardBlock = 512;

RLHF_FAST_DEVICE float sum_over_block(float x) {
  return sum_block<kRewardBlock>(Totals<1>{{x}})[0];
}

__global__ void __launch_bounds__(kRewardBlock)
    reward_model_loss_kernel(RewardInputs in, RewardOutputs out) {
  const int64_t count = in.num_responses * in.num_heads;
  float counted = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kRewardBlock) {
    counted += !in.mask || in.mask[i] ? 1.0f : 0.0f;
  }
  counted = sum_over_block(counted);
  const float divisor = in.mean && counted > 0.0f ? counted : 1.0f;
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kRewardBlock) {
    const Dual<float> loss = reward_entry_loss<float>(in, i) / divisor;
    out.losses[i] = loss.value;
    out.grads[i] = loss.d_first;
    total += loss.value;
  }
  total = sum_over_block(total);
  if (threadIdx.x == 0) *out.total = total;
}

}  // namespace
}  // namespace gpu

void reward_model_loss_cuda(const RewardInputs& in, const RewardOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::reward_model_loss_kernel, 1, gpu::kRewardBlock, target, in, out);
}

}  // namespace rlhf_fast
