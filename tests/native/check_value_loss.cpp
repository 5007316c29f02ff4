// Runs value_loss on the CPU and on emulated CUDA and compares with double arithmetic.
#include <algorithm>
#include <memory>

#include "rlhf_fast/value_loss.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

int check_value_loss(bool) {
  const std::vector<int64_t> offsets{0, 40, 40, 41, 700};
  constexpr int64_t kTokens = 700;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const bool cuda : {false, true}) {
    for (const bool clipped : {false, true}) {
      std::vector<float> values(kTokens), old_values(kTokens), returns(kTokens);
      const std::unique_ptr<bool[]> mask(new bool[size_t(kTokens)]);
      double count = 0.0, loss = 0.0;
      std::vector<double> slopes(kTokens);
      for (int64_t t = 0; t < kTokens; ++t) {
        mask[t] = random() % 4;
        values[t] = mask[t] ? normal(random) : NAN;
        old_values[t] = values[t] + 0.5f * normal(random);
        returns[t] = normal(random);
        if (!mask[t]) continue;
        const double v = values[t], r = returns[t], old = old_values[t];
        const double c = std::clamp(v, old - 0.2f, old + 0.2f);
        const bool cut = clipped && (c - r) * (c - r) > (v - r) * (v - r);
        loss += 0.5 * (cut ? (c - r) * (c - r) : (v - r) * (v - r));
        slopes[t] = cut ? 0.0 : v - r;
        count += 1.0;
      }
      ValueLossInputs in;
      in.sequences = {4, 0, kTokens, offsets.data()};
      in.values = values.data();
      in.old_values = clipped ? old_values.data() : nullptr;
      in.returns = returns.data();
      in.mask = mask.get();
      in.clip = 0.2f;
      float got = NAN;
      std::vector<float> metrics(kNumValueMetrics), d_values(kTokens, NAN), lengths(4),
          partials(4 * kNumValueSums);
      float scale = NAN;
      unsigned ticket = 0;
      const ValueLossOutputs out{
          &got, metrics.data(), d_values.data(), lengths.data(), partials.data(), &scale, &ticket};
      cuda ? value_loss_cuda(in, out, {}) : value_loss_cpu(in, out, 2);
      expect_near(got, loss / count, 1e-5, "value_loss", clipped);
      expect_near(metrics[kNumValueMetrics - 1], count, 0.0, "value_loss: tokens", clipped);
      for (int64_t t = 0; t < kTokens; ++t) {
        expect_near(d_values[t] * scale, slopes[t] / count, 1e-6, "value_loss: gradient", t);
      }
    }
  }
  return report("value_loss");
}
