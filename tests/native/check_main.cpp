// `check_address`, `check_thread few`: runs the checks of every stem. `few` leaves out what adds no
// new interleaving.
#include <cstring>

int check_kl(bool few);
int check_list_loss(bool few);
int check_logps(bool few);
int check_preference_loss(bool few);
int check_reward_model_loss(bool few);
int check_segment_sum(bool few);

int main(int argc, char** argv) {
  const bool few = argc > 1 && !std::strcmp(argv[1], "few");
  return check_kl(few) | check_list_loss(few) | check_logps(few) | check_preference_loss(few) |
         check_reward_model_loss(few) | check_segment_sum(few);
}
