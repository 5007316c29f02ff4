#include "rlhf_fast/gae.h"

#include "module.h"

namespace rlhf_fast {

void bind_gae(pybind11::module_& m) {
  using Address = std::uintptr_t;
  m.def("gae_forward",
        [](int where, Address stream, const pybind11::tuple& sequences, Address rewards,
           Address values, Address mask, Address bootstrap_values, float gamma, float lambda,
           bool skip_masked, Address advantages, Address returns) {
          GaeInputs in;
          in.sequences = sequences_from(sequences);
          in.rewards = pointer<const float>(rewards);
          in.values = pointer<const float>(values);
          in.mask = pointer<const bool>(mask);
          in.bootstrap_values = pointer<const float>(bootstrap_values);
          in.gamma = gamma;
          in.lambda = lambda;
          in.skip_masked = skip_masked;
          const GaeOutputs out{pointer<float>(advantages), pointer<float>(returns)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(gae_forward)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
