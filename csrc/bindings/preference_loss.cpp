#include "rlhf_fast/preference_loss.h"

#include "module.h"

namespace rlhf_fast {
namespace {

using Address = std::uintptr_t;

PreferenceSettings settings_from(const pybind11::tuple& t) {
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

pybind11::list names_of(int traits) {
  constexpr std::pair<int, const char*> kNames[] = {
      {kReference, "reference"}, {kLengths, "lengths"}, {kDivergence, "divergence"},
      {kUnpaired, "unpaired"},   {kSorted, "sorted"},   {kMargin, "margin"},
      {kSmoothing, "smoothing"}, {kTargets, "targets"}, {kBaseline, "baseline"}};
  pybind11::list names;
  for (const auto& [bit, name] : kNames) {
    if (traits & bit) names.append(name);
  }
  return names;
}

}  // namespace

void bind_preference_loss(pybind11::module_& m) {
  // Name -> traits, in the order of the enumeration.
  pybind11::dict table;
#define RLHF_FAST_ROW(name, Formula, traits) table[#name] = names_of(traits);
  RLHF_FAST_PREFERENCE_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  m.attr("PREFERENCE_LOSSES") = table;

  m.def("preference_loss",
        [](int where, Address stream, int64_t count, const pybind11::tuple& settings,
           const pybind11::tuple& columns, Address baseline, Address is_chosen, double scale,
           Address losses, Address grads, Address details, Address total, Address means) {
          PreferenceInputs in;
          in.count = count;
          in.settings = settings_from(settings);
          int next = 0;
          for (Column* column :
               {&in.chosen, &in.rejected, &in.ref_chosen, &in.ref_rejected, &in.chosen_lengths,
                &in.rejected_lengths, &in.weights, &in.margins, &in.targets}) {
            *column = column_from(columns[next++]);
          }
          in.baseline = pointer<const float>(baseline);
          in.is_chosen = pointer<const bool>(is_chosen);
          in.scale = scale;
          const PreferenceOutputs out{pointer<float>(losses), pointer<float>(grads),
                                      pointer<float>(details), pointer<float>(total),
                                      pointer<float>(means)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(preference_loss)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
