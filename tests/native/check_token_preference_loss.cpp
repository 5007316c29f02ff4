// Runs token_preference_loss on the CPU and on emulated CUDA, rows and packed, with empty
// responses, and compares it with preference_loss of double sums. Built with sanitizers; see
// check_logps.cpp.
#include <memory>

#include "rlhf_fast/token_preference_loss.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

struct Batch {
  std::vector<float> losses, grads, details, means = std::vector<float>(4);
  float total = 0.0f;
  PreferenceOutputs outputs;

  explicit Batch(size_t count) : losses(count), grads(2 * count), details(4 * count) {
    outputs = {losses.data(), grads.data(), details.data(), &total, means.data()};
  }
};

void run(const std::vector<int64_t>& offsets, bool packed, bool masked, bool weighted,
         bool interleaved, bool cuda, std::mt19937& random) {
  const auto num_tokens = static_cast<size_t>(offsets.back());
  const size_t count = (offsets.size() - 1) / 2;
  std::uniform_real_distribution<float> uniform(0.1f, 1.0f);
  std::vector<float> logps(num_tokens), ref_logps(num_tokens), weights(num_tokens),
      grad(num_tokens);
  const std::unique_ptr<bool[]> mask(new bool[num_tokens]);
  for (size_t t = 0; t < num_tokens; ++t) {
    logps[t] = -uniform(random);
    ref_logps[t] = -uniform(random);
    weights[t] = uniform(random);
    mask[t] = random() % 2;
    if (masked && !mask[t]) logps[t] = NAN;
  }
  unsigned ticket = 0;
  TokenPreferenceInputs in;
  in.sequences = {int64_t(2 * count), packed ? 0 : offsets[1], offsets.back(),
                  packed ? offsets.data() : nullptr};
  in.interleaved = interleaved;
  in.logps = logps.data();
  in.ref_logps = ref_logps.data();
  in.mask = masked ? mask.get() : nullptr;
  in.weights = weighted ? weights.data() : nullptr;
  in.pairs.count = int64_t(count);
  in.pairs.settings.loss = PreferenceLoss::sigmoid_norm;
  in.pairs.scale = 1.0 / double(count);
  Batch got(count);
  const TokenPreferenceOutputs out{got.outputs, grad.data(), &ticket};
  if (cuda) {
    token_preference_loss_cuda(in, out, {});
  } else {
    token_preference_loss_cpu(in, out, 2);
  }

  std::vector<float> sums[2][3];  // log-probs, the reference's, tokens
  for (int side = 0; side < 2; ++side) {
    for (size_t i = 0; i < count; ++i) {
      const size_t s = interleaved ? 2 * i + size_t(side) : size_t(side) * count + i;
      double sum[3] = {};
      for (auto t = size_t(offsets[s]); t < size_t(offsets[s + 1]); ++t) {
        if (masked && !mask[t]) continue;
        const double weight = weighted ? weights[t] : 1.0f;
        sum[0] += logps[t] * weight;
        sum[1] += ref_logps[t] * weight;
        sum[2] += 1.0;
      }
      for (int k = 0; k < 3; ++k) sums[side][k].push_back(float(sum[k]));
    }
  }
  PreferenceInputs pairs = in.pairs;
  pairs.chosen = {sums[0][0].data(), 1};
  pairs.rejected = {sums[1][0].data(), 1};
  pairs.ref_chosen = {sums[0][1].data(), 1};
  pairs.ref_rejected = {sums[1][1].data(), 1};
  pairs.chosen_lengths = {sums[0][2].data(), 1};
  pairs.rejected_lengths = {sums[1][2].data(), 1};
  Batch want(count);
  preference_loss_cpu(pairs, want.outputs, 1);

  expect_near(got.total, want.total, 1e-5, "token_preference_loss: total", int64_t(count));
  for (size_t k = 0; k < 4; ++k) {
    expect_near(got.means[k], want.means[k], 1e-4, "token_preference_loss: mean", int64_t(k));
  }
  for (size_t i = 0; i < count; ++i) {
    for (int side = 0; side < 2; ++side) {
      const size_t s = interleaved ? 2 * i + size_t(side) : size_t(side) * count + i;
      for (auto t = size_t(offsets[s]); t < size_t(offsets[s + 1]); ++t) {
        const double slope = want.grads[size_t(side) * count + i] * (weighted ? weights[t] : 1.0f);
        expect_near(grad[t], masked && !mask[t] ? 0.0 : slope, 1e-6,
                    "token_preference_loss: gradient", int64_t(t));
      }
    }
  }
  expect_near(ticket, 0.0, 0.0, "token_preference_loss: ticket", int64_t(count));
}

}  // namespace

int check_token_preference_loss(bool few) {
  std::mt19937 random(1);
  const std::vector<int64_t> ragged = {0, 3, 3, 4, 37, 37, 600}, rows = {0, 33, 66, 99, 132};
  for (const bool cuda : {false, true}) {
    for (const bool interleaved : {false, true}) {
      if (few && interleaved) continue;
      for (int flags = 0; flags < 4; ++flags) {
        run(ragged, true, flags & 1, flags & 2, interleaved, cuda, random);
        run(rows, false, flags & 1, flags & 2, interleaved, cuda, random);
      }
    }
  }
  return report("token_preference_loss");
}
