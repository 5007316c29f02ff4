#include "rlhf_fast/policy_loss.h"

#include "module.h"

namespace rlhf_fast {
namespace {

#define RLHF_FAST_NAME(name, ...) #name,
#define RLHF_FAST_NAME_OF_CHOICE(type, name) #name,
constexpr const char* kLosses[] = {RLHF_FAST_POLICY_LOSSES(RLHF_FAST_NAME)};
constexpr const char* kChoices[] = {RLHF_FAST_POLICY_CHOICES(RLHF_FAST_NAME_OF_CHOICE)};
constexpr const char* kSettings[] = {RLHF_FAST_POLICY_SETTINGS(RLHF_FAST_NAME)};
constexpr const char* kMetrics[] = {RLHF_FAST_POLICY_METRICS(RLHF_FAST_NAME)};
#undef RLHF_FAST_NAME
#undef RLHF_FAST_NAME_OF_CHOICE

template <size_t kCount>
pybind11::tuple names(const char* const (&all)[kCount]) {
  pybind11::tuple tuple(kCount);
  for (size_t i = 0; i < kCount; ++i) tuple[i] = all[i];
  return tuple;
}

// Both lists are in the order of the tables.
PolicyParams params_from(const pybind11::sequence& choices, const pybind11::sequence& settings) {
  PolicyParams p;
  size_t i = 0, j = 0;
#define RLHF_FAST_TAKE(type, name) p.name = static_cast<type>(choices[i++].cast<int>());
  RLHF_FAST_POLICY_CHOICES(RLHF_FAST_TAKE)
#undef RLHF_FAST_TAKE
#define RLHF_FAST_TAKE(name) p.name = settings[j++].cast<float>();
  RLHF_FAST_POLICY_SETTINGS(RLHF_FAST_TAKE)
#undef RLHF_FAST_TAKE
  return p;
}

}  // namespace

void bind_policy_loss(pybind11::module_& m) {
  using Address = std::uintptr_t;
  m.attr("POLICY_LOSSES") = names(kLosses);
  m.attr("POLICY_CHOICES") = names(kChoices);
  m.attr("POLICY_SETTINGS") = names(kSettings);
  m.attr("POLICY_METRICS") = names(kMetrics);
#define RLHF_FAST_LEVEL(name, formula, level) levels.append(int(RatioLevel::level));
  pybind11::list levels;
  RLHF_FAST_POLICY_LOSSES(RLHF_FAST_LEVEL)
#undef RLHF_FAST_LEVEL
  m.attr("POLICY_RATIO_LEVELS") = pybind11::tuple(levels);

  m.def("policy_loss",
        [](int where, Address stream, const pybind11::tuple& sequences, Address logps,
           Address old_logps, Address advantages, Address mask, Address ref_logps,
           Address sampling_logps, Address entropy, const pybind11::tuple& aggregation,
           const pybind11::sequence& choices, const pybind11::sequence& settings, Address loss,
           Address metrics, Address d_logps, Address d_entropy, Address lengths, Address partials,
           Address scale, Address ticket) {
          const PolicyLossInputs in{sequences_from(sequences),
                                    pointer<const float>(logps),
                                    pointer<const float>(old_logps),
                                    pointer<const float>(advantages),
                                    pointer<const bool>(mask),
                                    pointer<const float>(ref_logps),
                                    pointer<const float>(sampling_logps),
                                    pointer<const float>(entropy),
                                    aggregation_from(aggregation),
                                    params_from(choices, settings)};
          const PolicyLossOutputs out{pointer<float>(loss),    pointer<float>(metrics),
                                      pointer<float>(d_logps), pointer<float>(d_entropy),
                                      pointer<float>(lengths), pointer<float>(partials),
                                      pointer<float>(scale),   pointer<unsigned>(ticket)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(policy_loss)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
