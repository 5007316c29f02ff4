// Divergence between the distributions of two rows of logits.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// KL(a || b) per row, or with `jsd` the generalised Jensen-Shannon divergence
// beta * KL(a || m) + (1 - beta) * KL(b || m), m = beta * a + (1 - beta) * b.
// a and b have the same dtype and shape, their strides may differ.
struct KlInputs {
  Rows a;
  Rows b;
  float temperature = 1.0f;
  bool jsd = false;
  float beta = 0.5f;
};

// What backward needs of each row, kNumKlStats arrays of num_rows floats one after another:
// reference and log_sum of a, of b (see logps.h), KL(a || .), KL(b || .).
constexpr int kNumKlStats = 6;

struct KlOutputs {
  float* divergence = nullptr;
  float* stats = nullptr;
};

// grad_a.data and grad_b.data may be null ("not asked for") or the logits themselves.
struct KlGrads {
  const float* stats = nullptr;
  const float* grad_divergence = nullptr;
  Rows grad_a;
  Rows grad_b;
};

// `kl_with_grad` is forward and then backward over the logits of one side, for upstream gradients
// that are known beforehand: the rows stay in the cache or on the chip in between.
struct KlWithGrad {
  KlOutputs out;
  const float* grad_divergence = nullptr;
  bool over_a = false;  // rather than over b
};

void kl_forward_cpu(const KlInputs& in, const KlOutputs& out, int num_threads);
void kl_backward_cpu(const KlInputs& in, const KlGrads& grads, int num_threads);
void kl_with_grad_cpu(const KlInputs& in, const KlWithGrad& work, int num_threads);
void kl_forward_cuda(const KlInputs& in, const KlOutputs& out, CudaTarget target);
void kl_backward_cuda(const KlInputs& in, const KlGrads& grads, CudaTarget target);
void kl_with_grad_cuda(const KlInputs& in, const KlWithGrad& work, CudaTarget target);

// The gradients that follow a forward pass, written over the logits.
inline KlGrads grads_of(const KlInputs& in, const KlWithGrad& work) {
  return {work.out.stats, work.grad_divergence, work.over_a ? in.a : Rows{},
          work.over_a ? Rows{} : in.b};
}

}  // namespace rlhf_fast
