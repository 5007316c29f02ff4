#include "rlhf_fast/value_loss.h"

#include "module.h"

namespace rlhf_fast {

void bind_value_loss(pybind11::module_& m) {
  using Address = std::uintptr_t;
#define RLHF_FAST_NAME(name) #name,
  const char* const names[] = {RLHF_FAST_VALUE_METRICS(RLHF_FAST_NAME)};
#undef RLHF_FAST_NAME
  pybind11::list metrics;
  for (const char* name : names) metrics.append(name);
  m.attr("VALUE_METRICS") = pybind11::tuple(metrics);
  m.attr("NUM_VALUE_SUMS") = kNumValueSums;

  m.def("value_loss",
        [](int where, Address stream, const pybind11::tuple& sequences, Address values,
           Address old_values, Address returns, Address mask, float clip,
           const pybind11::tuple& aggregation, Address loss, Address metrics, Address d_values,
           Address lengths, Address partials, Address scale, Address ticket) {
          const ValueLossInputs in{sequences_from(sequences),        pointer<const float>(values),
                                   pointer<const float>(old_values), pointer<const float>(returns),
                                   pointer<const bool>(mask),        clip,
                                   aggregation_from(aggregation)};
          const ValueLossOutputs out{pointer<float>(loss),     pointer<float>(metrics),
                                     pointer<float>(d_values), pointer<float>(lengths),
                                     pointer<float>(partials), pointer<float>(scale),
                                     pointer<unsigned>(ticket)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(value_loss)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
