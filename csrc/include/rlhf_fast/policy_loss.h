// Policy-gradient losses of token log-probs: value, gradient and metrics in one call.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// The losses, in the order of their numbers: name, formula in csrc/math/policy.h, and the level at
// which it takes the ratio to the old policy: of each token, or one of the whole sequence.
#define RLHF_FAST_POLICY_LOSSES(X)                  \
  X(reinforce, LogProb, kToken)                     \
  X(ppo, ClippedRatio, kToken)                      \
  X(cispo, ClippedWeight, kToken)                   \
  X(dppo_tv, WithinTV, kToken)                      \
  X(dppo_kl, WithinKl, kToken)                      \
  X(sapo, SoftGate, kToken)                         \
  X(dro, SquaredLogRatio, kToken)                   \
  X(gspo, ClippedRatio, kSequenceMean)              \
  X(gspo_token, ClippedRatioOfToken, kSequenceMean) \
  X(rloo, ClippedRatio, kSequenceSum)               \
  X(gmpo, GeometricMean, kSequenceMean)             \
  X(vespo, GammaWeight, kSequenceSum)               \
  X(a_lol, PositiveWeight, kSequenceSum)

enum class PolicyLoss : int {
#define RLHF_FAST_ENUMERATOR(name, formula, level) name,
  RLHF_FAST_POLICY_LOSSES(RLHF_FAST_ENUMERATOR)
#undef RLHF_FAST_ENUMERATOR
};

// The log-ratio of a token, or the mean or sum of them over its sequence.
enum class RatioLevel : int { kToken, kSequenceMean, kSequenceSum };
enum class KlEstimator : int { kK1, kK2, kK3 };
// What is differentiated: the estimator; k2 in its place, perhaps weighted with the ratio; or the
// estimator times the ratio.
enum class KlCorrection : int { kNone, kStraightThrough, kWeightedStraightThrough, kImportance };
// What becomes of a ratio between trainer and sampler outside its bounds.
enum class SamplingCorrection : int { kTruncate, kMask };
// Whether that ratio is the token's; that of the whole sequence; or the token's, where the
// sequence's geometric mean decides what is masked.
enum class SamplingLevel : int { kToken, kSequence, kSequenceGate };

#define RLHF_FAST_POLICY_CHOICES(X)          \
  X(PolicyLoss, loss)                        \
  X(RatioLevel, ratio_level)                 \
  X(KlEstimator, kl_estimator)               \
  X(KlCorrection, kl_correction)             \
  X(SamplingCorrection, sampling_correction) \
  X(SamplingLevel, sampling_level)           \
  X(bool, advantages_are_per_sequence)

#define RLHF_FAST_POLICY_SETTINGS(X) \
  X(epsilon_low)                     \
  X(epsilon_high)                    \
  X(dual_clip) /* infinite: off */   \
  X(log_ratio_bound)                 \
  X(sapo_temperature_pos)            \
  X(sapo_temperature_neg)            \
  X(vespo_k_pos)                     \
  X(vespo_lambda_pos)                \
  X(vespo_k_neg)                     \
  X(vespo_lambda_neg)                \
  X(dro_beta)                        \
  X(kl_coef)                         \
  X(kl_bound)                        \
  X(entropy_coef)                    \
  X(sampling_log_low)                \
  X(sampling_log_high)

struct PolicyParams {
#define RLHF_FAST_FIELD(type, name) type name{};
  RLHF_FAST_POLICY_CHOICES(RLHF_FAST_FIELD)
#undef RLHF_FAST_FIELD
#define RLHF_FAST_FIELD(name) float name = 0.0f;
  RLHF_FAST_POLICY_SETTINGS(RLHF_FAST_FIELD)
#undef RLHF_FAST_FIELD
};

// Means over the tokens that count; the last is their number.
#define RLHF_FAST_POLICY_METRICS(X)                                              \
  X(clip_low)  /* ratio below the lower bound, and cut off */                    \
  X(clip_high) /* above the upper bound, and cut off */                          \
  X(clip_dual) /* above dual_clip, and cut off */                                \
  X(ratio)     /* to the old policy, at the loss's level */                      \
  X(old_kl_k1) /* three estimates of KL(old policy || policy) */                 \
  X(old_kl_k2)                                                                   \
  X(old_kl_k3)                                                                   \
  X(ref_kl) /* the chosen estimate of KL(policy || reference) */                 \
  X(entropy)                                                                     \
  X(sampling_weight)  /* applied for the mismatch between trainer and sampler */ \
  X(sampling_kl)      /* k1 estimate of KL(sampler || old policy) */             \
  X(sampling_clipped) /* truncated or masked */                                  \
  X(num_tokens)

enum class PolicyMetric : int {
#define RLHF_FAST_ENUMERATOR(name) name,
  RLHF_FAST_POLICY_METRICS(RLHF_FAST_ENUMERATOR)
#undef RLHF_FAST_ENUMERATOR
};
constexpr int kNumPolicyMetrics = int(PolicyMetric::num_tokens) + 1;

// All per token, float32; a null pointer means "not given".
struct PolicyLossInputs {
  Sequences sequences;
  const float* logps = nullptr;
  const float* old_logps = nullptr;  // null: the policy's own, so every ratio is 1
  const float* advantages = nullptr;
  const bool* mask = nullptr;
  const float* ref_logps = nullptr;
  const float* sampling_logps = nullptr;  // NaN where the sampler did not report one
  const float* entropy = nullptr;
  Aggregation aggregation;
  PolicyParams params;
};

struct PolicyLossOutputs {
  float* loss = nullptr;       // one number
  float* metrics = nullptr;    // (kNumPolicyMetrics,)
  float* d_logps = nullptr;    // gradient of the loss; null: not asked for
  float* d_entropy = nullptr;  // null: not asked for
  float* lengths = nullptr;    // scratch, (sequences.count,)
  float* partials = nullptr;   // scratch, (sequences.count, kNumPolicyMetrics)
  float* scale = nullptr;      // one number, what the gradients are still to be multiplied with
  unsigned* ticket = nullptr;  // CUDA: zero before and after; no other launch may use it meanwhile
};

void policy_loss_cpu(const PolicyLossInputs& in, const PolicyLossOutputs& out, int num_threads);
void policy_loss_cuda(const PolicyLossInputs& in, const PolicyLossOutputs& out, CudaTarget target);

}  // namespace rlhf_fast
