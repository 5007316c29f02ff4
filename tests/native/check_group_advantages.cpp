// Runs group_advantages on the CPU and on emulated CUDA for every estimator. The mean is compared
// with double arithmetic; of all estimators, CPU and CUDA must agree.

#include "rlhf_fast/group_advantages.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

int check_group_advantages(bool) {
  const char* const names[] = {
#define RLHF_FAST_NAME(name) #name,
      RLHF_FAST_GROUP_ESTIMATORS(RLHF_FAST_NAME)
#undef RLHF_FAST_NAME
  };
  const std::vector<int64_t> offsets{0, 4, 5, 5, 45};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> rewards(45), weights(45);
  for (float& r : rewards) r = normal(random);
  for (float& w : weights) w = float(1 + random() % 9);

  for (size_t e = 0; e < sizeof names / sizeof *names; ++e) {
    GroupAdvantagesInputs in;
    in.groups = {4, 0, 45, offsets.data()};
    in.rewards = rewards.data();
    in.weights = weights.data();
    in.estimator = static_cast<GroupEstimator>(e);
    in.k = 2;
    std::vector<float> cpu(45, NAN), cuda(45, NAN);
    group_advantages_cpu(in, {cpu.data()}, 2);
    group_advantages_cuda(in, {cuda.data()}, {});
    for (int64_t g = 0; g < 4; ++g) {
      double mean = 0.0;
      for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) mean += rewards[i];
      mean /= double(offsets[g + 1] - offsets[g]);
      for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) {
        const bool centred = in.estimator == GroupEstimator::dr_grpo;
        const double want = centred ? rewards[i] - mean : cpu[i];
        expect_near(cpu[i], want, 1e-5, names[e], i);
        expect_near(cuda[i], want, 1e-5, names[e], i);
      }
    }
  }
  return report("group_advantages");
}
