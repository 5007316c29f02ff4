// From what a pair's tokens add up to, to its loss.
#pragma once

#include "preference.h"
#include "rlhf_fast/token_preference_loss.h"

namespace rlhf_fast {

// Each of the chosen and of the rejected response.
struct PairSums {
  float logps[2], ref_logps[2], tokens[2];
};

RLHF_FAST_HD int64_t sequence_of(const TokenPreferenceInputs& in, int64_t pair, int side) {
  return in.interleaved ? 2 * pair + side : side * in.pairs.count + pair;
}

template <class T>
RLHF_FAST_HD PreferenceResult<T> preference_of_sums(const TokenPreferenceInputs& in,
                                                    const PairSums& sums, int64_t i) {
  PreferenceInputs pair = in.pairs;
  pair.chosen = {&sums.logps[0], 0};
  pair.rejected = {&sums.logps[1], 0};
  if (in.ref_logps) {
    pair.ref_chosen = {&sums.ref_logps[0], 0};
    pair.ref_rejected = {&sums.ref_logps[1], 0};
  }
  if (!pair.chosen_lengths.data) pair.chosen_lengths = {&sums.tokens[0], 0};
  if (!pair.rejected_lengths.data) pair.rejected_lengths = {&sums.tokens[1], 0};
  return preference_of<T>(pair, i);
}

}  // namespace rlhf_fast
