// One pass over a row of logits that yields its log-sum and, if asked, more of its softmax.
//
// It needs no maximum beforehand: exponents are taken relative to a reference that is kept until a
// block's maximum exceeds it by more than kRedo; only then that block is done again, with its
// maximum as the new reference.
#pragma once

#include <cmath>
#include <limits>

#include "../math/logits.h"
#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLn2Exact = 0.6931471805599453;
constexpr float kRedo = 4.0f;      // binary orders above the reference: exponents stay accurate
constexpr float kFloor = -126.0f;  // binary orders below it that count as nothing
constexpr int64_t kBlock = 2048;   // elements between two looks at the maximum; they stay in L1

// Sums over one block, with e = 2^((v - reference) * outer2).
template <bool kEntropy, bool kMore>
struct BlockSums {
  static constexpr int kUnroll = 4;
  Vec max[kUnroll];
  Vec sum[kUnroll];                      // e
  Vec weighted[kEntropy ? kUnroll : 1];  // e * log2(e)
  Vec squares[kMore ? kUnroll : 1];      // e * e
  Vec values[kMore ? kUnroll : 1];       // v

  RLHF_FAST_INLINE BlockSums() {
    for (auto& v : max) v = Vec(-kInfinity);
    for (auto& v : sum) v = Vec(0.0f);
    for (auto& v : weighted) v = Vec(0.0f);
    for (auto& v : squares) v = Vec(0.0f);
    for (auto& v : values) v = Vec(0.0f);
  }

  RLHF_FAST_INLINE void add(int k, Vec v, Vec reference, Vec outer2) {
    max[k] = RLHF_FAST_ISA::max(v, max[k]);
    Vec u = (v - reference) * outer2;
    if constexpr (kEntropy || !Vec::kScaleSaturates) u = RLHF_FAST_ISA::max(Vec(kFloor), u);
    const Vec e = exp2_bounded(u);
    sum[k] = sum[k] + e;
    if constexpr (kEntropy) weighted[k] = fma(e, u, weighted[k]);
    if constexpr (kMore) squares[k] = fma(e, e, squares[k]);
  }

  RLHF_FAST_INLINE float largest() const {
    using RLHF_FAST_ISA::max;
    return max_of(max(max(this->max[0], this->max[1]), max(this->max[2], this->max[3])));
  }
};

// A distance in binary orders beyond which nothing is left; the first reference lies that far off.
RLHF_FAST_INLINE double bounded(double up) { return up > 1000.0 ? 1000.0 : up; }

// The sums of a row, in double: a few additions per block cost nothing and keep the rounding error
// independent of the vocabulary.
struct SoftmaxRow {
  float reference = std::numeric_limits<float>::lowest();
  float largest = -kInfinity;
  double sum = 0.0, weighted = 0.0, squares = 0.0, values = 0.0;

  // Refers them to a reference that lies `up` binary orders higher.
  void raise(double up) {
    up = bounded(up);
    const double scale = std::exp2(-up);
    weighted = (weighted - sum * up) * scale;
    sum *= scale;
    squares *= scale * scale;
  }

  // A row of nothing but -inf: lse is -inf, its probabilities are undefined.
  bool empty() const { return largest == -kInfinity && sum == sum; }
  float log_sum() const {
    return empty() ? std::numeric_limits<float>::quiet_NaN() : float(std::log(sum));
  }
};

RLHF_FAST_INLINE double total(const Vec (&v)[4]) { return sum_of((v[0] + v[1]) + (v[2] + v[3])); }

template <class T, bool kSoftcap, bool kEntropy, bool kMore>
SoftmaxRow softmax_row(const T* x, int64_t vocab, const LogitMap& map) {
  constexpr int kWidth = Vec::kWidth;
  const Vec outer2(map.outer2);
  SoftmaxRow row;
  for (int64_t begin = 0; begin < vocab;) {
    // The first block is short: it is done twice.
    const int64_t length = begin == 0 ? 8 * kWidth : kBlock;
    const int64_t end = begin + length < vocab ? begin + length : vocab;
    BlockSums<kEntropy, kMore> block;
    const Vec reference(row.reference);
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      for (int k = 0; k < 4; ++k) {
        const Vec v = map.value<kSoftcap>(load(x + i + k * kWidth));
        block.add(k, v, reference, outer2);
        if constexpr (kMore) block.values[k] = block.values[k] + v;
      }
    }
    for (; i < end; i += kWidth) {
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      const Vec v = map.value<kSoftcap>(load_part(x + i, count));
      block.add(0, keep_lanes(v, count, -kInfinity), reference, outer2);
      if constexpr (kMore) block.values[0] = block.values[0] + keep_lanes(v, count, 0.0f);
    }
    const float highest = block.largest();
    const float up = (highest - row.reference) * map.outer2;
    if (up > kRedo) {  // false for NaN and while everything is -inf
      row.raise(up);
      row.reference = highest;
      continue;
    }
    row.largest = highest > row.largest ? highest : row.largest;
    row.sum += total(block.sum);
    if constexpr (kEntropy) row.weighted += total(block.weighted);
    if constexpr (kMore) row.squares += total(block.squares);
    if constexpr (kMore) row.values += total(block.values);
    begin = end;
  }
  return row;
}

// Small rows are handed out many at a time.
inline int64_t rows_per_piece(int64_t vocab) { return vocab > 16384 ? 1 : 16384 / vocab; }

}  // namespace
}  // namespace rlhf_fast::RLHF_FAST_ISA
