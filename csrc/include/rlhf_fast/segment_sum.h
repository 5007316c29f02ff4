// Sums and means of token values per sequence.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// A token counts where the mask is set, everywhere without one. Values that do not count are not
// looked at, so they may be NaN.
struct SegmentSumInputs {
  Sequences sequences;
  const float* values = nullptr;
  const bool* mask = nullptr;
  const float* weights = nullptr;  // multiply the values
  bool mean = false;               // divide by the number of tokens that count, if there are any
};

struct SegmentSumOutputs {
  float* sums = nullptr;    // (sequences,)
  float* counts = nullptr;  // (sequences,): tokens that count
};

// values are not read; grad_values is written for every token.
struct SegmentSumGrads {
  const float* counts = nullptr;
  const float* grad_sums = nullptr;
  float* grad_values = nullptr;
};

void segment_sum_cpu(const SegmentSumInputs& in, const SegmentSumOutputs& out, int num_threads);
void segment_sum_backward_cpu(const SegmentSumInputs& in, const SegmentSumGrads& grads,
                              int num_threads);

void segment_sum_cuda(const SegmentSumInputs& in, const SegmentSumOutputs& out, CudaTarget target);
void segment_sum_backward_cuda(const SegmentSumInputs& in, const SegmentSumGrads& grads,
                               CudaTarget target);

}  // namespace rlhf_fast
