// One pass over a row of logits that yields its log-sum and, if asked, more of its softmax.
//
// It needs no maximum beforehand: exponents are taken relative to a reference, the maximum of an
// earlier block. If they turn out too large, which the sum shows, the block is done again with its
// own maximum as the reference.
#pragma once

#include <cmath>
#include <limits>

#include "../math/logits.h"
#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLn2Exact = 0.6931471805599453;
constexpr float kRedo = 4.0f;       // binary orders above the reference: exponents stay accurate
constexpr float kCeiling = 126.0f;  // binary orders above it: certainly to be done again
constexpr float kFloor = -126.0f;   // binary orders below it that count as nothing
constexpr int64_t kBlock = 2048;    // elements between two looks at the sum; they stay in L1
// A row is summed in segments that know nothing of each other and are merged in order, so its
// result is the same whether one thread walks it or several.
constexpr int64_t kSegment = 32768;
inline int64_t num_segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

// (v - reference) in binary orders, where needed within the bounds of exp2_bounded.
template <bool kFinite>
RLHF_FAST_INLINE Vec exponent(Vec v, Vec reference, Vec outer2) {
  Vec u = (v - reference) * outer2;
  if constexpr (!Vec::kScaleSaturates) u = select_lt(Vec(kCeiling), u, Vec(kCeiling), u);
  if constexpr (kFinite || !Vec::kScaleSaturates) u = RLHF_FAST_ISA::max(Vec(kFloor), u);
  return u;
}

// Sums over one block, with e = 2^((v - reference) * outer2).
template <bool kEntropy, bool kMore>
struct BlockSums {
  static constexpr int kUnroll = 4;
  Vec sum[kUnroll];                      // e
  Vec weighted[kEntropy ? kUnroll : 1];  // e * log2(e)
  Vec squares[kMore ? kUnroll : 1];      // e * e
  Vec values[kMore ? kUnroll : 1];       // v

  RLHF_FAST_INLINE BlockSums() {
    for (auto& v : sum) v = Vec(0.0f);
    for (auto& v : weighted) v = Vec(0.0f);
    for (auto& v : squares) v = Vec(0.0f);
    for (auto& v : values) v = Vec(0.0f);
  }

  RLHF_FAST_INLINE void add(int k, Vec v, Vec reference, Vec outer2) {
    const Vec u = exponent<kEntropy>(v, reference, outer2);
    const Vec e = exp2_bounded(u);
    sum[k] = sum[k] + e;
    if constexpr (kEntropy) weighted[k] = fma(e, u, weighted[k]);
    if constexpr (kMore) squares[k] = fma(e, e, squares[k]);
  }
};

// The largest v of x[begin, end); NaNs are passed over.
template <Form kForm, class T>
float largest_value(const T* x, int64_t begin, int64_t end, const LogitMap& map) {
  constexpr int kWidth = Vec::kWidth;
  Vec largest(-kInfinity);
  for (int64_t i = begin; i < end; i += kWidth) {
    const int64_t count = end - i < kWidth ? end - i : kWidth;
    const Vec v = map.value<kForm>(count == kWidth ? load(x + i) : load_part(x + i, count));
    largest = max(count == kWidth ? v : keep_lanes(v, count, -kInfinity), largest);
  }
  return max_of(largest);
}

// A distance in binary orders beyond which nothing is left; the first reference lies that far off.
RLHF_FAST_INLINE double bounded(double up) { return up > 1000.0 ? 1000.0 : up; }

// The sums of a row, in double: a few additions per block cost nothing and keep the rounding error
// independent of the vocabulary.
struct SoftmaxRow {
  float reference = std::numeric_limits<float>::lowest();
  bool empty = false;  // nothing but -inf: lse is -inf, the probabilities are undefined
  double sum = 0.0, weighted = 0.0, squares = 0.0, values = 0.0;

  // Refers them to a reference that lies `up` binary orders higher.
  void raise(double up) {
    up = bounded(up);
    const double scale = std::exp2(-up);
    weighted = (weighted - sum * up) * scale;
    sum *= scale;
    squares *= scale * scale;
  }

  void merge(SoftmaxRow other, float outer2) {
    const double up = double(other.reference - reference) * outer2;
    if (up > 0.0) {
      raise(up);
      reference = other.reference;
    } else {
      other.raise(-up);
    }
    sum += other.sum;
    weighted += other.weighted;
    squares += other.squares;
    values += other.values;
  }

  float log_sum() const {
    return empty ? std::numeric_limits<float>::quiet_NaN() : float(std::log(sum));
  }

  // Whether a block with this sum must be done again, with the row raised to its maximum.
  template <Form kForm, class T>
  bool must_raise(float block_sum, const T* x, int64_t begin, int64_t end, const LogitMap& map,
                  double& up) {
    if (block_sum < 16.0f) return false;  // 2^kRedo: no term can be larger
    const float highest = largest_value<kForm>(x, begin, end, map);
    up = bounded((highest - reference) * map.outer2);
    if (!(up > kRedo)) return false;  // also for NaN
    raise(up);
    reference = highest;
    return true;
  }

  // To be called when the row is done.
  template <Form kForm, class T>
  void find_if_empty(const T* x, int64_t vocab, const LogitMap& map) {
    empty = reference == std::numeric_limits<float>::lowest() && sum == sum &&
            largest_value<kForm>(x, 0, vocab, map) == -kInfinity;
  }
};

RLHF_FAST_INLINE float total(const Vec (&v)[4]) { return sum_of((v[0] + v[1]) + (v[2] + v[3])); }

template <class T, Form kForm, bool kEntropy, bool kMore>
SoftmaxRow softmax_segment(const T* x, int64_t segment, int64_t vocab, const LogitMap& map) {
  constexpr int kWidth = Vec::kWidth;
  const Vec outer2(map.outer2);
  SoftmaxRow row;
  const int64_t first = segment * kSegment;
  const int64_t last = first + kSegment < vocab ? first + kSegment : vocab;
  for (int64_t begin = first; begin < last;) {
    // The first block is short: it is done twice.
    const int64_t length = begin == first ? 8 * kWidth : kBlock;
    const int64_t end = begin + length < last ? begin + length : last;
    BlockSums<kEntropy, kMore> block;
    const Vec reference(row.reference);
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      Vec v[4];
      load_pair(x + i, v[0], v[1]);
      load_pair(x + i + 2 * kWidth, v[2], v[3]);
      for (int k = 0; k < 4; ++k) {
        v[k] = map.value<kForm>(v[k]);
        block.add(k, v[k], reference, outer2);
        if constexpr (kMore) block.values[k] = block.values[k] + v[k];
      }
    }
    for (; i < end; i += kWidth) {
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      const Vec v = map.value<kForm>(load_part(x + i, count));
      block.add(0, keep_lanes(v, count, -kInfinity), reference, outer2);
      if constexpr (kMore) block.values[0] = block.values[0] + keep_lanes(v, count, 0.0f);
    }
    const float sum = total(block.sum);
    double up;
    if (row.must_raise<kForm>(sum, x, begin, end, map, up)) continue;
    row.sum += sum;
    if constexpr (kEntropy) row.weighted += total(block.weighted);
    if constexpr (kMore) row.squares += total(block.squares);
    if constexpr (kMore) row.values += total(block.values);
    begin = end;
  }
  return row;
}

template <class T, Form kForm, bool kEntropy, bool kMore>
SoftmaxRow softmax_row(const T* x, int64_t vocab, const LogitMap& map) {
  SoftmaxRow row = softmax_segment<T, kForm, kEntropy, kMore>(x, 0, vocab, map);
  for (int64_t i = 1; i < num_segments(vocab); ++i) {
    row.merge(softmax_segment<T, kForm, kEntropy, kMore>(x, i, vocab, map), map.outer2);
  }
  row.find_if_empty<kForm>(x, vocab, map);
  return row;
}

// Small rows are handed out many at a time.
inline int64_t rows_per_piece(int64_t vocab) { return vocab > kSegment ? 1 : kSegment / vocab; }

}  // namespace
}  // namespace rlhf_fast::RLHF_FAST_ISA
