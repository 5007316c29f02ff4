// One pass over a row of logits that yields its log-sum and, if asked, more of its softmax.
//
// It needs no maximum beforehand: exponents are taken relative to a reference, the maximum of a
// sample or of an earlier block. If a block holds values far above it, it is done again with its
// own maximum as the reference.
#pragma once

#include <cmath>
#include <limits>

#include "../math/logits.h"
#include "exponential.h"
#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLn2Exact = 0.6931471805599453;
constexpr int64_t kBlock = 2048;  // elements between two looks at the sums
// A row is summed in segments that know nothing of each other and are merged in order, so its
// result is the same whether one thread walks it or several.
constexpr int64_t kSegment = 65536;
inline int64_t num_segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

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

// The sums of a row over e = 2^((v - reference) * outer2), in double: a few additions per block
// cost nothing and keep the rounding error independent of the vocabulary.
struct SoftmaxRow {
  float reference = std::numeric_limits<float>::lowest();
  float highest = -kInfinity;
  double sum = 0.0;
  double weighted = 0.0;  // e * (v - reference)
  double squares = 0.0;   // e * e
  double values = 0.0;    // v

  // Nothing but -inf: lse is -inf, the probabilities are undefined.
  bool empty() const { return sum == 0.0; }

  // Refers the sums to a higher reference; scale = e(old reference) then.
  void raise(float higher, double scale) {
    if (sum != 0.0) weighted = (weighted - sum * (double(higher) - reference)) * scale;
    sum *= scale;
    squares *= scale * scale;
    reference = higher;
  }
  void raise(float higher, float outer2) {
    raise(higher, std::exp2(-bounded(double(higher - reference) * outer2)));
  }

  void merge(SoftmaxRow other, float outer2) {
    if (other.reference > reference) {
      raise(other.reference, outer2);
    } else {
      other.raise(reference, outer2);
    }
    sum += other.sum;
    weighted += other.weighted;
    squares += other.squares;
    values += other.values;
  }

  float log_sum() const {
    return empty() ? std::numeric_limits<float>::quiet_NaN() : float(std::log(sum));
  }
};

RLHF_FAST_INLINE float total(const Vec (&v)[4]) { return sum_of((v[0] + v[1]) + (v[2] + v[3])); }

// Sums over one block of a row.
template <bool kEntropy, bool kMore>
struct BlockSums {
  Vec sum[4];
  Vec weighted[kEntropy ? 4 : 1];
  Vec squares[kMore ? 4 : 1];
  Vec values[kMore ? 4 : 1];
  Vec highest[2];

  RLHF_FAST_INLINE BlockSums() {
    for (auto& v : sum) v = Vec(0.0f);
    for (auto& v : weighted) v = Vec(0.0f);
    for (auto& v : squares) v = Vec(0.0f);
    for (auto& v : values) v = Vec(0.0f);
    for (auto& v : highest) v = Vec(-kInfinity);
  }

  // `counted` is v, or 0 where v is only there to fill a vector.
  template <class Power>
  RLHF_FAST_INLINE void add(int k, Vec v, Vec counted, const Power& power) {
    highest[k % 2] = max(v, highest[k % 2]);
    const Vec distance = power.distance(v);
    if constexpr (kEntropy) {
      const Vec e = power(distance);
      sum[k] = sum[k] + e;
      weighted[k] = fma(e, distance, weighted[k]);
      if constexpr (kMore) squares[k] = fma(e, e, squares[k]);
      if constexpr (kMore) values[k] = values[k] + counted;
    } else {
      sum[k] = power.add_to(sum[k], distance);
    }
  }
};

// One walk over a segment, with exponents relative to a reference or not (see exponential.h).
template <class T, Form kForm, bool kEntropy, bool kMore, bool kRelative>
class SegmentReader {
  using Power = Exponential<Vec, kRelative>;
  static_assert(kRelative || !kEntropy, "sums over distances need them relative");
  // Binary orders above the reference that call for another. With many of them the sums are large
  // and the entropy, a difference of two, becomes inaccurate.
  static constexpr float kRedo = kEntropy ? 4.0f : 32.0f;

 public:
  SegmentReader(const T* x, const LogitMap& map) : x_(x), map_(map) {}

  // Whether it could be read: not if a reference is too far from 0.
  bool read(int64_t first, int64_t last) {
    // Most often not far below the largest of all.
    const int64_t sample = first + 64 * Vec::kWidth < last ? first + 64 * Vec::kWidth : last;
    const float largest = largest_value<kForm>(x_, first, sample, map_);
    if (largest != -kInfinity) row_.reference = largest;
    for (int64_t begin = first; begin < last;) {
      if (!kRelative && !Power::near(row_.reference, map_.outer2)) return false;
      const Power power(row_.reference, map_.outer2, 0.0f, 1.0f);
      begin = read_blocks(power, begin, last);
    }
    return true;
  }

  SoftmaxRow row() const { return row_; }

 private:
  // Reads until the end, or until a higher reference is called for; returns where that is.
  int64_t read_blocks(const Power& power, int64_t begin, int64_t last) {
    const double unit = e_of(power, row_.reference);  // about 1; exactly if relative
    for (int64_t end; begin < last; begin = end) {
      end = begin + kBlock < last ? begin + kBlock : last;
      const BlockSums<kEntropy, kMore> block = sum_block(power, begin, end);
      const float highest = max_of(max(block.highest[0], block.highest[1]));
      if ((highest - row_.reference) * map_.outer2 > kRedo) {
        row_.raise(highest, map_.outer2);
        return begin;
      }
      row_.highest = highest > row_.highest ? highest : row_.highest;
      row_.sum += total(block.sum) / unit;
      if constexpr (kEntropy) row_.weighted += total(block.weighted);
      if constexpr (kMore) row_.squares += total(block.squares);
      if constexpr (kMore) row_.values += total(block.values);
    }
    // By the same exponential, so that a row of one large logit has a sum of exactly 1.
    const float highest = row_.highest;
    if (highest > row_.reference) row_.raise(highest, unit / e_of(power, highest));
    return last;
  }

  static double e_of(const Power& power, float v) {
    return in_one_lane(
        v, [&](Vec x) __attribute__((always_inline)) { return power(power.distance(x)); });
  }

  RLHF_FAST_INLINE BlockSums<kEntropy, kMore> sum_block(const Power& of_row, int64_t begin,
                                                        int64_t end) const {
    constexpr int kWidth = Vec::kWidth;
    const T* x = x_;
    const Power power = of_row;  // copies stay in registers
    const LogitMap map = map_;
    BlockSums<kEntropy, kMore> block;
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      prefetch<4 * kWidth>(x + i);
      Vec v[4];
      load_pair(x + i, v[0], v[1]);
      load_pair(x + i + 2 * kWidth, v[2], v[3]);
      for (int k = 0; k < 4; ++k) {
        v[k] = map.value<kForm>(v[k]);
        block.add(k, v[k], v[k], power);
      }
    }
    for (; i < end; i += kWidth) {
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      const Vec v = map.value<kForm>(load_part(x + i, count));
      block.add(0, keep_lanes(v, count, -kInfinity), keep_lanes(v, count, 0.0f), power);
    }
    return block;
  }

  const T* x_;
  LogitMap map_;
  SoftmaxRow row_;
};

template <class T, Form kForm, bool kEntropy, bool kMore>
SoftmaxRow softmax_segment(const T* x, int64_t segment, int64_t vocab, const LogitMap& map) {
  const int64_t first = segment * kSegment;
  const int64_t last = first + kSegment < vocab ? first + kSegment : vocab;
#if defined(__AVX512F__)
  if constexpr (kForm == Form::kPlain && !kEntropy) {
    SegmentReader<T, kForm, kEntropy, kMore, false> reader(x, map);
    if (reader.read(first, last)) return reader.row();
  }
#endif
  SegmentReader<T, kForm, kEntropy, kMore, true> reader(x, map);
  reader.read(first, last);
  return reader.row();
}

template <class T, Form kForm, bool kEntropy, bool kMore>
SoftmaxRow softmax_row(const T* x, int64_t vocab, const LogitMap& map) {
  SoftmaxRow row = softmax_segment<T, kForm, kEntropy, kMore>(x, 0, vocab, map);
  for (int64_t i = 1; i < num_segments(vocab); ++i) {
    row.merge(softmax_segment<T, kForm, kEntropy, kMore>(x, i, vocab, map), map.outer2);
  }
  return row;
}

// Small rows are handed out many at a time.
inline int64_t rows_per_piece(int64_t vocab) { return vocab > kSegment ? 1 : kSegment / vocab; }

}  // namespace
}  // namespace rlhf_fast::RLHF_FAST_ISA
