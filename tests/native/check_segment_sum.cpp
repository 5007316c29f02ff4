// Runs segment_sum and its gradient on the CPU and on emulated CUDA, rows and packed, with empty
// sequences, and compares with double sums. Built with sanitizers; see check_logps.cpp.
#include <memory>

#include "rlhf_fast/segment_sum.h"

#include "check.h"

using namespace rlhf_fast;
using namespace rlhf_fast::checks;

namespace {

double tolerance(double want) { return 1e-5 * (1.0 + std::fabs(want)); }

void run(const std::vector<int64_t>& offsets, bool packed, bool masked, bool weighted, bool mean,
         bool cuda, std::mt19937& random) {
  const auto num_tokens = static_cast<size_t>(offsets.back());
  const size_t count = offsets.size() - 1;
  std::normal_distribution<float> normal;
  std::vector<float> values(num_tokens), weights(num_tokens), grad(num_tokens), sums(count),
      counts(count), grad_sums(count);
  const std::unique_ptr<bool[]> mask(new bool[num_tokens]);
  for (size_t t = 0; t < num_tokens; ++t) {
    values[t] = normal(random);
    weights[t] = normal(random);
    mask[t] = random() % 2;
    if (masked && !mask[t]) values[t] = NAN;
  }
  for (float& g : grad_sums) g = normal(random);
  SegmentSumInputs in;
  in.sequences = {int64_t(count), packed ? 0 : offsets[1], offsets.back(),
                  packed ? offsets.data() : nullptr};
  in.values = values.data();
  in.mask = masked ? mask.get() : nullptr;
  in.weights = weighted ? weights.data() : nullptr;
  in.mean = mean;
  const SegmentSumOutputs out{sums.data(), counts.data()};
  const SegmentSumGrads grads{counts.data(), grad_sums.data(), grad.data()};
  if (cuda) {
    segment_sum_cuda(in, out, {});
    segment_sum_backward_cuda(in, grads, {});
  } else {
    segment_sum_cpu(in, out, 2);
    segment_sum_backward_cpu(in, grads, 2);
  }
  for (size_t s = 0; s < count; ++s) {
    double sum = 0.0, tokens = 0.0;
    for (auto t = size_t(offsets[s]); t < size_t(offsets[s + 1]); ++t) {
      if (masked && !mask[t]) continue;
      sum += double(values[t]) * (weighted ? weights[t] : 1.0f);
      tokens += 1.0;
    }
    const double divisor = mean && tokens > 0.0 ? tokens : 1.0;
    const double value = sum / divisor;
    expect_near(sums[s], value, tolerance(value), "segment_sum: sum", int64_t(s));
    expect_near(counts[s], tokens, 0.0, "segment_sum: count", int64_t(s));
    for (auto t = size_t(offsets[s]); t < size_t(offsets[s + 1]); ++t) {
      const double share = grad_sums[s] / divisor * (weighted ? weights[t] : 1.0f);
      const double want = masked && !mask[t] ? 0.0 : share;
      expect_near(grad[t], want, tolerance(want), "segment_sum: gradient", int64_t(t));
    }
  }
}

}  // namespace

int check_segment_sum(bool few) {
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
    for (int bits = 0; bits < (few ? 2 : 8); ++bits) {
      const bool masked = bits & 1, weighted = bits & 2, mean = bits & 4;
      run({0, 0, 1, 34, 34, 1100, 1101}, true, masked, weighted, mean, cuda, random);
      run({0, 300, 600}, false, masked, weighted, mean, cuda, random);
    }
  }
  return report("segment_sum");
}
