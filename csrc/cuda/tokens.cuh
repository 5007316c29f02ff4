// What the losses of token sequences share on CUDA: one block per sequence; the last block to end
// adds up what all have written, in a fixed order.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

#include "../math/aggregation.h"
#include "../math/sequences.h"

namespace rlhf_fast::gpu {
namespace {

constexpr int kTokenBlock = 256;
constexpr int kTokenWarps = kTokenBlock / 32;

// How many tokens of this block's sequence count. Every thread gets it, thread 0 writes it.
RLHF_FAST_DEVICE float length_of_block(Span span, const bool* mask, float* lengths) {
  Totals<1> count{{float(span.end - span.begin)}};
  if (mask) {
    count[0] = 0.0f;
    for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
      count[0] += mask[t] ? 1.0f : 0.0f;
    }
    count = sum_block<kTokenBlock>(count);
  }
  if (threadIdx.x == 0) lengths[blockIdx.x] = count[0];
  return count[0];
}

template <int kCount>
RLHF_FAST_DEVICE void write_partials(float* partials, const Totals<kCount>& sums) {
  if (threadIdx.x != 0) return;
  float* own = partials + int64_t(blockIdx.x) * kCount;
#pragma unroll
  for (int m = 0; m < kCount; ++m) own[m] = sums[m];
}

// Sum of every stride-th number, by one warp; each lane gets it.
RLHF_FAST_DEVICE double sum_column(const float* first, int64_t count, int stride) {
  double sum = 0.0;
  for (int64_t s = threadIdx.x & 31; s < count; s += 32) sum += double(first[s * stride]);
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// The batch's counts, from the sequences' lengths, by one warp.
struct BatchCounts {
  double tokens = 0.0, sequences = 0.0;
};
RLHF_FAST_DEVICE BatchCounts count_batch(const float* lengths, int64_t num_sequences) {
  BatchCounts counts;
  for (int64_t s = threadIdx.x & 31; s < num_sequences; s += 32) {
    counts.tokens += double(lengths[s]);
    counts.sequences += lengths[s] > 0.0f ? 1.0 : 0.0;
  }
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    counts.tokens += __shfl_xor_sync(0xffffffffu, counts.tokens, step);
    counts.sequences += __shfl_xor_sync(0xffffffffu, counts.sequences, step);
  }
  return counts;
}

}  // namespace
}  // namespace rlhf_fast::gpu
