// The regression losses of reward heads: value and derivative with respect to the prediction x, for
// a target y. A new one is a struct here and a row in rlhf_fast/reward_model_loss.h.
#pragma once

#include <cmath>

#include "dual.h"
#include "rlhf_fast/reward_model_loss.h"

namespace rlhf_fast {

template <class T>
struct RewardEntry {
  Dual<T> x;  // its first derivative is the gradient
  T y;
  T level;
  T delta;
};

// (x - y)^2, multi-objective regression on absolute ratings, arXiv 2406.12845.
struct Squared {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const RewardEntry<T>& e) {
    return square(e.x - e.y);
  }
};

// Half the square up to delta, then linear.
struct Huber {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const RewardEntry<T>& e) {
    const Dual<T> error = e.x - e.y;
    const Dual<T> size = error.value < T(0) ? -error : error;
    return size.value > e.delta ? e.delta * (size - T(0.5) * e.delta) : T(0.5) * square(size);
  }
};

// The pinball loss, whose minimum is the quantile of level tau, arXiv 2409.10164:
// max(tau (y - x), (tau - 1) (y - x)).
struct Quantile {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const RewardEntry<T>& e) {
    const Dual<T> error = e.y - e.x;
    return error.value > T(0) ? e.level * error : (e.level - T(1)) * error;
  }
};

// Cross-entropy of a sigmoid with a label in [0, 1]: binary feedback and principles.
struct Binary {
  template <class T>
  RLHF_FAST_HD static Dual<T> loss(const RewardEntry<T>& e) {
    return softplus(e.x) - e.y * e.x;
  }
};

template <class T>
RLHF_FAST_HD Dual<T> loss_of(RewardLoss loss, const RewardEntry<T>& entry) {
  switch (loss) {
#define RLHF_FAST_ROW(name, Formula) \
  case RewardLoss::name: return Formula::loss(entry);
    RLHF_FAST_REWARD_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  }
  return {};
}

// Entry i of a batch, not yet divided; entries that do not count are not looked at.
template <class T>
RLHF_FAST_HD Dual<T> reward_entry_loss(const RewardInputs& in, int64_t i) {
  if (in.mask && !in.mask[i]) return {};
  const int64_t response = in.levels || in.one_target ? i / in.num_heads : 0;  // divisions are slow
  const T level = in.levels ? T(in.levels[i - response * in.num_heads]) : T(0.5);
  const T target = T(in.targets[in.one_target ? response : i]);
  return loss_of(in.loss,
                 RewardEntry<T>{{T(in.predictions[i]), T(1), T(0)}, target, level, T(in.delta)});
}

}  // namespace rlhf_fast
