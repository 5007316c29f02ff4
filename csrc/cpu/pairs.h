// What the losses of preference pairs share on the CPU. Pairs are independent; sums are taken in
// order afterwards, so they do not depend on the number of threads.
#pragma once

#include "../math/preference_item.h"
#include "simd.h"

namespace rlhf_fast {

// Throws for values that no loss can mean. Defined once, in preference_loss.cpp.
void check_inputs(const PreferenceInputs& in);

namespace RLHF_FAST_ISA {

RLHF_FAST_INLINE void write_pair(const PreferenceInputs& in, const PreferenceOutputs& out,
                                 int64_t i, const PreferenceResult<double>& r) {
  const double chosen = r.chosen_reward, rejected = r.rejected_reward;
  out.losses[i] = static_cast<float>(r.loss.value);
  out.grads[i] = static_cast<float>(r.loss.d_first);
  if (!in.is_chosen) out.grads[in.count + i] = static_cast<float>(r.loss.d_second);
  out.details[i] = static_cast<float>(chosen);
  out.details[in.count + i] = static_cast<float>(rejected);
  out.details[2 * in.count + i] =
      in.is_chosen ? (chosen > rejected) == in.is_chosen[i] : chosen > rejected;
  out.details[3 * in.count + i] = static_cast<float>(chosen - rejected);
}

RLHF_FAST_INLINE void add_up_pairs(int64_t count, const PreferenceOutputs& out) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += out.losses[i];
  *out.total = static_cast<float>(total);
  for (int k = 0; k < 4; ++k) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += out.details[k * count + i];
    out.means[k] = static_cast<float>(sum / static_cast<double>(count));
  }
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
