// What the losses of token sequences share on CUDA: one block per sequence, sums in a fixed order.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

#include "../math/aggregation.h"
#include "../math/sequences.h"

namespace rlhf_fast::gpu {
namespace {

constexpr int kTokenBlock = 256;
constexpr int kTokenWarps = kTokenBlock / 32;

template <int kCount>
struct Floats {
  float at[kCount];
  RLHF_FAST_DEVICE float& operator[](int i) { return at[i]; }
  RLHF_FAST_DEVICE float operator[](int i) const { return at[i]; }
};

template <int kCount>
RLHF_FAST_DEVICE Floats<kCount> sum_block(const Floats<kCount>& own) {
  return reduce_block<kTokenBlock>(own, Floats<kCount>{},
                                   [](const Floats<kCount>& a, const Floats<kCount>& b) {
                                     Floats<kCount> sum;
#pragma unroll
                                     for (int i = 0; i < kCount; ++i) sum[i] = a[i] + b[i];
                                     return sum;
                                   });
}

// How many tokens of each sequence count.
__global__ void __launch_bounds__(kTokenBlock)
    token_lengths_kernel(Sequences sequences, const bool* mask, float* lengths) {
  const Span span = span_of(sequences, blockIdx.x);
  Floats<1> count{};
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
    count[0] += !mask || mask[t] ? 1.0f : 0.0f;
  }
  count = sum_block(count);
  if (threadIdx.x == 0) lengths[blockIdx.x] = count[0];
}

// The weight of this block's tokens. Each block adds up the lengths again: cheaper than a launch.
RLHF_FAST_DEVICE float weight_of_block(const Aggregation& aggregation, const float* lengths,
                                       int64_t num_sequences) {
  Floats<2> counts{};
  if (aggregation.denominator != Denominator::kGiven) {
    for (int64_t s = threadIdx.x; s < num_sequences; s += kTokenBlock) {
      counts[0] += lengths[s];
      counts[1] += lengths[s] > 0.0f ? 1.0f : 0.0f;
    }
    counts = sum_block(counts);
  }
  return token_weight(aggregation, batch_weight(aggregation, counts[0], counts[1]), blockIdx.x,
                      lengths[blockIdx.x]);
}

template <int kCount>
RLHF_FAST_DEVICE void write_partials(float* partials, const Floats<kCount>& sums) {
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

}  // namespace
}  // namespace rlhf_fast::gpu
