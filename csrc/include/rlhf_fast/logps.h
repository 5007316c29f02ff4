// Log-probability of chosen labels under softmax(logits), with statistics of the same distribution.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

constexpr int kMaxLabelsPerRow = 512;

// z = logit_scale * x, then softcap * tanh(z / softcap) if softcap > 0, then z / temperature.
struct LogpsInputs {
  Rows logits;
  const void* labels = nullptr;  // (num_rows, labels_per_row), int32 or int64
  bool labels_are_int32 = false;
  int64_t labels_per_row = 1;
  int64_t ignore_index = -100;
  float logit_scale = 1.0f;
  float softcap = 0.0f;
  float temperature = 1.0f;
  const float* row_temperatures = nullptr;  // (num_rows,), replaces `temperature`
  // (num_rows,): logits x below it have no probability; a label there gets log-prob -inf and passes
  // no gradient
  const float* row_thresholds = nullptr;
};

// A null pointer means "not asked for", except for the first two, which backward needs. They split
// lse = z(reference) + log_sum, so that a probability near 1 keeps its distance from 1.
struct LogpsOutputs {
  float* reference = nullptr;  // in units of csrc/math/logits.h
  float* log_sum = nullptr;
  float* lse = nullptr;
  float* logps = nullptr;       // (num_rows, labels_per_row); 0 at ignored labels
  float* entropy = nullptr;     // nats
  float* sum_p2 = nullptr;      // sum of squared probabilities
  float* mean_logit = nullptr;  // mean of z
  bool* is_top1 = nullptr;      // (num_rows, labels_per_row); the first of equal maxima counts
};

// d(logits) of sum(grad_logps * logps + grad_entropy * entropy + grad_lse * lse). grad_logits may
// be the logits themselves. A null gradient counts as zero; entropy is read with grad_entropy only.
struct LogpsGrads {
  const float* reference = nullptr;
  const float* log_sum = nullptr;
  const float* entropy = nullptr;
  const float* grad_logps = nullptr;
  const float* grad_entropy = nullptr;
  const float* grad_lse = nullptr;
  Rows grad_logits;
};

// `logps_with_grad` is forward and then backward over the logits themselves, for upstream gradients
// that are known beforehand: the row stays in the cache or on the chip in between.
struct LogpsWithGrad {
  LogpsOutputs out;  // reference, log_sum and, with grad_entropy, entropy must be asked for
  const float* grad_logps = nullptr;
  const float* grad_entropy = nullptr;
  const float* grad_lse = nullptr;
};

// The CPU functions throw std::invalid_argument naming the row of a label outside [0, width).
void logps_forward_cpu(const LogpsInputs& in, const LogpsOutputs& out, int num_threads);
void logps_backward_cpu(const LogpsInputs& in, const LogpsGrads& grads, int num_threads);
void logps_with_grad_cpu(const LogpsInputs& in, const LogpsWithGrad& work, int num_threads);

// The CUDA functions only launch. There, a label outside [0, width) counts as ignored.
void logps_forward_cuda(const LogpsInputs& in, const LogpsOutputs& out, CudaTarget target);
void logps_backward_cuda(const LogpsInputs& in, const LogpsGrads& grads, CudaTarget target);
void logps_with_grad_cuda(const LogpsInputs& in, const LogpsWithGrad& work, CudaTarget target);

// The gradients that follow a forward pass, written over the logits.
inline LogpsGrads grads_of(const LogpsInputs& in, const LogpsWithGrad& work) {
  return {work.out.reference, work.out.log_sum, work.out.entropy, work.grad_logps,
          work.grad_entropy,  work.grad_lse,    in.logits};
}

}  // namespace rlhf_fast
