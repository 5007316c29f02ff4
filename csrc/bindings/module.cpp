#include "module.h"

PYBIND11_MODULE(RLHF_FAST_MODULE, m) {
  rlhf_fast::bind_gae(m);
  rlhf_fast::bind_group_advantages(m);
  rlhf_fast::bind_kl(m);
  rlhf_fast::bind_list_loss(m);
  rlhf_fast::bind_logps(m);
  rlhf_fast::bind_policy_loss(m);
  rlhf_fast::bind_preference_loss(m);
  rlhf_fast::bind_reward_model_loss(m);
  rlhf_fast::bind_segment_sum(m);
  rlhf_fast::bind_token_preference_loss(m);
  rlhf_fast::bind_value_loss(m);
  rlhf_fast::bind_whiten(m);
}
