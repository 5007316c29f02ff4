#include "rlhf_fast/segment_sum.h"

#include "module.h"

namespace rlhf_fast {
namespace {

using Address = std::uintptr_t;

SegmentSumInputs inputs_from(const pybind11::tuple& sequences, Address values, Address mask,
                             Address weights, bool mean) {
  return {sequences_from(sequences), pointer<const float>(values), pointer<const bool>(mask),
          pointer<const float>(weights), mean};
}

}  // namespace

void bind_segment_sum(pybind11::module_& m) {
  m.def("segment_sum",
        [](int where, Address stream, const pybind11::tuple& sequences, Address values,
           Address mask, Address weights, bool mean, Address sums, Address counts) {
          const SegmentSumInputs in = inputs_from(sequences, values, mask, weights, mean);
          const SegmentSumOutputs out{pointer<float>(sums), pointer<float>(counts)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(segment_sum)(in, out, run_on(where, stream));
        });
  m.def("segment_sum_backward",
        [](int where, Address stream, const pybind11::tuple& sequences, Address mask,
           Address weights, bool mean, Address counts, Address grad_sums, Address grad_values) {
          const SegmentSumInputs in = inputs_from(sequences, 0, mask, weights, mean);
          const SegmentSumGrads grads{pointer<const float>(counts), pointer<const float>(grad_sums),
                                      pointer<float>(grad_values)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(segment_sum_backward)(in, grads, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
