// How token losses become one number, for CUDA threads and CPU code.
#pragma once

#include "host_device.h"
#include "rlhf_fast/common.h"

namespace rlhf_fast {

// What a batch's summed loss is multiplied with. Counts are at least 1, so that a batch without
// tokens has loss 0.
RLHF_FAST_HD float batch_weight(const Aggregation& a, float num_tokens, float num_sequences) {
  if (a.denominator == Denominator::kGiven) return a.scale / (a.normalizer ? *a.normalizer : 1.0f);
  const float count = a.denominator == Denominator::kTokens ? num_tokens : num_sequences;
  return a.scale / (count > 1.0f ? count : 1.0f);
}

// The same in two factors, for kernels that know the counts only when they end.
RLHF_FAST_HD float weight_before_counts(const Aggregation& a) {
  return a.denominator == Denominator::kGiven ? batch_weight(a, 0.0f, 0.0f) : a.scale;
}
RLHF_FAST_HD float weight_of_counts(const Aggregation& a, double num_tokens, double num_sequences) {
  if (a.denominator == Denominator::kGiven) return 1.0f;
  const double count = a.denominator == Denominator::kTokens ? num_tokens : num_sequences;
  return float(1.0 / (count > 1.0 ? count : 1.0));
}

// What each token's loss is multiplied with, in sequence s of `length` tokens that count.
RLHF_FAST_HD float token_weight(const Aggregation& a, float batch, int64_t s, float length) {
  if (a.mean_over_tokens) batch = length > 0.0f ? batch / length : 0.0f;
  return a.sequence_weights ? batch * a.sequence_weights[s] : batch;
}

}  // namespace rlhf_fast
