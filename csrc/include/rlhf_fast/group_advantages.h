// Advantages of completions relative to the other completions of their prompt.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// The estimators, in the order of their numbers. Their formulas are in csrc/math/advantages.h.
#define RLHF_FAST_GROUP_ESTIMATORS(X) \
  X(grpo) X(dr_grpo) X(rloo) X(maxrl) X(opo) X(pass_at_k) X(best) X(rank)

enum class GroupEstimator : int {
#define RLHF_FAST_ENUMERATOR(name) name,
  RLHF_FAST_GROUP_ESTIMATORS(RLHF_FAST_ENUMERATOR)
#undef RLHF_FAST_ENUMERATOR
};

struct GroupAdvantagesInputs {
  Sequences groups;
  const float* rewards = nullptr;  // (groups.total,)
  const float* weights = nullptr;  // the same; completion lengths, for opo
  GroupEstimator estimator = GroupEstimator::grpo;
  float epsilon = 1e-6f;     // added to what divides
  int64_t k = 1;             // for pass_at_k
  bool unbiased = true;      // standard deviations divide by n - 1
  bool keep_single = false;  // a completion alone in its group: its reward, instead of 0
};

struct GroupAdvantagesOutputs {
  float* advantages = nullptr;
};

void group_advantages_cpu(const GroupAdvantagesInputs& in, const GroupAdvantagesOutputs& out,
                          int num_threads);
void group_advantages_cuda(const GroupAdvantagesInputs& in, const GroupAdvantagesOutputs& out,
                           CudaTarget target);

}  // namespace rlhf_fast
