// Runs kl on the CPU and on emulated CUDA and compares with double arithmetic.
#include "rlhf_fast/kl.h"

#include "check.h"

namespace rlhf_fast::checks {
namespace {

struct Case {
  DType dtype;
  int vocab;
  int padding;  // elements between rows, twice for b: odd ones leave rows unaligned
  bool jsd;
  bool cuda;
  bool at_once;  // forward and the gradient of b in one pass
};

constexpr int kRows = 3;
constexpr double kTemperature = 0.8f, kBeta = 0.25;

std::vector<double> log_softmax(const float* x, int vocab) {
  std::vector<double> z(vocab);
  double total = 0.0;
  for (int j = 0; j < vocab; ++j) total += std::exp(z[j] = x[j] / kTemperature);
  for (double& v : z) v -= std::log(total);
  return z;
}

// KL of softmax(a) from exp(other), and per element d KL / d log-prob contributions p * (l -
// other).
double kl_of(const std::vector<double>& a, const std::vector<double>& other) {
  double sum = 0.0;
  for (size_t j = 0; j < a.size(); ++j) sum += std::exp(a[j]) * (a[j] - other[j]);
  return sum;
}

void run(const Case& c, std::mt19937& random) {
  const int strides[2] = {c.vocab + c.padding, c.vocab + 2 * c.padding};
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> x[2];
  std::vector<unsigned char> bytes[2], grads[2];
  for (int side = 0; side < 2; ++side) {
    x[side].resize(size_t(kRows - 1) * strides[side] + c.vocab);
    for (float& v : x[side]) v = coarse(normal(random));
    grads[side] = bytes[side] = packed(x[side], c.dtype);
  }
  auto rows = [&](std::vector<unsigned char>& data, int side) {
    return Rows{data.data(), c.dtype, kRows, c.vocab, kRows, 0, strides[side]};
  };
  KlInputs in{rows(bytes[0], 0), rows(bytes[1], 1), float(kTemperature), c.jsd, float(kBeta)};
  std::vector<float> divergence(kRows), stats(kNumKlStats * kRows), upstream(kRows, 0.5f);
  const KlOutputs out{divergence.data(), stats.data()};
  const KlGrads backward{stats.data(), upstream.data(), rows(grads[0], 0), rows(grads[1], 1)};
  if (c.cuda) {
    kl_forward_cuda(in, out, {});
    kl_backward_cuda(in, backward, {});
  } else {
    kl_forward_cpu(in, out, 2);
    kl_backward_cpu(in, backward, 2);
  }
  if (c.at_once) {  // over b's logits, and everything else once more
    grads[1] = bytes[1];
    in.b.data = grads[1].data();
    const KlWithGrad work{out, upstream.data(), false};
    c.cuda ? kl_with_grad_cuda(in, work, {}) : kl_with_grad_cpu(in, work, 2);
  }

  const std::vector<float> da = unpacked(grads[0], c.dtype), db = unpacked(grads[1], c.dtype);
  const double rounding = c.dtype == DType::kFloat32 ? 0.0 : 0.004;
  for (int r = 0; r < kRows; ++r) {
    const std::vector<double> a = log_softmax(&x[0][size_t(r) * strides[0]], c.vocab);
    const std::vector<double> b = log_softmax(&x[1][size_t(r) * strides[1]], c.vocab);
    std::vector<double> m = b;
    if (c.jsd) {
      for (int j = 0; j < c.vocab; ++j) {
        m[j] = std::log(kBeta * std::exp(a[j]) + (1.0 - kBeta) * std::exp(b[j]));
      }
    }
    const double kl_a = kl_of(a, m), kl_b = c.jsd ? kl_of(b, m) : 0.0;
    const double want = c.jsd ? kBeta * kl_a + (1.0 - kBeta) * kl_b : kl_a;
    expect_near(divergence[r], want, 1e-5, "divergence", c.vocab);
    for (int j = 0; j < c.vocab; ++j) {
      const double pa = std::exp(a[j]), pb = std::exp(b[j]), scale = 0.5 / kTemperature;
      const double share = c.jsd ? kBeta : 1.0;
      const double want_a = scale * share * pa * (a[j] - m[j] - kl_a);
      const double want_b = scale * (c.jsd ? (1.0 - kBeta) * pb * (b[j] - m[j] - kl_b) : pb - pa);
      const size_t at_a = size_t(r) * strides[0] + j, at_b = size_t(r) * strides[1] + j;
      expect_near(da[at_a], want_a, 1e-5 + rounding * std::fabs(want_a), "gradient of a", c.vocab);
      expect_near(db[at_b], want_b, 1e-5 + rounding * std::fabs(want_b), "gradient of b", c.vocab);
    }
  }
}

}  // namespace

}  // namespace rlhf_fast::checks

int check_kl(bool few) {
  using namespace rlhf_fast;
  using namespace rlhf_fast::checks;
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
    for (const bool jsd : {false, true}) {
      for (const int vocab : {1, 33, 1000, 9001}) {
        for (const int padding : {0, 1, 8}) {
          for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
            const bool heavy = vocab == 1 || vocab > 1000 || padding == 8;
            if (few && (heavy || dtype == DType::kFloat16)) continue;
            for (const bool at_once : {false, true}) {
              run({dtype, vocab, padding, jsd, cuda, at_once}, random);
            }
          }
        }
      }
    }
  }
  return report("kl");
}
