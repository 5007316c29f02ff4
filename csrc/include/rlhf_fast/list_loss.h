// Losses of ranked lists: groups of scored items with labels that say which should score higher.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// Every loss: its name, its formula in csrc/math/lists.h.
#define RLHF_FAST_LIST_LOSSES(X)         \
  X(lipo_lambda, LipoLambda)             \
  X(pairwise_logistic, PairwiseLogistic) \
  X(pairwise_hinge, PairwiseHinge)       \
  X(rrhf, PairwiseHinge)                 \
  X(plackett_luce, PlackettLuce)         \
  X(list_mle, PlackettLuce)              \
  X(pro, Pro)

enum class ListLoss : int {
#define RLHF_FAST_ROW(name, Formula) name,
  RLHF_FAST_LIST_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
};

struct ListInputs {
  ListLoss loss = ListLoss::plackett_luce;
  Sequences groups;
  const float* scores = nullptr;
  const float* labels = nullptr;  // greater is better; equal ones keep their order
  float margin = 0.0f;            // of the hinge
  float nll_weight = 0.0f;        // of minus the best item's score
  double scale = 1.0;             // of loss and gradients: 1 / groups for a mean
};

struct ListOutputs {
  float* losses = nullptr;      // (groups,), scaled
  float* grads = nullptr;       // (items,): d(total) / d(score), scaled
  float* total = nullptr;       // sum of the losses
  double* workspace = nullptr;  // (2, items)
};

// Throws std::invalid_argument for offsets that do not rise from 0 to the total and for NaN labels.
void list_loss_cpu(const ListInputs& in, const ListOutputs& out, int num_threads);

// Only launches. Items outside every group get no gradient.
void list_loss_cuda(const ListInputs& in, const ListOutputs& out, CudaTarget target);

}  // namespace rlhf_fast
