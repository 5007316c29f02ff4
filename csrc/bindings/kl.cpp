#include "rlhf_fast/kl.h"

#include "module.h"

namespace rlhf_fast {

void bind_kl(pybind11::module_& m) {
  using Address = std::uintptr_t;
  m.def("kl_forward",
        [](int where, Address stream, const pybind11::tuple& a, const pybind11::tuple& b,
           float temperature, bool jsd, float beta, Address divergence, Address stats) {
          const KlInputs in{rows_from(a), rows_from(b), temperature, jsd, beta};
          const KlOutputs out{pointer<float>(divergence), pointer<float>(stats)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(kl_forward)(in, out, run_on(where, stream));
        });
  m.def("kl_backward",
        [](int where, Address stream, const pybind11::tuple& a, const pybind11::tuple& b,
           float temperature, bool jsd, float beta, Address stats, Address grad_divergence,
           const pybind11::object& grad_a, const pybind11::object& grad_b) {
          const KlInputs in{rows_from(a), rows_from(b), temperature, jsd, beta};
          KlGrads grads{pointer<const float>(stats), pointer<const float>(grad_divergence), {}, {}};
          if (!grad_a.is_none()) grads.grad_a = rows_from(grad_a);
          if (!grad_b.is_none()) grads.grad_b = rows_from(grad_b);
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(kl_backward)(in, grads, run_on(where, stream));
        });
  m.def("kl_with_grad",
        [](int where, Address stream, const pybind11::tuple& a, const pybind11::tuple& b,
           float temperature, bool jsd, float beta, Address divergence, Address stats,
           Address grad_divergence, bool over_a) {
          const KlInputs in{rows_from(a), rows_from(b), temperature, jsd, beta};
          const KlWithGrad work{{pointer<float>(divergence), pointer<float>(stats)},
                                pointer<const float>(grad_divergence),
                                over_a};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(kl_with_grad)(in, work, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
