// Preference losses of a batch: loss, gradient, rewards and their means in one launch.
//
// One block walks over the pairs, one thread a pair, and then adds up what its threads have seen,
// always in the same order. A batch is some hundreds of pairs at most, a few KB, so the launch is
// the cost: about 40 bytes read and 28 written a pair. Nothing is left for a second kernel, and the
// means leave as five numbers that the host reads with one copy. The one block may have all
// registers: with the share that ptxas would leave to others, it spills on some GPUs.
#include "rlhf_fast/preference_loss.h"

#include "launch.cuh"
#include "pairs.cuh"

namespace rlhf_fast {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kPairBlock, 1)
    preference_loss_kernel(PreferenceInputs in, PreferenceOutputs out) {
  for (int64_t i = threadIdx.x; i < in.count; i += kPairBlock) {
    write_pair(in, out, i, preference_of<float>(in, i));
  }
  add_up_pairs(in.count, out);  // of each pair in the thread that has written it
}

}  // namespace
}  // namespace gpu

void preference_loss_cuda(const PreferenceInputs& in, const PreferenceOutputs& out,
                          CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::preference_loss_kernel, 1, gpu::kPairBlock, target, in, out);
}

}  // namespace rlhf_fast
