// The squared error of a value model, clipped as in PPO: value, gradient and metrics in one call.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

#define RLHF_FAST_VALUE_METRICS(X)                                              \
  X(clip_fraction)      /* share of tokens whose clipped error is the larger */ \
  X(value)              /* mean */                                              \
  X(return_)            /* mean */                                              \
  X(squared_error)      /* mean of (value - return)^2, not clipped */           \
  X(explained_variance) /* 1 - var(return - value) / var(return) */             \
  X(num_tokens)

enum class ValueMetric : int {
#define RLHF_FAST_ENUMERATOR(name) name,
  RLHF_FAST_VALUE_METRICS(RLHF_FAST_ENUMERATOR)
#undef RLHF_FAST_ENUMERATOR
};
constexpr int kNumValueMetrics = int(ValueMetric::num_tokens) + 1;

// What a sequence adds up to; clip, value, return, squared error, squared return, loss.
constexpr int kNumValueSums = 6;

struct ValueLossInputs {
  Sequences sequences;
  const float* values = nullptr;
  const float* old_values = nullptr;  // null: nothing is clipped
  const float* returns = nullptr;
  const bool* mask = nullptr;
  float clip = 0.0f;  // values count as at most this far from the old ones
  Aggregation aggregation;
};

struct ValueLossOutputs {
  float* loss = nullptr;
  float* metrics = nullptr;   // (kNumValueMetrics,)
  float* d_values = nullptr;  // gradient of the loss
  float* lengths = nullptr;   // scratch, (sequences.count,)
  float* partials = nullptr;  // scratch, (sequences.count, kNumValueSums)
  float* scale = nullptr;     // as in PolicyLossOutputs
  unsigned* ticket = nullptr;
};

void value_loss_cpu(const ValueLossInputs& in, const ValueLossOutputs& out, int num_threads);
void value_loss_cuda(const ValueLossInputs& in, const ValueLossOutputs& out, CudaTarget target);

}  // namespace rlhf_fast
