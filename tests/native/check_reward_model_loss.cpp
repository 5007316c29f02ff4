// Runs every regression loss on the CPU and on emulated CUDA and compares the gradient with central
// differences of the loss. Built with sanitizers; see check_logps.cpp.
#include <memory>

#include "rlhf_fast/reward_model_loss.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

std::vector<float> run(const RewardInputs& in, std::vector<float>& grads, bool cuda) {
  std::vector<float> losses(grads.size());
  float total = 0.0f;
  const RewardOutputs out{losses.data(), grads.data(), &total};
  if (cuda) {
    reward_model_loss_cuda(in, out, {});
  } else {
    reward_model_loss_cpu(in, out, 2);
  }
  return losses;
}

void check_loss(RewardLoss loss, int responses, int heads, bool masked, bool cuda,
                std::mt19937& random) {
  const auto count = size_t(responses * heads);
  std::uniform_real_distribution<float> uniform(0.1f, 0.9f);
  std::vector<float> predictions(count), targets(masked ? count : size_t(responses)),
      levels(size_t(heads), 0.3f), grads(count), unused(count);
  const std::unique_ptr<bool[]> mask(new bool[count]);
  for (float& x : predictions) x = 3.0f * uniform(random) - 1.0f;
  for (float& y : targets) y = uniform(random);
  for (size_t i = 0; i < count; ++i) {
    mask[i] = random() % 2;
    if (masked && !mask[i]) targets[i] = NAN;
  }
  RewardInputs in;
  in.loss = loss;
  in.num_responses = responses;
  in.num_heads = heads;
  in.predictions = predictions.data();
  in.targets = targets.data();
  in.one_target = !masked;
  in.mask = masked ? mask.get() : nullptr;
  in.levels = levels.data();
  in.mean = true;
  run(in, grads, cuda);
  constexpr float kStep = 1e-3f;
  for (float& x : predictions) x += kStep;
  const std::vector<float> above = run(in, unused, cuda);
  for (float& x : predictions) x -= 2 * kStep;
  const std::vector<float> below = run(in, unused, cuda);
  for (size_t i = 0; i < count; ++i) {
    const double want = (double(above[i]) - below[i]) / (2 * kStep);
    const float target = targets[in.one_target ? i / size_t(heads) : i];
    const bool corner = std::fabs(predictions[i] + kStep - target) < 2 * kStep;
    if (corner) continue;
    expect_near(grads[i], want, 2e-3 * (1.0 + std::fabs(want)), "gradient of reward loss",
                int(loss));
  }
}

}  // namespace

int check_reward_model_loss(bool few) {
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
    for (const bool masked : {false, true}) {
#define RLHF_FAST_ROW(name, Formula)                        \
  check_loss(RewardLoss::name, 3, 5, masked, cuda, random); \
  if (!few) check_loss(RewardLoss::name, 700, 3, masked, cuda, random);
      RLHF_FAST_REWARD_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
    }
  }
  return report("reward_model_loss");
}
