// Advantages of completions within their groups: one warp per group. The rewards of a batch fit
// into L1, so this is bound by the launch.
#include "rlhf_fast/group_advantages.h"

#include "launch.cuh"

#include "../math/advantages.h"  // after the float functions it uses

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kWarps = 4;

struct WarpLanes {
  int64_t first, stride = 32;
  RLHF_FAST_DEVICE double sum(double x) const {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }
};

__global__ void __launch_bounds__(kWarps * 32, 8)
    group_advantages_kernel(GroupAdvantagesInputs in, GroupAdvantagesOutputs out) {
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= in.groups.count) return;
  advantages_of_group(in, out, group, WarpLanes{int64_t(threadIdx.x % 32)});
}

}  // namespace
}  // namespace gpu

void group_advantages_cuda(const GroupAdvantagesInputs& in, const GroupAdvantagesOutputs& out,
                           CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::group_advantages_kernel, (in.groups.count + gpu::kWarps - 1) / gpu::kWarps,
              gpu::kWarps * 32, target, in, out);
}

}  // namespace rlhf_fast
