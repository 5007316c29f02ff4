// Regression losses of reward heads with their gradients, in double: there are few of them.
#include "rlhf_fast/reward_model_loss.h"

#include "../math/regression.h"
#include "isa.h"
#include "parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void reward_model_loss(const RewardInputs& in, const RewardOutputs& out, int num_threads) {
  constexpr int64_t kPiece = 1024;
  const int64_t count = in.num_responses * in.num_heads;
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) counted += !in.mask || in.mask[i];
  const double weight = in.mean && counted > 0 ? 1.0 / static_cast<double>(counted) : 1.0;
  parallel_for(count, kPiece, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Dual<double> loss = weight * reward_entry_loss<double>(in, i);
      out.losses[i] = static_cast<float>(loss.value);
      out.grads[i] = static_cast<float>(loss.d_first);
    }
  });
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += out.losses[i];
  *out.total = static_cast<float>(total);
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(reward_model_loss, RewardInputs, RewardOutputs)

}  // namespace rlhf_fast
