#include "rlhf_fast/reward_model_loss.h"

#include "module.h"

namespace rlhf_fast {

void bind_reward_model_loss(pybind11::module_& m) {
  using Address = std::uintptr_t;
  // Name -> number, in the order of the enumeration.
  pybind11::dict table;
#define RLHF_FAST_ROW(name, Formula) table[#name] = static_cast<int>(RewardLoss::name);
  RLHF_FAST_REWARD_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  m.attr("REWARD_LOSSES") = table;

  m.def("reward_model_loss", [](int where, Address stream, int loss, int64_t num_responses,
                                int64_t num_heads, Address predictions, Address targets,
                                bool one_target, Address mask, Address levels, float delta,
                                bool mean, Address losses, Address grads, Address total) {
    const RewardInputs in{static_cast<RewardLoss>(loss),
                          num_responses,
                          num_heads,
                          pointer<const float>(predictions),
                          pointer<const float>(targets),
                          one_target,
                          pointer<const bool>(mask),
                          pointer<const float>(levels),
                          delta,
                          mean};
    const RewardOutputs out{pointer<float>(losses), pointer<float>(grads), pointer<float>(total)};
    pybind11::gil_scoped_release release;
    RLHF_FAST_BIND(reward_model_loss)(in, out, run_on(where, stream));
  });
}

}  // namespace rlhf_fast
