#include "rlhf_fast/list_loss.h"

#include "module.h"

namespace rlhf_fast {

void bind_list_loss(pybind11::module_& m) {
  using Address = std::uintptr_t;
  // Name -> number, in the order of the enumeration.
  pybind11::dict table;
#define RLHF_FAST_ROW(name, Formula) table[#name] = static_cast<int>(ListLoss::name);
  RLHF_FAST_LIST_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  m.attr("LIST_LOSSES") = table;

  m.def("list_loss",
        [](int where, Address stream, int loss, const pybind11::tuple& groups, Address scores,
           Address labels, float margin, float nll_weight, double scale, Address losses,
           Address grads, Address total, Address workspace) {
          const ListInputs in{static_cast<ListLoss>(loss),
                              sequences_from(groups),
                              pointer<const float>(scores),
                              pointer<const float>(labels),
                              margin,
                              nll_weight,
                              scale};
          const ListOutputs out{pointer<float>(losses), pointer<float>(grads),
                                pointer<float>(total), pointer<double>(workspace)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(list_loss)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
