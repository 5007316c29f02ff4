// Log-probs of labels from rows of logits, and their gradient. Compiled once per instruction set.
//
// Forward reads each row once (softmax_row.h), backward reads and writes it once.
#include "rlhf_fast/logps.h"

#include <cmath>
#include <limits>
#include <type_traits>

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

template <class T, Form kForm, bool kEntropy, bool kMore>
void forward_row(const LogpsInputs& in, const LogpsOutputs& out, int64_t row) {
  const T* x = row_pointer<const T>(in.logits, row);
  const int64_t vocab = in.logits.width;
  const LogitMap map = map_of_row(in, row);
  auto value = [&](Vec logit) __attribute__((always_inline)) { return map.value<kForm>(logit); };

  const SoftmaxRow softmax = softmax_row<T, kForm, kEntropy, kMore>(x, vocab, map);
  const float undefined = std::numeric_limits<float>::quiet_NaN();
  const bool empty = softmax.empty;
  const float log_sum = softmax.log_sum(), reference = softmax.reference;
  const double sum = softmax.sum;
  out.reference[row] = reference;
  out.log_sum[row] = log_sum;
  if (out.lse) out.lse[row] = empty ? -kInfinity : std::fma(reference, map.outer, log_sum);
  if constexpr (kEntropy) {
    const double entropy = std::log(sum) - kLn2Exact * (softmax.weighted / sum);
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
      const float logp = std::fma(v - reference, map.outer, -log_sum);
      out.logps[i] = y.ignored ? 0.0f : empty ? undefined : logp > 0.0f ? 0.0f : logp;
    }
    if (out.is_top1) out.is_top1[i] = y.index == top1;
  }
}

template <class T, Form kForm, bool kEntropy>
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
    const Label y = label_at(in, i);
    if (!grads.grad_logps || y.ignored) return 0.0f;
    return kForm != Form::kPlain && load_one(x + y.index) < map.threshold ? 0.0f
                                                                          : grads.grad_logps[i];
  };
  for (int64_t k = 0; k < num_labels; ++k) {
    label_sum += label_gradient(k);
    all_zero = all_zero && label_gradient(k) == 0.0f;
  }
  const float grad_entropy = kEntropy ? grads.grad_entropy[row] : 0.0f;
  float base = (grads.grad_lse ? grads.grad_lse[row] : 0.0f) - label_sum;
  if constexpr (kEntropy) base -= grad_entropy * grads.entropy[row];
  const RowGradient formula(map, grads.reference[row], grads.log_sum[row], base, grad_entropy);
  if (all_zero && base == 0.0f && grad_entropy == 0.0f) {
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
      const Vec v = map.value<kForm>(logit);
      const Vec of_all = formula.operator()<kForm, kEntropy>(map, v);
      return chosen == 0.0f ? of_all : fma(Vec(chosen), map.derivative<kForm>(v), of_all);
    });
  }
  auto gradient = [&](Vec logit) __attribute__((always_inline)) {
    return formula.operator()<kForm, kEntropy>(map, map.value<kForm>(logit));
  };
  int64_t i = 0;
  for (; i + 4 * kWidth <= vocab; i += 4 * kWidth) {
    Vec v[4];
    load_pair(x + i, v[0], v[1]);
    load_pair(x + i + 2 * kWidth, v[2], v[3]);
    store_pair(dx + i, gradient(v[0]), gradient(v[1]));
    store_pair(dx + i + 2 * kWidth, gradient(v[2]), gradient(v[3]));
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

// Calls body with the form as a type.
template <class Body>
void dispatch_form(const LogpsInputs& in, Body body) {
  if (in.softcap > 0.0f) return body(std::integral_constant<Form, Form::kSoftcap>{});
  if (in.row_thresholds) return body(std::integral_constant<Form, Form::kTruncated>{});
  body(std::integral_constant<Form, Form::kPlain>{});
}

template <class T, Form kForm>
auto forward_body(const LogpsOutputs& out) {
  return out.sum_p2 || out.mean_logit ? &forward_row<T, kForm, true, true>
         : out.entropy                ? &forward_row<T, kForm, true, false>
                                      : &forward_row<T, kForm, false, false>;
}
template <class T, Form kForm>
auto backward_body(const LogpsGrads& grads) {
  return grads.grad_entropy ? &backward_row<T, kForm, true> : &backward_row<T, kForm, false>;
}

template <class T, Form kForm>
void forward(const LogpsInputs& in, const LogpsOutputs& out, int num_threads) {
  auto row = forward_body<T, kForm>(out);
  parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) row(in, out, r);
               });
}

template <class T, Form kForm>
void backward(const LogpsInputs& in, const LogpsGrads& grads, int num_threads) {
  auto row = backward_body<T, kForm>(grads);
  parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) row(in, grads, r);
               });
}

template <class T, Form kForm>
void with_grad(const LogpsInputs& in, const LogpsWithGrad& work, int num_threads) {
  const LogpsOutputs& out = work.out;
  const LogpsGrads grads = grads_of(in, work);
  auto read = forward_body<T, kForm>(out);
  auto write = backward_body<T, kForm>(grads);
  parallel_for(in.logits.num_rows, rows_per_piece(in.logits.width), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) read(in, out, r), write(in, grads, r);
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
  const Rows& out = grads.grad_logits;
  const bool is_new = out.data != in.logits.data;
  dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (is_new) prefer_large_pages(out.data, out.num_rows * out.width * int64_t(sizeof(T)));
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
