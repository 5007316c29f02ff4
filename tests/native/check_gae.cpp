// Runs gae on the CPU and on emulated CUDA over small shapes that reach every branch, and compares
// with double arithmetic.
#include <memory>

#include "rlhf_fast/gae.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

struct Case {
  std::vector<int64_t> lengths;
  int masking;  // 0 none, 1 spans, 2 scattered, 3 everything
  bool packed, skip_masked, cuda;
};

void run(const Case& c, std::mt19937& random) {
  std::vector<int64_t> offsets{0};
  for (int64_t n : c.lengths) offsets.push_back(offsets.back() + n);
  const int64_t total = offsets.back(), count = int64_t(c.lengths.size());
  std::normal_distribution<float> normal;
  std::vector<float> rewards(total), values(total), bootstrap(count), advantages(total, NAN),
      returns(total, NAN);
  for (float& x : rewards) x = normal(random);
  for (float& x : values) x = normal(random);
  for (float& x : bootstrap) x = normal(random);
  const std::unique_ptr<bool[]> mask(new bool[size_t(total)]);
  for (int64_t t = 0; t < total; ++t) {
    mask[t] = c.masking == 0 || (c.masking == 1 && t / 23 % 2) || (c.masking == 2 && random() % 2);
    if (!mask[t]) rewards[t] = values[t] = NAN;
  }

  GaeInputs in;
  in.sequences = {count, c.packed ? 0 : c.lengths[0], total, c.packed ? offsets.data() : nullptr};
  in.rewards = rewards.data();
  in.values = values.data();
  in.mask = c.masking ? mask.get() : nullptr;
  in.bootstrap_values = bootstrap.data();
  in.gamma = 0.9f;
  in.lambda = 0.8f;
  in.skip_masked = c.skip_masked;
  const GaeOutputs out{advantages.data(), returns.data()};
  c.cuda ? gae_forward_cuda(in, out, {}) : gae_forward_cpu(in, out, 2);

  const double gamma = in.gamma, decay = double(in.gamma * in.lambda);
  for (int64_t s = 0; s < count; ++s) {
    double next = bootstrap[s], advantage = 0.0;
    for (int64_t t = offsets[s + 1] - 1; t >= offsets[s]; --t) {
      double want = 0.0, value = 0.0;
      if (mask[t] || !c.skip_masked) {
        value = mask[t] ? values[t] : 0.0;
        const double delta = (mask[t] ? rewards[t] : 0.0) + gamma * next - value;
        advantage = delta + decay * advantage;
        next = value;
      }
      if (mask[t]) want = advantage;
      expect_near(advantages[t], want, 1e-4, "gae: advantage", t);
      expect_near(returns[t], want + value, 1e-4, "gae: return", t);
    }
  }
}

}  // namespace

int check_gae(bool few) {
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
    for (const bool packed : {false, true}) {
      for (const int masking : {0, 1, 2, 3}) {
        for (const bool skip : {false, true}) {
          if (few && (masking == 0 || masking == 3)) continue;
          run({packed ? std::vector<int64_t>{5, 0, 1, 1500, 16} : std::vector<int64_t>{70, 70, 70},
               masking, packed, skip, cuda},
              random);
        }
      }
    }
  }
  return report("gae");
}
