// Log-probs of labels from rows of logits, and their gradient. Compiled once per instruction set.
//
// Forward reads each row once. It needs no maximum beforehand: exponents are taken relative to a
// reference that is kept until a block's maximum exceeds it by more than kRedo; only then that
// block is done again, with its maximum as the new reference. Backward reads and writes once.
#include "rlhf_fast/logps.h"

#include <cmath>
#include <limits>

#include "../math/logits.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace rlhf_fast {

// Throws for the first label that is neither ignored nor in [0, width), and for a temperature that
// is not positive. Defined once, below.
void check_inputs(const LogpsInputs& in);

namespace RLHF_FAST_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kRedo = 4.0f;      // binary orders above the reference: exponents stay accurate
constexpr float kFloor = -126.0f;  // binary orders below it that count as nothing
constexpr int64_t kBlock = 2048;   // elements between two looks at the maximum; they stay in L1

struct Label {
  int64_t index;
  bool ignored;
};

Label label_at(const LogpsInputs& in, int64_t i) {
  const int64_t y = in.labels_are_int32 ? static_cast<const int32_t*>(in.labels)[i]
                                        : static_cast<const int64_t*>(in.labels)[i];
  return {y, y == in.ignore_index};
}

LogitMap map_of_row(const LogpsInputs& in, int64_t row) {
  return LogitMap(in.logit_scale, in.softcap,
                  in.row_temperatures ? in.row_temperatures[row] : in.temperature);
}

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

// The same sums over a row, in double: a few additions per block cost nothing and keep the
// rounding error independent of the vocabulary.
struct RowSums {
  double sum = 0.0, weighted = 0.0, squares = 0.0, values = 0.0;

  // Refers them to a reference that lies `up` binary orders higher.
  void raise(double up) {
    if (up > 1000.0) up = 1000.0;
    const double scale = std::exp2(-up);
    weighted = (weighted - sum * up) * scale;
    sum *= scale;
    squares *= scale * scale;
  }
};

RLHF_FAST_INLINE double total(const Vec (&v)[4]) { return sum_of((v[0] + v[1]) + (v[2] + v[3])); }

template <class T, bool kSoftcap, bool kEntropy, bool kMore>
void forward_row(const LogpsInputs& in, const LogpsOutputs& out, int64_t row) {
  constexpr int kWidth = Vec::kWidth;
  const T* x = row_pointer<const T>(in.logits, row);
  const int64_t vocab = in.logits.width;
  const LogitMap map = map_of_row(in, row);
  const Vec outer2(map.outer2);
  auto value = [&](Vec logit) __attribute__((always_inline)) { return map.value<kSoftcap>(logit); };

  float reference = std::numeric_limits<float>::lowest();
  float largest = -kInfinity;
  RowSums sums;
  for (int64_t begin = 0; begin < vocab;) {
    // The first block is short: it is done twice.
    const int64_t length = begin == 0 ? 8 * kWidth : kBlock;
    const int64_t end = begin + length < vocab ? begin + length : vocab;
    BlockSums<kEntropy, kMore> block;
    const Vec ref(reference);
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      for (int k = 0; k < 4; ++k) {
        const Vec v = value(load(x + i + k * kWidth));
        block.add(k, v, ref, outer2);
        if constexpr (kMore) block.values[k] = block.values[k] + v;
      }
    }
    for (; i < end; i += kWidth) {
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      const Vec v = value(load_part(x + i, count));
      block.add(0, keep_lanes(v, count, -kInfinity), ref, outer2);
      if constexpr (kMore) block.values[0] = block.values[0] + keep_lanes(v, count, 0.0f);
    }
    const float highest = block.largest();
    const float up = (highest - reference) * map.outer2;
    if (up > kRedo) {  // false for NaN and while everything is -inf
      sums.raise(up);
      reference = highest;
      continue;
    }
    largest = highest > largest ? highest : largest;
    sums.sum += total(block.sum);
    if constexpr (kEntropy) sums.weighted += total(block.weighted);
    if constexpr (kMore) sums.squares += total(block.squares);
    if constexpr (kMore) sums.values += total(block.values);
    begin = end;
  }

  const float log_sum = static_cast<float>(std::log(sums.sum));
  // A row of nothing but -inf: lse is -inf, its probabilities are undefined.
  const bool empty = largest == -kInfinity && sums.sum == sums.sum;
  const float undefined = std::numeric_limits<float>::quiet_NaN();
  out.reference[row] = reference;
  out.log_sum[row] = empty ? undefined : log_sum;
  if (out.lse) out.lse[row] = empty ? -kInfinity : std::fma(reference, map.outer, log_sum);
  if constexpr (kEntropy) {
    const double mean = sums.weighted / sums.sum;
    if (out.entropy)
      out.entropy[row] = empty ? undefined : float(std::log(sums.sum) - 0.6931471805599453 * mean);
  }
  if constexpr (kMore) {
    const double sum_p2 = sums.squares / (sums.sum * sums.sum);
    if (out.sum_p2) out.sum_p2[row] = empty ? undefined : float(sum_p2);
    if (out.mean_logit) out.mean_logit[row] = float(sums.values * map.outer / double(vocab));
  }
  for (int64_t i = row * in.labels_per_row; i < (row + 1) * in.labels_per_row; ++i) {
    const Label y = label_at(in, i);
    if (out.logps) {
      const float v = y.ignored ? 0.0f : in_one_lane(load_one(x + y.index), value);
      const float logp = std::fma(v - reference, map.outer, -log_sum);
      out.logps[i] = y.ignored ? 0.0f : empty ? undefined : logp > 0.0f ? 0.0f : logp;
    }
    if (out.is_top1) {
      bool first = !y.ignored;
      const float own = first ? load_one(x + y.index) : 0.0f;
      if constexpr (!kSoftcap) first = first && own == largest;
      for (int64_t j = 0; first && j < vocab; ++j) {
        const float other = load_one(x + j);
        first = j < y.index ? other < own : !(other > own);
        if (!kSoftcap && j >= y.index) break;
      }
      out.is_top1[i] = first;
    }
  }
}

template <class T, bool kSoftcap, bool kEntropy>
void backward_row(const LogpsInputs& in, const LogpsGrads& grads, int64_t row) {
  constexpr int kWidth = Vec::kWidth;
  const T* x = row_pointer<const T>(in.logits, row);
  T* dx = row_pointer<T>(grads.grad_logits, row);
  const int64_t vocab = in.logits.width;
  const int64_t num_labels = in.labels_per_row;
  const LogitMap map = map_of_row(in, row);

  float label_sum = 0.0f;
  bool all_zero = true;
  auto label_gradient = [&](int64_t k) {
    const int64_t i = row * num_labels + k;
    return grads.grad_logps && !label_at(in, i).ignored ? grads.grad_logps[i] : 0.0f;
  };
  for (int64_t k = 0; k < num_labels; ++k) {
    label_sum += label_gradient(k);
    all_zero = all_zero && label_gradient(k) == 0.0f;
  }
  RowGradient formula(grads.reference[row], grads.log_sum[row], -label_sum);
  if (grads.grad_lse) formula.base += grads.grad_lse[row];
  if constexpr (kEntropy) {
    formula.base -= grads.grad_entropy[row] * grads.entropy[row];
    formula.entropy_ln2 = -grads.grad_entropy[row] * kLn2;
    all_zero = all_zero && formula.entropy_ln2 == 0.0f;
  }
  if (all_zero && formula.base == 0.0f) {
    std::memset(static_cast<void*>(dx), 0, size_t(vocab) * sizeof(T));
    return;
  }

  // The labels' own elements: read before the row is overwritten, written after it.
  float own[kMaxLabelsPerRow];
  for (int64_t k = 0; k < num_labels; ++k) {
    const Label y = label_at(in, row * num_labels + k);
    if (y.ignored) continue;
    float chosen = 0.0f;  // the same label may stand several times in a row
    for (int64_t other = 0; other < num_labels; ++other) {
      if (label_at(in, row * num_labels + other).index == y.index) chosen += label_gradient(other);
    }
    own[k] = in_one_lane(load_one(x + y.index), [&](Vec logit) {
      const Vec v = map.value<kSoftcap>(logit);
      return fma(Vec(chosen), map.derivative<kSoftcap>(v),
                 formula.operator()<kSoftcap, kEntropy>(map, v));
    });
  }
  auto gradient = [&](Vec logit) __attribute__((always_inline)) {
    return formula.operator()<kSoftcap, kEntropy>(map, map.value<kSoftcap>(logit));
  };
  int64_t i = 0;
  for (; i + 4 * kWidth <= vocab; i += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) store(dx + i + k * kWidth, gradient(load(x + i + k * kWidth)));
  }
  for (; i < vocab; i += kWidth) {
    const int64_t count = vocab - i < kWidth ? vocab - i : kWidth;
    store_part(dx + i, gradient(load_part(x + i, count)), count);
  }
  for (int64_t k = 0; k < num_labels; ++k) {
    const Label y = label_at(in, row * num_labels + k);
    if (!y.ignored) store_one(dx + y.index, own[k]);
  }
}

// Small rows are handed out many at a time.
int64_t rows_per_piece(int64_t vocab) { return vocab > 16384 ? 1 : 16384 / vocab; }

template <class T, bool kSoftcap>
void forward(const LogpsInputs& in, const LogpsOutputs& out, int num_threads) {
  const bool more = out.sum_p2 || out.mean_logit;
  auto row = more          ? &forward_row<T, kSoftcap, true, true>
             : out.entropy ? &forward_row<T, kSoftcap, true, false>
                           : &forward_row<T, kSoftcap, false, false>;
  parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) row(in, out, r);
               });
}

template <class T, bool kSoftcap>
void backward(const LogpsInputs& in, const LogpsGrads& grads, int num_threads) {
  auto row =
      grads.grad_entropy ? &backward_row<T, kSoftcap, true> : &backward_row<T, kSoftcap, false>;
  parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) row(in, grads, r);
               });
}

}  // namespace

void logps_forward(const LogpsInputs& in, const LogpsOutputs& out, int num_threads) {
  check_inputs(in);
  dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    in.softcap > 0.0f ? forward<T, true>(in, out, num_threads)
                      : forward<T, false>(in, out, num_threads);
  });
}

void logps_backward(const LogpsInputs& in, const LogpsGrads& grads, int num_threads) {
  dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    in.softcap > 0.0f ? backward<T, true>(in, grads, num_threads)
                      : backward<T, false>(in, grads, num_threads);
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(logps_forward, LogpsInputs, LogpsOutputs)
RLHF_FAST_CPU_ENTRY(logps_backward, LogpsInputs, LogpsGrads)

}  // namespace rlhf_fast

#if defined(RLHF_FAST_ISA_IS_BASELINE)

#include <stdexcept>
#include <string>

void rlhf_fast::check_inputs(const LogpsInputs& in) {
  for (int64_t r = 0; in.row_temperatures && r < in.logits.num_rows; ++r) {
    if (in.row_temperatures[r] > 0.0f) continue;
    throw std::invalid_argument(
        "logps: temperatures must be positive, got " + std::to_string(in.row_temperatures[r]) +
        " in row " + std::to_string(r) + "; use the temperature that the trainer assumes");
  }
  const int64_t count = in.logits.num_rows * in.labels_per_row;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = in.labels_are_int32 ? static_cast<const int32_t*>(in.labels)[i]
                                          : static_cast<const int64_t*>(in.labels)[i];
    if (y == in.ignore_index || (y >= 0 && y < in.logits.width)) continue;
    throw std::invalid_argument(
        "logps: labels must lie in [0, " + std::to_string(in.logits.width) + ") or be " +
        std::to_string(in.ignore_index) + " (ignored), got " + std::to_string(y) + " in row " +
        std::to_string(i / in.labels_per_row) +
        "; check that labels and logits come from the same tokenizer and model");
  }
}

#endif
