// `check_address`, `check_thread few`: runs the checks of every stem. `few` leaves out what adds no
// new interleaving.
#include <cstring>

int check_gae(bool few);
int check_group_advantages(bool few);
int check_kl(bool few);
int check_list_loss(bool few);
int check_logps(bool few);
int check_policy_loss(bool few);
int check_preference_loss(bool few);
int check_reward_model_loss(bool few);
int check_segment_sum(bool few);
int check_token_preference_loss(bool few);
int check_value_loss(bool few);
int check_whiten(bool few);

int main(int argc, char** argv) {
  const bool few = argc > 1 && !std::strcmp(argv[1], "few");
  return check_gae(few) | check_group_advantages(few) | check_kl(few) | check_list_loss(few) |
         check_logps(few) | check_policy_loss(few) | check_preference_loss(few) |
         check_reward_model_loss(few) | check_segment_sum(few) | check_token_preference_loss(few) |
         check_value_loss(few) | check_whiten(few);
}
