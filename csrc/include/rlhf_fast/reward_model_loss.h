// Regression losses of reward heads: several numbers per response, some of them unknown.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// Every loss: its name, its formula in csrc/math/regression.h.
#define RLHF_FAST_REWARD_LOSSES(X) \
  X(squared, Squared)              \
  X(huber, Huber)                  \
  X(quantile, Quantile)            \
  X(binary, Binary)

enum class RewardLoss : int {
#define RLHF_FAST_ROW(name, Formula) name,
  RLHF_FAST_REWARD_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
};

// (responses, heads), dense; a target may be one per response, for all heads.
struct RewardInputs {
  RewardLoss loss = RewardLoss::squared;
  int64_t num_responses = 0;
  int64_t num_heads = 0;
  const float* predictions = nullptr;
  const float* targets = nullptr;
  bool one_target = false;        // (responses,)
  const bool* mask = nullptr;     // (responses, heads): entries that count; all without it
  const float* levels = nullptr;  // (heads,): of the quantiles
  float delta = 1.0f;             // of the Huber loss
  bool mean = false;              // divide by the number of entries that count
};

struct RewardOutputs {
  float* losses = nullptr;  // (responses, heads); 0 where the mask is not set
  float* grads = nullptr;   // the same
  float* total = nullptr;   // sum of the losses
};

void reward_model_loss_cpu(const RewardInputs& in, const RewardOutputs& out, int num_threads);
void reward_model_loss_cuda(const RewardInputs& in, const RewardOutputs& out, CudaTarget target);

}  // namespace rlhf_fast
