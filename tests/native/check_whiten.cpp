// Runs whiten on the CPU and on emulated CUDA and compares with double arithmetic.
#include <memory>

#include "rlhf_fast/whiten.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

int check_whiten(bool) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(5.0f, 2.0f);
  for (const bool cuda : {false, true}) {
    for (const int64_t count : {1, 17, 9001}) {
      for (const bool masked : {false, true}) {
        std::vector<float> values(count), whitened(count, NAN);
        const std::unique_ptr<bool[]> mask(new bool[size_t(count)]);
        for (int64_t i = 0; i < count; ++i) {
          mask[i] = !masked || random() % 3;
          values[i] = mask[i] ? normal(random) : NAN;
        }
        const int64_t num_partials = (count + kWhitenChunk - 1) / kWhitenChunk;
        std::vector<double> statistics(3), partials(3 * num_partials);
        const WhitenInputs in{values.data(), masked ? mask.get() : nullptr, count};
        unsigned ticket = 0;
        const WhitenStatistics sums{statistics.data(), partials.data(), &ticket};
        const WhitenOutputs out{whitened.data(), statistics.data(), 1e-8, true, true};
        cuda ? whiten_statistics_cuda(in, sums, {}) : whiten_statistics_cpu(in, sums, 2);
        cuda ? whiten_apply_cuda(in, out, {}) : whiten_apply_cpu(in, out, 2);

        double n = 0.0, mean = 0.0, squares = 0.0;
        for (int64_t i = 0; i < count; ++i) n += mask[i], mean += mask[i] ? values[i] : 0.0;
        mean /= n > 0 ? n : 1.0;
        for (int64_t i = 0; i < count; ++i) {
          squares += mask[i] ? (values[i] - mean) * (values[i] - mean) : 0.0;
        }
        const double scale = n > 1 ? 1.0 / std::sqrt(squares / (n - 1) + 1e-8) : 0.0;
        for (int64_t i = 0; i < count; ++i) {
          const double want = mask[i] ? (values[i] - mean) * scale : 0.0;
          expect_near(whitened[i], want, 1e-5, "whiten", i);
        }
      }
    }
  }
  return report("whiten");
}
