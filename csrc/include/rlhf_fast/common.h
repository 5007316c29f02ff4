// Types shared by every op. Plain values only: the C++ API knows no framework.
#pragma once

#include <cstdint>

namespace rlhf_fast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Rows of `width` numbers that lie side by side in memory. Row r starts
// (r / inner) * outer_stride + (r % inner) * inner_stride elements after `data`, so a batch of
// shifted sequences, `logits[:, :-1]`, is read where it lies.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t num_rows = 0;
  int64_t width = 0;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
};

// Sequences of tokens that lie one after another: rows of `length` tokens, or packed, where
// sequence s holds tokens [offsets[s], offsets[s + 1]) of `total`.
struct Sequences {
  int64_t count = 0;
  int64_t length = 0;
  int64_t total = 0;
  const int64_t* offsets = nullptr;
};

// What a sum of token losses is divided by: a given number, or a count of what the mask leaves.
enum class Denominator : int { kGiven, kTokens, kSequences };

// How token losses become one number.
struct Aggregation {
  Denominator denominator = Denominator::kTokens;
  bool mean_over_tokens = false;            // of each sequence, before summing over sequences
  float scale = 1.0f;                       // multiplies the result
  const float* normalizer = nullptr;        // one number, for kGiven; null: 1
  const float* sequence_weights = nullptr;  // one per sequence, multiply its tokens' losses
};

// One float per item, at any distance, so that halves and columns of a batch need no copy.
// A null `data` means "not given".
struct Column {
  const float* data = nullptr;
  int64_t stride = 1;
};

// Where a CUDA kernel runs: device ordinal and cudaStream_t as an integer.
struct CudaTarget {
  int device = 0;
  std::uintptr_t stream = 0;
};

}  // namespace rlhf_fast
