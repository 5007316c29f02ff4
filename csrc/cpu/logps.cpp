// Log-probs of labels from rows of logits, and their gradient. Compiled once per instruction set.
//
// Forward reads each row once (softmax_row.h), backward reads and writes it once.
#include "rlhf_fast/logps.h"

#include <type_traits>
#include <vector>

#include "isa.h"
#include "logps_row.h"
#include "parallel.h"

namespace rlhf_fast {

// Throws for the first label that is neither ignored nor in [0, width), and for a temperature that
// is not positive. Defined once, below.
void check_inputs(const LogpsInputs& in);

namespace RLHF_FAST_ISA {
namespace {

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
