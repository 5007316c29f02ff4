#include "rlhf_fast/logps.h"

#include "module.h"

namespace rlhf_fast {
namespace {

using Address = std::uintptr_t;

LogpsInputs inputs_from(const pybind11::tuple& logits, Address labels, bool labels_are_int32,
                        int64_t labels_per_row, int64_t ignore_index, float logit_scale,
                        float softcap, float temperature, Address row_temperatures,
                        Address row_thresholds) {
  LogpsInputs in;
  in.logits = rows_from(logits);
  in.labels = pointer<const void>(labels);
  in.labels_are_int32 = labels_are_int32;
  in.labels_per_row = labels_per_row;
  in.ignore_index = ignore_index;
  in.logit_scale = logit_scale;
  in.softcap = softcap;
  in.temperature = temperature;
  in.row_temperatures = pointer<const float>(row_temperatures);
  in.row_thresholds = pointer<const float>(row_thresholds);
  return in;
}

}  // namespace

void bind_logps(pybind11::module_& m) {
  m.def("logps_forward",
        [](int where, Address stream, const pybind11::tuple& logits, Address labels,
           bool labels_are_int32, int64_t labels_per_row, int64_t ignore_index, float logit_scale,
           float softcap, float temperature, Address row_temperatures, Address row_thresholds,
           Address reference, Address log_sum, Address lse, Address logps, Address entropy,
           Address sum_p2, Address mean_logit, Address is_top1) {
          const LogpsInputs in =
              inputs_from(logits, labels, labels_are_int32, labels_per_row, ignore_index,
                          logit_scale, softcap, temperature, row_temperatures, row_thresholds);
          const LogpsOutputs out{pointer<float>(reference),  pointer<float>(log_sum),
                                 pointer<float>(lse),        pointer<float>(logps),
                                 pointer<float>(entropy),    pointer<float>(sum_p2),
                                 pointer<float>(mean_logit), pointer<bool>(is_top1)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(logps_forward)(in, out, run_on(where, stream));
        });
  m.def("logps_backward",
        [](int where, Address stream, const pybind11::tuple& logits, Address labels,
           bool labels_are_int32, int64_t labels_per_row, int64_t ignore_index, float logit_scale,
           float softcap, float temperature, Address row_temperatures, Address row_thresholds,
           Address reference, Address log_sum, Address entropy, Address grad_logps,
           Address grad_entropy, Address grad_lse, const pybind11::tuple& grad_logits) {
          const LogpsInputs in =
              inputs_from(logits, labels, labels_are_int32, labels_per_row, ignore_index,
                          logit_scale, softcap, temperature, row_temperatures, row_thresholds);
          const LogpsGrads grads{pointer<const float>(reference),
                                 pointer<const float>(log_sum),
                                 pointer<const float>(entropy),
                                 pointer<const float>(grad_logps),
                                 pointer<const float>(grad_entropy),
                                 pointer<const float>(grad_lse),
                                 rows_from(grad_logits)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(logps_backward)(in, grads, run_on(where, stream));
        });
  m.def("logps_with_grad",
        [](int where, Address stream, const pybind11::tuple& logits, Address labels,
           bool labels_are_int32, int64_t labels_per_row, int64_t ignore_index, float logit_scale,
           float softcap, float temperature, Address row_temperatures, Address row_thresholds,
           Address reference, Address log_sum, Address lse, Address logps, Address entropy,
           Address sum_p2, Address mean_logit, Address is_top1, Address grad_logps,
           Address grad_entropy, Address grad_lse) {
          const LogpsInputs in =
              inputs_from(logits, labels, labels_are_int32, labels_per_row, ignore_index,
                          logit_scale, softcap, temperature, row_temperatures, row_thresholds);
          const LogpsWithGrad work{
              {pointer<float>(reference), pointer<float>(log_sum), pointer<float>(lse),
               pointer<float>(logps), pointer<float>(entropy), pointer<float>(sum_p2),
               pointer<float>(mean_logit), pointer<bool>(is_top1)},
              pointer<const float>(grad_logps),
              pointer<const float>(grad_entropy),
              pointer<const float>(grad_lse)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(logps_with_grad)(in, work, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
