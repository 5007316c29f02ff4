// Preference losses of a batch: loss, gradient, rewards and their means in one launch.
//
// One block walks over the pairs, one thread a pair, and then adds up what its threads have seen,
// always in the same order. A batch is some hundreds of pairs at most, a few KB, so the launch is
// the cost: about 40 bytes read and 28 written a pair. Nothing is left for a second kernel, and the
// means leave as five numbers that the host reads with one copy.
#include "rlhf_fast/preference_loss.h"

#include "launch.cuh"
#include "portable.cuh"
#include "rows.cuh"

#include "../math/preference.h"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kPairBlock = 256;

struct Sums {
  float value[5];
  RLHF_FAST_DEVICE float& operator[](int i) { return value[i]; }
  RLHF_FAST_DEVICE float operator[](int i) const { return value[i]; }
};

__global__ void __launch_bounds__(kPairBlock)
    preference_loss_kernel(PreferenceInputs in, PreferenceOutputs out) {
  Sums sums{};
  for (int64_t i = threadIdx.x; i < in.count; i += kPairBlock) {
    const PreferenceResult<float> r = preference_of<float>(in, i);
    bool right = r.chosen_reward > r.rejected_reward;
    if (in.is_chosen) right = right == in.is_chosen[i];
    const float details[4] = {r.chosen_reward, r.rejected_reward, right ? 1.0f : 0.0f,
                              r.chosen_reward - r.rejected_reward};
    out.losses[i] = r.loss.value;
    out.grads[i] = r.loss.d_first;
    if (!in.is_chosen) out.grads[in.count + i] = r.loss.d_second;
    sums[0] += r.loss.value;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      out.details[k * in.count + i] = details[k];
      sums[k + 1] += details[k];
    }
  }
  sums = reduce_block<kPairBlock>(sums, Sums{}, [](Sums a, const Sums& b) {
#pragma unroll
    for (int k = 0; k < 5; ++k) a[k] += b[k];
    return a;
  });
  if (threadIdx.x == 0) {
    *out.total = sums[0];
#pragma unroll
    for (int k = 0; k < 4; ++k) out.means[k] = sums[k + 1] / static_cast<float>(in.count);
  }
}

}  // namespace
}  // namespace gpu

void preference_loss_cuda(const PreferenceInputs& in, const PreferenceOutputs& out,
                          CudaTarget target) {
  const gpu::DeviceGuard guard(target.device);
  gpu::launch(&gpu::preference_loss_kernel, 1, gpu::kPairBlock, target, in, out);
}

}  // namespace rlhf_fast
