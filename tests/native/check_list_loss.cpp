// Runs every list loss on the CPU and on emulated CUDA over groups of several sizes and compares
// the gradient with central differences of the loss. Built with sanitizers; see check_logps.cpp.

#include "rlhf_fast/list_loss.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

float run(const ListInputs& in, std::vector<float>& grads, bool cuda) {
  std::vector<float> losses(size_t(in.groups.count));
  std::vector<double> workspace(2 * grads.size());
  float total = 0.0f;
  const ListOutputs out{losses.data(), grads.data(), &total, workspace.data()};
  if (cuda) {
    list_loss_cuda(in, out, {});
  } else {
    list_loss_cpu(in, out, 2);
  }
  return total;
}

void check_loss(ListLoss loss, const std::vector<int64_t>& offsets, bool cuda, bool differences,
                std::mt19937& random) {
  const auto num_items = size_t(offsets.back());
  std::uniform_real_distribution<float> uniform(0.0f, 2.0f);
  std::vector<float> scores(num_items), labels(num_items), grads(num_items), unused(num_items);
  for (float& s : scores) s = uniform(random);
  for (float& y : labels) y = std::round(uniform(random));
  ListInputs in;
  in.loss = loss;
  in.groups = {int64_t(offsets.size()) - 1, 0, offsets.back(), offsets.data()};
  in.scores = scores.data();
  in.labels = labels.data();
  in.nll_weight = 0.5f;
  run(in, grads, cuda);
  // A hinge has corners and LiPO's weights jump where scores change places: no differences there.
  if (!differences || loss == ListLoss::lipo_lambda || loss == ListLoss::rrhf ||
      loss == ListLoss::pairwise_hinge) {
    return;
  }
  constexpr float kStep = 1e-2f;
  for (size_t i = 0; i < num_items; ++i) {
    scores[i] += kStep;
    const double above = run(in, unused, cuda);
    scores[i] -= 2 * kStep;
    const double below = run(in, unused, cuda);
    scores[i] += kStep;
    const double want = (above - below) / (2 * kStep);
    expect_near(grads[i], want, 5e-3 * (1.0 + std::fabs(want)), "gradient of list loss", int(loss));
  }
}

}  // namespace

int check_list_loss(bool few) {
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
#define RLHF_FAST_ROW(name, Formula)                                         \
  check_loss(ListLoss::name, {0, 1, 4, 6, 11}, cuda, !few || !cuda, random); \
  if (!few) check_loss(ListLoss::name, {0, 300, 301, 310}, cuda, false, random);
    RLHF_FAST_LIST_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  }
  return report("list_loss");
}
