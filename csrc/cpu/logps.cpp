// Log-probs of labels from rows of logits, and their gradient. Compiled once per instruction set.
//
// Forward reads each row once (softmax_row.h), backward reads and writes it once.
#include "rlhf_fast/logps.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../math/logits.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "softmax_row.h"

namespace rlhf_fast {

// Throws for the first label that is neither ignored nor in [0, width), and for a temperature that
// is not positive. Defined once, below.
void check_inputs(const LogpsInputs& in);

namespace RLHF_FAST_ISA {
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
int64_t first_largest(const T* x, int64_t vocab, bool has_nan) {
  const LogitMap identity(1.0f, 0.0f, 1.0f);
  int64_t block = 0;
  float largest = -kInfinity;
  for (int64_t begin = 0; begin < vocab && !has_nan; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    const float here = largest_value<Form::kPlain>(x, begin, end, identity);
    if (here > largest) largest = here, block = begin;
  }
  for (int64_t j = block; j < vocab; ++j) {
    const float v = load_one(x + j);
    if (has_nan ? v != v : v == largest) return j;
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

template <class T, Form kForm, bool kEntropy, bool kMore>
void forward_rows(const LogpsInputs& in, const LogpsOutputs& out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row_pointer<const T>(in.logits, r);
    const LogitMap map = map_of_row(in, r);
    const SoftmaxRow softmax = softmax_row<T, kForm, kEntropy, kMore>(x, in.logits.width, map);
    write_row<T, kForm, kEntropy, kMore>(in, out, r, softmax);
  }
}

// With fewer rows than threads, the threads share out each row's segments.
template <class T, Form kForm, bool kEntropy, bool kMore>
void forward_few_rows(const LogpsInputs& in, const LogpsOutputs& out, int num_threads) {
  const int64_t num_rows = in.logits.num_rows, vocab = in.logits.width;
  const int64_t per_row = num_segments(vocab);
  std::vector<SoftmaxRow> parts(num_rows * per_row);
  parallel_for(num_rows * per_row, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / per_row;
      const T* x = row_pointer<const T>(in.logits, r);
      parts[i] =
          softmax_segment<T, kForm, kEntropy, kMore>(x, i % per_row, vocab, map_of_row(in, r));
    }
  });
  for (int64_t r = 0; r < num_rows; ++r) {
    const LogitMap map = map_of_row(in, r);
    SoftmaxRow row = parts[r * per_row];
    for (int64_t i = 1; i < per_row; ++i) row.merge(parts[r * per_row + i], map.outer2);
    write_row<T, kForm, kEntropy, kMore>(in, out, r, row);
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
    float base = (grads_.grad_lse ? grads_.grad_lse[row_] : 0.0f) - label_sum;
    if constexpr (kEntropy) base -= grad_entropy * grads_.entropy[row_];
    all_zero_ = all_zero_ && base == 0.0f && grad_entropy == 0.0f;
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

template <class T, Form kForm, bool kEntropy>
void backward_rows(const LogpsInputs& in, const LogpsGrads& grads, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const RowBackward<T, kForm, kEntropy> row(in, grads, r);
    row.write(0, in.logits.width);
    row.write_labels();
  }
}

template <class T, Form kForm, bool kEntropy>
void backward_few_rows(const LogpsInputs& in, const LogpsGrads& grads, int num_threads) {
  const int64_t vocab = in.logits.width, per_row = num_segments(vocab);
  std::vector<RowBackward<T, kForm, kEntropy>> rows;
  rows.reserve(in.logits.num_rows);
  for (int64_t r = 0; r < in.logits.num_rows; ++r) rows.emplace_back(in, grads, r);
  parallel_for(int64_t(rows.size()) * per_row, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_row * kSegment;
      rows[i / per_row].write(first, first + kSegment < vocab ? first + kSegment : vocab);
    }
  });
  for (const auto& row : rows) row.write_labels();
}

// Calls body with the form as a type.
template <class Body>
void dispatch_form(const LogpsInputs& in, Body body) {
  if (in.softcap > 0.0f) return body(std::integral_constant<Form, Form::kSoftcap>{});
  if (in.row_thresholds) return body(std::integral_constant<Form, Form::kTruncated>{});
  body(std::integral_constant<Form, Form::kPlain>{});
}

template <class T, Form kForm, bool kEntropy, bool kMore>
struct Forward {
  static constexpr auto rows = &forward_rows<T, kForm, kEntropy, kMore>;
  static constexpr auto few_rows = &forward_few_rows<T, kForm, kEntropy, kMore>;
};
template <class T, Form kForm, bool kEntropy>
struct Backward {
  static constexpr auto rows = &backward_rows<T, kForm, kEntropy>;
  static constexpr auto few_rows = &backward_few_rows<T, kForm, kEntropy>;
};

// Call body with the kernels that compute what is asked for, and no more.
template <class T, Form kForm, class Body>
void dispatch_forward(const LogpsOutputs& out, Body body) {
  if (out.sum_p2 || out.mean_logit) return body(Forward<T, kForm, true, true>{});
  if (out.entropy) return body(Forward<T, kForm, true, false>{});
  body(Forward<T, kForm, false, false>{});
}
template <class T, Form kForm, class Body>
void dispatch_backward(const LogpsGrads& grads, Body body) {
  grads.grad_entropy ? body(Backward<T, kForm, true>{}) : body(Backward<T, kForm, false>{});
}

bool is_few(const Rows& rows, int num_threads) {
  return rows.num_rows < num_threads && rows.width > kSegment;
}

template <class T, Form kForm>
void forward(const LogpsInputs& in, const LogpsOutputs& out, int num_threads) {
  dispatch_forward<T, kForm>(out, [&](auto kernels) {
    if (is_few(in.logits, num_threads)) return kernels.few_rows(in, out, num_threads);
    parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
                 [&](int64_t begin, int64_t end) { kernels.rows(in, out, begin, end); });
  });
}

template <class T, Form kForm>
void backward(const LogpsInputs& in, const LogpsGrads& grads, int num_threads) {
  dispatch_backward<T, kForm>(grads, [&](auto kernels) {
    if (is_few(in.logits, num_threads)) return kernels.few_rows(in, grads, num_threads);
    parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
                 [&](int64_t begin, int64_t end) { kernels.rows(in, grads, begin, end); });
  });
}

template <class T, Form kForm>
void with_grad(const LogpsInputs& in, const LogpsWithGrad& work, int num_threads) {
  const LogpsGrads grads = grads_of(in, work);
  if (is_few(in.logits, num_threads)) {
    forward<T, kForm>(in, work.out, num_threads);
    backward<T, kForm>(in, grads, num_threads);
    return;
  }
  dispatch_forward<T, kForm>(work.out, [&](auto reading) {
    dispatch_backward<T, kForm>(grads, [&](auto writing) {
      // Row by row: the second pass finds the row in the cache.
      parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t r = begin; r < end; ++r) {
                       reading.rows(in, work.out, r, r + 1);
                       writing.rows(in, grads, r, r + 1);
                     }
                   });
    });
  });
}

}  // namespace

void logps_forward(const LogpsInputs& in, const LogpsOutputs& out, int num_threads) {
  check_inputs(in);
  dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_form(in, [&](auto form) { forward<T, decltype(form)::value>(in, out, num_threads); });
  });
}

void logps_backward(const LogpsInputs& in, const LogpsGrads& grads, int num_threads) {
  dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_form(in,
                  [&](auto form) { backward<T, decltype(form)::value>(in, grads, num_threads); });
  });
}

void logps_with_grad(const LogpsInputs& in, const LogpsWithGrad& work, int num_threads) {
  check_inputs(in);
  dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_form(in,
                  [&](auto form) { with_grad<T, decltype(form)::value>(in, work, num_threads); });
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(logps_forward, LogpsInputs, LogpsOutputs)
RLHF_FAST_CPU_ENTRY(logps_backward, LogpsInputs, LogpsGrads)
RLHF_FAST_CPU_ENTRY(logps_with_grad, LogpsInputs, LogpsWithGrad)

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
