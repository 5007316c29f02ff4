#include "rlhf_fast/group_advantages.h"

#include "module.h"

namespace rlhf_fast {

void bind_group_advantages(pybind11::module_& m) {
  using Address = std::uintptr_t;
#define RLHF_FAST_NAME(name) #name,
  const char* const names[] = {RLHF_FAST_GROUP_ESTIMATORS(RLHF_FAST_NAME)};
#undef RLHF_FAST_NAME
  pybind11::list estimators;
  for (const char* name : names) estimators.append(name);
  m.attr("GROUP_ESTIMATORS") = pybind11::tuple(estimators);

  m.def("group_advantages", [](int where, Address stream, const pybind11::tuple& groups,
                               Address rewards, Address weights, int estimator, float epsilon,
                               int64_t k, bool unbiased, bool keep_single, Address advantages) {
    GroupAdvantagesInputs in;
    in.groups = sequences_from(groups);
    in.rewards = pointer<const float>(rewards);
    in.weights = pointer<const float>(weights);
    in.estimator = static_cast<GroupEstimator>(estimator);
    in.epsilon = epsilon;
    in.k = k;
    in.unbiased = unbiased;
    in.keep_single = keep_single;
    const GroupAdvantagesOutputs out{pointer<float>(advantages)};
    pybind11::gil_scoped_release release;
    RLHF_FAST_BIND(group_advantages)(in, out, run_on(where, stream));
  });
}

}  // namespace rlhf_fast
