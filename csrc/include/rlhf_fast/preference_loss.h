// Losses of preference pairs, or of single labelled responses, from sequence log-probs.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

enum PreferenceTrait : int {
  kReference = 1,   // scores are log-ratios to a reference
  kLengths = 2,     // scores are means over the response's tokens
  kDivergence = 4,  // the scores may be f-divergence scores
  kUnpaired = 8,    // a part for the chosen and a part for the rejected response
  kSorted = 16,     // compares sorted batches; sorted before the kernel
  kMargin = 32,     // takes margins,
  kSmoothing = 64,  // label smoothing,
  kTargets = 128,   // soft labels,
  kBaseline = 256,  // or a neutral log-ratio
  kSoft = kMargin | kSmoothing | kTargets,
};

// Every loss: its name, its formula in csrc/math/preference.h, its traits.
// clang-format off
#define RLHF_FAST_PREFERENCE_LOSSES(X)                                    \
  X(sigmoid, Sigmoid, kReference | kDivergence | kSoft)                   \
  X(sigmoid_norm, Sigmoid, kReference | kLengths | kDivergence | kSoft)   \
  X(robust, Robust, kReference | kDivergence | kMargin | kSmoothing)      \
  X(hinge, Hinge, kReference | kDivergence | kMargin)                     \
  X(ipo, Ipo, kReference | kLengths | kDivergence | kSoft)                \
  X(ipo_sum, Ipo, kReference | kDivergence | kSoft)                       \
  X(exo_pair, Exo, kReference | kDivergence | kMargin | kSmoothing)       \
  X(nca_pair, Nca, kReference | kUnpaired)                                \
  X(bco_pair, Bco, kReference | kUnpaired | kBaseline)                    \
  X(sppo_hard, Sppo, kReference | kUnpaired | kTargets)                   \
  X(aot, Sigmoid, kReference | kSorted | kMargin | kSmoothing)            \
  X(aot_unpaired, Sigmoid, kReference | kSorted | kMargin | kSmoothing)   \
  X(apo_zero, ApoZero, kReference | kUnpaired)                            \
  X(apo_down, ApoDown, kReference)                                        \
  X(discopop, DiscoPop, kReference | kDivergence | kMargin)               \
  X(dpop, DpoPositive, kReference | kMargin)                              \
  X(cal_dpo, CalDpo, kReference)                                          \
  X(kto, Kto, kReference | kUnpaired | kBaseline)                         \
  X(cpo, Sigmoid, kSoft)                                                  \
  X(simpo, Sigmoid, kLengths | kDivergence | kSoft)                       \
  X(slic, Slic, kMargin)                                                  \
  X(orpo, Orpo, kLengths)                                                 \
  X(sft, Sft, kLengths)                                                   \
  X(bradley_terry, Sigmoid, kSoft)
// clang-format on

enum class PreferenceLoss : int {
#define RLHF_FAST_ROW(name, Formula, traits) name,
  RLHF_FAST_PREFERENCE_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
};

enum class Divergence : int { kReverseKl, kForwardKl, kJensenShannon, kAlpha };

// What one call holds fixed for all pairs.
struct PreferenceSettings {
  PreferenceLoss loss = PreferenceLoss::sigmoid;
  Divergence divergence = Divergence::kReverseKl;
  float beta = 0.1f;
  float label_smoothing = 0.0f;
  float margin = 0.0f;           // in units of rewards, beta * score
  float nll_weight = 0.0f;       // of the chosen response's mean negative log-prob
  float center_weight = 0.0f;    // of (chosen score + rejected score)^2
  float alpha = 0.5f;            // of the alpha-divergence
  float temperature = 0.05f;     // DiscoPOP's tau
  float penalty = 0.0f;          // DPO-Positive's lambda
  float chosen_weight = 1.0f;    // of the chosen part of an unpaired loss
  float rejected_weight = 1.0f;  // and of the rejected part
};

// One item is a pair, or with `is_chosen` one response, whose log-prob is then in `chosen`.
struct PreferenceInputs {
  int64_t count = 0;
  PreferenceSettings settings;
  Column chosen, rejected, ref_chosen, ref_rejected;
  Column chosen_lengths, rejected_lengths;  // tokens; below 1 counts as 1
  Column weights;                           // multiply an item's whole loss
  Column margins;                           // added to the settings' margin
  Column targets;                           // probability that `chosen` wins, else 1
  const float* baseline = nullptr;          // one number: the log-ratio that counts as neutral
  const bool* is_chosen = nullptr;
  double scale = 1.0;  // of loss and gradients: 1 / count for a mean
};

// All are written; `rejected` halves are left alone for single responses.
struct PreferenceOutputs {
  float* losses = nullptr;   // (count,), scaled
  float* grads = nullptr;    // (2, count): d(loss) / d(chosen), d(rejected), scaled
  float* details = nullptr;  // (4, count): chosen and rejected rewards, accuracy, margin
  float* total = nullptr;    // sum of the losses
  float* means = nullptr;    // (4,): means of the details
};

// Throws std::invalid_argument for targets outside [0, 1], negative weights or lengths, and NaN in
// any of them.
void preference_loss_cpu(const PreferenceInputs& in, const PreferenceOutputs& out, int num_threads);

// Only launches.
void preference_loss_cuda(const PreferenceInputs& in, const PreferenceOutputs& out,
                          CudaTarget target);

}  // namespace rlhf_fast
