// What the losses of preference pairs share on CUDA: one thread a pair, and one block that adds up
// what all have written, always in the same order.
#pragma once

#include "rows.cuh"

#include "../math/preference_item.h"

namespace rlhf_fast::gpu {
namespace {

constexpr int kPairBlock = 256;

RLHF_FAST_DEVICE void write_pair(const PreferenceInputs& in, const PreferenceOutputs& out,
                                 int64_t i, const PreferenceResult<float>& r) {
  bool right = r.chosen_reward > r.rejected_reward;
  if (in.is_chosen) right = right == in.is_chosen[i];
  out.losses[i] = r.loss.value;
  out.grads[i] = r.loss.d_first;
  if (!in.is_chosen) out.grads[in.count + i] = r.loss.d_second;
  out.details[i] = r.chosen_reward;
  out.details[in.count + i] = r.rejected_reward;
  out.details[2 * in.count + i] = right ? 1.0f : 0.0f;
  out.details[3 * in.count + i] = r.chosen_reward - r.rejected_reward;
}

// By all threads of a block of kPairBlock; pair i is read by thread i % kPairBlock.
RLHF_FAST_DEVICE void add_up_pairs(int64_t count, const PreferenceOutputs& out) {
  Totals<5> sums{};
  for (int64_t i = threadIdx.x; i < count; i += kPairBlock) {
    sums[0] += out.losses[i];
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k + 1] += out.details[k * count + i];
  }
  sums = sum_block<kPairBlock>(sums);
  if (threadIdx.x == 0) {
    *out.total = sums[0];
#pragma unroll
    for (int k = 0; k < 4; ++k) out.means[k] = sums[k + 1] / static_cast<float>(count);
  }
}

}  // namespace
}  // namespace rlhf_fast::gpu
