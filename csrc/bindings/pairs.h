// Batches of preference pairs, as ops/preference_loss.py builds them.
#pragma once

#include "rlhf_fast/preference_loss.h"

#include "module.h"

namespace rlhf_fast {

inline PreferenceSettings settings_from(const pybind11::tuple& t) {
  const auto number = [&](int i) { return t[i].cast<float>(); };
  PreferenceSettings s;
  s.loss = static_cast<PreferenceLoss>(t[0].cast<int>());
  s.divergence = static_cast<Divergence>(t[1].cast<int>());
  s.beta = number(2);
  s.label_smoothing = number(3);
  s.margin = number(4);
  s.nll_weight = number(5);
  s.center_weight = number(6);
  s.alpha = number(7);
  s.temperature = number(8);
  s.penalty = number(9);
  s.chosen_weight = number(10);
  s.rejected_weight = number(11);
  return s;
}

// (count, settings, columns, address of the baseline, of is_chosen, scale)
inline PreferenceInputs pairs_from(const pybind11::tuple& t) {
  PreferenceInputs in;
  in.count = t[0].cast<int64_t>();
  in.settings = settings_from(t[1].cast<pybind11::tuple>());
  const auto columns = t[2].cast<pybind11::tuple>();
  int next = 0;
  for (Column* column :
       {&in.chosen, &in.rejected, &in.ref_chosen, &in.ref_rejected, &in.chosen_lengths,
        &in.rejected_lengths, &in.weights, &in.margins, &in.targets}) {
    *column = column_from(columns[next++]);
  }
  in.baseline = pointer<const float>(t[3].cast<std::uintptr_t>());
  in.is_chosen = pointer<const bool>(t[4].cast<std::uintptr_t>());
  in.scale = t[5].cast<double>();
  return in;
}

// Addresses, in the order of the struct.
inline PreferenceOutputs pair_outputs_from(const pybind11::tuple& t) {
  const auto at = [&](int i) { return pointer<float>(t[i].cast<std::uintptr_t>()); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

}  // namespace rlhf_fast
