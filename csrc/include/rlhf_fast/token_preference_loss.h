// Losses of preference pairs from log-probs of tokens: sums, losses and the tokens' gradient.
#pragma once

#include "rlhf_fast/preference_loss.h"

namespace rlhf_fast {

struct TokenPreferenceInputs {
  // Two for each pair: all chosen ones and then all rejected ones, or by turns.
  Sequences sequences;
  bool interleaved = false;
  const float* logps = nullptr;
  const float* ref_logps = nullptr;  // null: the reference's sums are in `pairs`, if there are any
  const bool* mask = nullptr;        // what it leaves out is not looked at
  const float* weights = nullptr;    // multiply the log-probs before they are summed
  // Without log-probs. Lengths that are missing are the numbers of tokens that count.
  PreferenceInputs pairs;
};

struct TokenPreferenceOutputs {
  PreferenceOutputs pairs;
  float* d_logps = nullptr;    // gradient of the total; null: not asked for
  unsigned* ticket = nullptr;  // CUDA: zero before and after; no other launch may use it meanwhile
};

// Throws as preference_loss_cpu.
void token_preference_loss_cpu(const TokenPreferenceInputs& in, const TokenPreferenceOutputs& out,
                               int num_threads);
void token_preference_loss_cuda(const TokenPreferenceInputs& in, const TokenPreferenceOutputs& out,
                                CudaTarget target);

}  // namespace rlhf_fast
