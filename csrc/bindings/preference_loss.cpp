#include "rlhf_fast/preference_loss.h"

#include "pairs.h"

namespace rlhf_fast {
namespace {

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

  m.def("preference_loss", [](int where, std::uintptr_t stream, const pybind11::tuple& pairs,
                              const pybind11::tuple& outputs) {
    const PreferenceInputs in = pairs_from(pairs);
    const PreferenceOutputs out = pair_outputs_from(outputs);
    pybind11::gil_scoped_release release;
    RLHF_FAST_BIND(preference_loss)(in, out, run_on(where, stream));
  });
}

}  // namespace rlhf_fast
