// Runs every preference loss on the CPU and on emulated CUDA over small batches and compares the
// gradient with central differences of the loss. Built with sanitizers; see check_logps.cpp.

#include "rlhf_fast/preference_loss.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

struct Batch {
  std::vector<float> losses, grads, details;
  float total = 0.0f;
  std::vector<float> means = std::vector<float>(4);
};

Batch run(const PreferenceInputs& in, bool cuda) {
  const auto count = static_cast<size_t>(in.count);
  Batch b;
  b.losses.resize(count);
  b.grads.resize((in.is_chosen ? 1 : 2) * count);
  b.details.resize(4 * count);
  const PreferenceOutputs out{b.losses.data(), b.grads.data(), b.details.data(), &b.total,
                              b.means.data()};
  if (cuda) {
    preference_loss_cuda(in, out, {});
  } else {
    preference_loss_cpu(in, out, 2);
  }
  return b;
}

void check_loss(PreferenceLoss loss, int count, bool unpaired, bool cuda, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(0.1f, 1.0f);
  const auto column = [&](float scale) {
    std::vector<float> x(static_cast<size_t>(count));
    for (float& v : x) v = scale * uniform(random);
    return x;
  };
  std::vector<float> chosen = column(-3.0f), rejected = column(-3.0f);
  const std::vector<float> ref_chosen = column(-3.0f), ref_rejected = column(-3.0f);
  const std::vector<float> lengths = column(9.0f), weights = column(1.0f);
  const bool labels[] = {true, false, true, false, true};
  PreferenceInputs in;
  in.count = count;
  in.settings.loss = loss;
  in.settings.label_smoothing = 0.1f;
  in.settings.nll_weight = unpaired ? 0.0f : 0.3f;
  in.chosen = {chosen.data(), 1};
  if (!unpaired) in.rejected = {rejected.data(), 1};
  in.ref_chosen = {ref_chosen.data(), 1};
  if (!unpaired) in.ref_rejected = {ref_rejected.data(), 1};
  in.chosen_lengths = in.rejected_lengths = {lengths.data(), 1};
  in.weights = {weights.data(), 1};
  if (unpaired) in.is_chosen = labels;
  const Batch b = run(in, cuda);
  double total = 0.0;
  for (float x : b.losses) total += x;
  expect_near(b.total, total, 1e-5 * (1.0 + std::fabs(total)), "total of preference loss",
              int(loss));

  constexpr float kStep = 1e-2f;
  for (int side = 0; side < (unpaired ? 1 : 2); ++side) {
    std::vector<float>& moved = side ? rejected : chosen;
    for (float& x : moved) x += kStep;
    const Batch above = run(in, cuda);
    for (float& x : moved) x -= 2 * kStep;
    const Batch below = run(in, cuda);
    for (float& x : moved) x += kStep;
    for (int i = 0; i < count; ++i) {
      const double want = (double(above.losses[size_t(i)]) - below.losses[size_t(i)]) / (2 * kStep);
      const double got = b.grads[size_t(side * count + i)];
      // A hinge may have its corner within the step.
      const bool corner = loss == PreferenceLoss::slic || loss == PreferenceLoss::hinge;
      if (corner && got != 0.0 && want == 0.0) continue;
      expect_near(got, want, 2e-3 * (1.0 + std::fabs(want)) + (corner ? 1.0 : 0.0),
                  "gradient of preference loss", int(loss));
    }
  }
}

}  // namespace

int check_preference_loss(bool few) {
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
    for (const int count : {1, 5, 300}) {
      if (few && count == 300 && cuda) continue;
#define RLHF_FAST_ROW(name, Formula, traits)                     \
  check_loss(PreferenceLoss::name, count, false, cuda, random);  \
  if (((traits) & kUnpaired) && count == 5) {                    \
    check_loss(PreferenceLoss::name, count, true, cuda, random); \
  }
      RLHF_FAST_PREFERENCE_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
    }
  }
  return report("preference_loss");
}
