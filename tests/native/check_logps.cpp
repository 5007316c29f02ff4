// Runs logps on the CPU and on emulated CUDA over small shapes that reach every branch, and
// compares with double arithmetic.
#include "rlhf_fast/logps.h"

#include "check.h"

namespace rlhf_fast::checks {
namespace {

struct Case {
  DType dtype;
  int vocab;
  int padding;  // elements between rows: odd ones leave rows unaligned
  int labels_per_row;
  float softcap;
  bool cuda;
  bool at_once;  // forward and backward in one pass
};

void run(const Case& c, std::mt19937& random) {
  constexpr int kRows = 3;
  const int stride = c.vocab + c.padding, num_labels = kRows * c.labels_per_row;
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(size_t(kRows - 1) * stride + c.vocab);
  for (float& x : logits) x = coarse(normal(random));
  std::vector<int64_t> labels(num_labels);
  for (auto& y : labels) y = int64_t(random() % unsigned(c.vocab));
  labels[0] = -100;
  std::vector<float> grad_logps(num_labels, 0.5f), grad_entropy(kRows, 0.25f);
  std::vector<float> reference(kRows), log_sum(kRows), lse(kRows), logps(num_labels),
      entropy(kRows), sum_p2(kRows), mean(kRows);
  std::vector<char> is_top1(num_labels);

  LogpsInputs in;
  std::vector<unsigned char> forward_logits = packed(logits, c.dtype), inplace = forward_logits;
  in.logits = {forward_logits.data(), c.dtype, kRows, c.vocab, kRows, 0, stride};
  in.labels = labels.data();
  in.labels_per_row = c.labels_per_row;
  in.softcap = c.softcap;
  in.temperature = 0.8f;
  const LogpsOutputs out{
      reference.data(), log_sum.data(), lse.data(),  logps.data(),
      entropy.data(),   sum_p2.data(),  mean.data(), reinterpret_cast<bool*>(is_top1.data())};
  LogpsGrads grads{reference.data(),    log_sum.data(), entropy.data(), grad_logps.data(),
                   grad_entropy.data(), nullptr,        in.logits};
  grads.grad_logits.data = inplace.data();
  LogpsInputs backward_in = in;
  backward_in.logits.data = inplace.data();
  const LogpsWithGrad work{out, grad_logps.data(), grad_entropy.data(), nullptr};
  if (c.at_once) {
    c.cuda ? logps_with_grad_cuda(backward_in, work, {})
           : logps_with_grad_cpu(backward_in, work, 2);
  } else if (c.cuda) {
    logps_forward_cuda(in, out, {});
    logps_backward_cuda(backward_in, grads, {});
  } else {
    logps_forward_cpu(in, out, 2);
    logps_backward_cpu(backward_in, grads, 2);
  }

  const std::vector<float> grad = unpacked(inplace, c.dtype);
  const double rounding = c.dtype == DType::kFloat32 ? 0.0 : 0.004;
  for (int r = 0; r < kRows; ++r) {
    std::vector<double> z(c.vocab), slope(c.vocab);
    double total = 0.0;
    for (int j = 0; j < c.vocab; ++j) {
      const double x = logits[size_t(r) * stride + j];
      const double t = c.softcap > 0 ? std::tanh(x / c.softcap) : 0.0;
      z[j] = (c.softcap > 0 ? c.softcap * t : x) / 0.8f;
      slope[j] = (1.0 - t * t) / 0.8f;
      total += std::exp(z[j]);
    }
    const double log_total = std::log(total);
    double h = 0.0, upstream = 0.0;
    for (double zj : z) h -= std::exp(zj - log_total) * (zj - log_total);
    expect_near(lse[r], log_total, 2e-5, "lse", c.vocab);
    expect_near(entropy[r], h, 2e-5, "entropy", c.vocab);
    std::vector<double> chosen(c.vocab, 0.0);
    for (int k = 0; k < c.labels_per_row; ++k) {
      const int64_t y = labels[r * c.labels_per_row + k];
      const double want = y < 0 ? 0.0 : z[y] - log_total;
      expect_near(logps[r * c.labels_per_row + k], want, 2e-5, "logps", c.vocab);
      if (y < 0) continue;
      chosen[y] += 0.5;
      upstream += 0.5;
    }
    for (int j = 0; j < c.vocab; ++j) {
      const double lp = z[j] - log_total;
      const double want = slope[j] * (chosen[j] - std::exp(lp) * (upstream + 0.25 * (lp + h)));
      expect_near(grad[size_t(r) * stride + j], want, 1e-5 + rounding * std::fabs(want), "gradient",
                  c.vocab);
    }
  }
}

}  // namespace

}  // namespace rlhf_fast::checks

int check_logps(bool few) {
  using namespace rlhf_fast;
  using namespace rlhf_fast::checks;
  std::mt19937 random(1);
  for (const bool cuda : {false, true}) {
    for (const int vocab : {1, 33, 1000, 9001}) {
      for (const int padding : {0, 1, 8}) {
        for (const int labels_per_row : {1, 3}) {
          for (const float softcap : {0.0f, 5.0f}) {
            for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
              const bool heavy = vocab == 1 || vocab > 1000 || padding == 8 || softcap > 0.0f;
              if (few && (heavy || dtype == DType::kFloat16)) continue;
              for (const bool at_once : {false, true}) {
                run({dtype, vocab, padding, labels_per_row, softcap, cuda, at_once}, random);
              }
            }
          }
        }
      }
    }
  }
  // A row that only a cluster of blocks can keep.
  run({DType::kFloat32, few ? 20001 : 70001, 1, 1, 0.0f, true, true}, random);
  return report("logps");
}
