// One row of log-probs: its outputs from its sums, and its gradient.
#pragma once

#include "rlhf_fast/logps.h"

#include <cmath>
#include <limits>

#include "../math/logits.h"
#include "simd.h"
#include "softmax_row.h"

namespace rlhf_fast::RLHF_FAST_ISA {
namespace {

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
                  in.row_temperatures ? in.row_temperatures[row] : in.temperature,
                  in.row_thresholds ? in.row_thresholds[row] : -kInfinity);
}

// The position of the largest logit, of the first one among equals; a NaN counts as the largest.
template <class T>
int64_t first_largest(const T* x, int64_t vocab, bool may_have_nan) {
  for (int64_t j = 0; may_have_nan && j < vocab; ++j) {
    const float v = load_one(x + j);
    if (v != v) return j;
  }
  const LogitMap identity(1.0f, 0.0f, 1.0f);
  int64_t block = 0;
  float largest = -kInfinity;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    const float here = largest_value<Form::kPlain>(x, begin, end, identity);
    if (here > largest) largest = here, block = begin;
  }
  for (int64_t j = block; j < vocab; ++j) {
    if (load_one(x + j) == largest) return j;
  }
  return 0;
}

// A row's outputs from its sums.
template <class T, Form kForm, bool kEntropy, bool kMore>
void write_row(const LogpsInputs& in, const LogpsOutputs& out, int64_t row,
               const SoftmaxRow& softmax) {
  const T* x = row_pointer<const T>(in.logits, row);
  const int64_t vocab = in.logits.width;
  const LogitMap map = map_of_row(in, row);
  auto value = [&](Vec logit) __attribute__((always_inline)) { return map.value<kForm>(logit); };
  const float undefined = std::numeric_limits<float>::quiet_NaN();
  const bool empty = softmax.empty();
  const float log_sum = softmax.log_sum(), reference = softmax.reference;
  const double sum = softmax.sum;
  out.reference[row] = reference;
  out.log_sum[row] = log_sum;
  if (out.lse) out.lse[row] = empty ? -kInfinity : std::fma(reference, map.outer, log_sum);
  if constexpr (kEntropy) {
    const double entropy = std::log(sum) - map.outer * (softmax.weighted / sum);
    if (out.entropy) out.entropy[row] = empty ? undefined : float(entropy);
  }
  if constexpr (kMore) {
    const double sum_p2 = softmax.squares / (sum * sum);
    if (out.sum_p2) out.sum_p2[row] = empty ? undefined : float(sum_p2);
    if (out.mean_logit) out.mean_logit[row] = float(softmax.values * map.outer / double(vocab));
  }
  const int64_t top1 = out.is_top1 ? first_largest(x, vocab, sum != sum) : -1;
  for (int64_t i = row * in.labels_per_row; i < (row + 1) * in.labels_per_row; ++i) {
    const Label y = label_at(in, i);
    if (out.logps) {
      const float v = y.ignored ? 0.0f : in_one_lane(load_one(x + y.index), value);
      // In double: a single rounding, the least error a float can have.
      const auto logp = float((double(v) - reference) * map.outer - std::log(sum));
      out.logps[i] = y.ignored ? 0.0f : empty ? undefined : logp > 0.0f ? 0.0f : logp;
    }
    if (out.is_top1) out.is_top1[i] = y.index == top1;
  }
}

// The gradient of one row. Made before the row may be overwritten: it keeps the labels' own
// elements, which write_labels() puts in when everything else is written.
template <class T, Form kForm, bool kEntropy>
class RowBackward {
 public:
  RowBackward(const LogpsInputs& in, const LogpsGrads& grads, int64_t row)
      : in_(in),
        grads_(grads),
        row_(row),
        x_(row_pointer<const T>(in.logits, row)),
        dx_(row_pointer<T>(grads.grad_logits, row)),
        map_(map_of_row(in, row)),
        gradient_(make_gradient()) {
    for (int64_t k = 0; k < in_.labels_per_row; ++k) {
      const Label y = label(k);
      if (y.ignored) continue;
      float chosen = 0.0f;  // the same label may stand several times in a row
      for (int64_t other = 0; other < in_.labels_per_row; ++other) {
        if (label(other).index == y.index) chosen += upstream(other);
      }
      const GradientFormula<Vec, kForm, kEntropy> of_all(map_, gradient_);
      own_[k] = in_one_lane(load_one(x_ + y.index), [&](Vec logit) {
        const Vec v = map_.value<kForm>(logit);
        return chosen == 0.0f ? of_all(v) : fma(Vec(chosen), map_.derivative<kForm>(v), of_all(v));
      });
    }
  }

  void write(int64_t begin, int64_t end) const {
    if (all_zero_) {
      std::memset(static_cast<void*>(dx_ + begin), 0, size_t(end - begin) * sizeof(T));
      return;
    }
#if defined(__AVX512F__)
    if constexpr (kForm == Form::kPlain && !kEntropy) {
      if (Exponential<Vec, false>::near(gradient_.reference, map_.outer2)) {
        return map(GradientFormula<Vec, kForm, kEntropy, false>(map_, gradient_), begin, end);
      }
    }
#endif
    map(GradientFormula<Vec, kForm, kEntropy>(map_, gradient_), begin, end);
  }

  void write_labels() const {
    for (int64_t k = 0; k < in_.labels_per_row; ++k) {
      const Label y = label(k);
      if (!y.ignored) store_one(dx_ + y.index, all_zero_ ? 0.0f : own_[k]);
    }
  }

 private:
  // dx = formula(x)
  template <class Formula>
  RLHF_FAST_INLINE void map(const Formula formula, int64_t begin, int64_t end) const {
    constexpr int kWidth = Vec::kWidth;
    const LogitMap map = map_;  // copies: the stores could alias the members
    auto gradient = [&](Vec logit)
                        __attribute__((always_inline)) { return formula(map.value<kForm>(logit)); };
    const T* x = x_;
    T* dx = dx_;
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      prefetch<4 * kWidth>(x + i);
      Vec v[4];
      load_pair(x + i, v[0], v[1]);
      load_pair(x + i + 2 * kWidth, v[2], v[3]);
      store_pair(dx + i, gradient(v[0]), gradient(v[1]));
      store_pair(dx + i + 2 * kWidth, gradient(v[2]), gradient(v[3]));
    }
    for (; i < end; i += kWidth) {
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      store_part(dx + i, gradient(load_part(x + i, count)), count);
    }
  }

  Label label(int64_t k) const { return label_at(in_, row_ * in_.labels_per_row + k); }

  float upstream(int64_t k) const {
    const Label y = label(k);
    if (!grads_.grad_logps || y.ignored) return 0.0f;
    if (kForm != Form::kPlain && load_one(x_ + y.index) < map_.threshold) return 0.0f;
    return grads_.grad_logps[row_ * in_.labels_per_row + k];
  }

  RowGradient make_gradient() {
    float label_sum = 0.0f;
    for (int64_t k = 0; k < in_.labels_per_row; ++k) {
      label_sum += upstream(k);
      all_zero_ = all_zero_ && upstream(k) == 0.0f;
    }
    const float grad_entropy = kEntropy ? grads_.grad_entropy[row_] : 0.0f;
    const float grad_lse = grads_.grad_lse ? grads_.grad_lse[row_] : 0.0f;
    all_zero_ = all_zero_ && grad_entropy == 0.0f && grad_lse == 0.0f;
    float base = grad_lse - label_sum;
    if constexpr (kEntropy) base -= grad_entropy * grads_.entropy[row_];
    return RowGradient(map_, grads_.reference[row_], grads_.log_sum[row_], base, grad_entropy);
  }

  const LogpsInputs& in_;
  const LogpsGrads& grads_;
  const int64_t row_;
  const T* x_;
  T* dx_;
  const LogitMap map_;
  bool all_zero_ = true;
  const RowGradient gradient_;
  float own_[kMaxLabelsPerRow];
};

}  // namespace
}  // namespace rlhf_fast::RLHF_FAST_ISA
