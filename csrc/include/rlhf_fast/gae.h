// Generalised advantage estimation: a scan from each sequence's last token to its first.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// delta_t = rewards_t + gamma * V_{t+1} - V_t,  A_t = delta_t + gamma * lambda * A_{t+1}.
struct GaeInputs {
  Sequences sequences;
  const float* rewards = nullptr;
  const float* values = nullptr;            // null: 0
  const bool* mask = nullptr;               // null: every token counts
  const float* bootstrap_values = nullptr;  // (sequences.count,): V after the last token; null: 0
  float gamma = 1.0f;
  float lambda = 1.0f;
  // Masked tokens: true, they are as if removed; false, they are steps of reward and value 0.
  bool skip_masked = true;
};

// Both are 0 at masked tokens. returns = advantages + values.
struct GaeOutputs {
  float* advantages = nullptr;
  float* returns = nullptr;
};

void gae_forward_cpu(const GaeInputs& in, const GaeOutputs& out, int num_threads);
void gae_forward_cuda(const GaeInputs& in, const GaeOutputs& out, CudaTarget target);

}  // namespace rlhf_fast
