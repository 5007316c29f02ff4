// Whitening of the numbers that a mask selects, in two steps, so that a process group can add up
// the statistics in between.
#pragma once

#include "rlhf_fast/common.h"

namespace rlhf_fast {

struct WhitenInputs {
  const float* values = nullptr;
  const bool* mask = nullptr;  // null: all
  int64_t count = 0;
};

// Count, sum and sum of squares of the selected values. `partials` is scratch for one such triple
// per chunk.
struct WhitenStatistics {
  double* statistics = nullptr;
  double* partials = nullptr;
  unsigned* ticket = nullptr;  // CUDA: zero before and after; no other launch may use it meanwhile
};
constexpr int64_t kWhitenChunk = 4096;

// (x - mean) / sqrt(variance + epsilon), plus the mean again without shift_mean; 0 where masked.
struct WhitenOutputs {
  float* whitened = nullptr;
  const double* statistics = nullptr;
  double epsilon = 1e-8;
  bool unbiased = true;
  bool shift_mean = true;
};

void whiten_statistics_cpu(const WhitenInputs& in, const WhitenStatistics& out, int num_threads);
void whiten_statistics_cuda(const WhitenInputs& in, const WhitenStatistics& out, CudaTarget target);
void whiten_apply_cpu(const WhitenInputs& in, const WhitenOutputs& out, int num_threads);
void whiten_apply_cuda(const WhitenInputs& in, const WhitenOutputs& out, CudaTarget target);

}  // namespace rlhf_fast
