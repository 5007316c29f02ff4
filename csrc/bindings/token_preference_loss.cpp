#include "rlhf_fast/token_preference_loss.h"

#include "pairs.h"

namespace rlhf_fast {

void bind_token_preference_loss(pybind11::module_& m) {
  using Address = std::uintptr_t;
  m.def("token_preference_loss",
        [](int where, Address stream, const pybind11::tuple& sequences, bool interleaved,
           Address logps, Address ref_logps, Address mask, Address weights,
           const pybind11::tuple& pairs, const pybind11::tuple& outputs, Address d_logps,
           Address ticket) {
          const TokenPreferenceInputs in{sequences_from(sequences),
                                         interleaved,
                                         pointer<const float>(logps),
                                         pointer<const float>(ref_logps),
                                         pointer<const bool>(mask),
                                         pointer<const float>(weights),
                                         pairs_from(pairs)};
          const TokenPreferenceOutputs out{pair_outputs_from(outputs), pointer<float>(d_logps),
                                           pointer<unsigned>(ticket)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(token_preference_loss)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
