// What all preference losses share: one item of a batch, a pair or a single response, from
// log-probs to loss.
#pragma once

#include "preference.h"

namespace rlhf_fast {

RLHF_FAST_HD int traits_of(PreferenceLoss loss) {
  switch (loss) {
#define RLHF_FAST_ROW(name, Formula, traits) \
  case PreferenceLoss::name: return traits;
    RLHF_FAST_PREFERENCE_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  }
  return 0;
}

template <class T>
RLHF_FAST_HD Dual<T> loss_of(PreferenceLoss loss, const PreferencePair<T>& pair) {
  switch (loss) {
#define RLHF_FAST_ROW(name, Formula, traits) \
  case PreferenceLoss::name: return Formula::loss(pair);
    RLHF_FAST_PREFERENCE_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  }
  return {};
}

template <class T>
RLHF_FAST_HD T item(Column column, int64_t i, T otherwise) {
  return column.data ? T(column.data[i * column.stride]) : otherwise;
}

template <class T>
RLHF_FAST_HD T tokens_of(Column lengths, int64_t i) {
  const T length = item(lengths, i, T(1));
  return length < T(1) ? T(1) : length;
}

template <class T>
struct PreferenceScore {
  Dual<T> score;
  T reward;
};

// With a reference the divergence's score is divided by the length, without one the log-prob is.
template <class T>
RLHF_FAST_HD PreferenceScore<T> score_of(const PreferenceSettings& s, Dual<T> logp,
                                         Column reference, Column lengths, int64_t i) {
  const int traits = traits_of(s.loss);
  const T tokens = traits & kLengths ? tokens_of<T>(lengths, i) : T(1);
  const bool has_reference = traits & kReference;
  const Dual<T> ratio = has_reference ? logp - item(reference, i, T(0)) : logp / tokens;
  const Dual<T> score = divergence_score(s, ratio);
  return {has_reference ? score / tokens : score, T(s.beta) * ratio.value};
}

template <class T>
struct PreferenceResult {
  Dual<T> loss;  // derivatives with respect to the two log-probs
  T chosen_reward, rejected_reward;
};

// Item i of a batch, from log-probs to loss.
template <class T>
RLHF_FAST_HD PreferenceResult<T> preference_of(const PreferenceInputs& in, int64_t i) {
  const PreferenceSettings& s = in.settings;
  PreferencePair<T> x;
  PreferenceResult<T> result;
  x.has_chosen = !in.is_chosen || in.is_chosen[i];
  x.has_rejected = !in.is_chosen || !in.is_chosen[i];
  x.settings = &s;
  x.beta = T(s.beta);
  x.margin = T(s.margin) + item(in.margins, i, T(0));
  x.target = item(in.targets, i, T(1));
  x.smoothing = T(s.label_smoothing);
  x.baseline = in.baseline ? T(*in.baseline) : T(0);

  const Dual<T> chosen(item(in.chosen, i, T(0)), T(1), T(0));
  const Dual<T> rejected(item(in.rejected, i, T(0)), T(0), T(1));
  const PreferenceScore<T> c = score_of(s, chosen, in.ref_chosen, in.chosen_lengths, i);
  x.chosen = c.score;
  result.chosen_reward = c.reward;
  if (in.is_chosen) {
    x.rejected = x.chosen;
    result.rejected_reward = T(0);
  } else {
    const PreferenceScore<T> r = score_of(s, rejected, in.ref_rejected, in.rejected_lengths, i);
    x.rejected = r.score;
    result.rejected_reward = r.reward;
  }

  Dual<T> loss = loss_of(s.loss, x);
  if (s.nll_weight != 0.0f && x.has_chosen) {
    loss = loss - T(s.nll_weight) * (chosen / tokens_of<T>(in.chosen_lengths, i));
  }
  if (s.center_weight != 0.0f) {
    loss = loss + T(s.center_weight) * square(x.chosen + x.rejected);
  }
  result.loss = (T(in.scale) * item(in.weights, i, T(1))) * loss;
  return result;
}

}  // namespace rlhf_fast
