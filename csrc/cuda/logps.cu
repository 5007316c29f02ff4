// Log-probs of labels from rows of logits, and their gradient.
//
// Forward: one block per row reads the row once (floor: N * V * sizeof(T) bytes) and reduces an
// online softmax state; entropy and the other statistics ride in the same state, so they cost
// arithmetic but no traffic. Backward: one block per row reads the logits once and writes the
// gradient once (floor: twice the bytes), possibly over the logits themselves: each element is read
// by the thread that later writes it, and the labels' own elements are read before a barrier and
// written after it. No atomics, no scratch memory, offsets in 64 bits.
#include "rlhf_fast/logps.h"

#include "launch.cuh"
#include "rows.cuh"
#include "softmax_state.cuh"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kBlock = 512;
static_assert(kBlock >= kMaxLabelsPerRow, "backward gives each label a thread");

RLHF_FAST_DEVICE int64_t label_at(const LogpsInputs& in, int64_t i) {
  const int64_t y = in.labels_are_int32 ? static_cast<const int32_t*>(in.labels)[i]
                                        : static_cast<const int64_t*>(in.labels)[i];
  const bool ignored = y == in.ignore_index || y < 0 || y >= in.logits.width;
  return ignored ? -1 : y;
}

RLHF_FAST_DEVICE LogitMap map_of_row(const LogpsInputs& in, int64_t row) {
  return LogitMap(in.logit_scale, in.softcap,
                  in.row_temperatures ? in.row_temperatures[row] : in.temperature,
                  in.row_thresholds ? in.row_thresholds[row] : -RLHF_FAST_INFINITY);
}

template <class T, Form kForm, int kFields>
__global__ void __launch_bounds__(kBlock) logps_forward_kernel(LogpsInputs in, LogpsOutputs out) {
  const int64_t row = blockIdx.x, width = in.logits.width;
  const T* x = row_pointer<const T>(in.logits, row);
  const LogitMap map = map_of_row(in, row);
  auto value = [&](T logit) { return map.value<kForm>(to_float(logit)); };

  const State<kFields> state = softmax_of_row<kBlock, kForm, kFields>(x, width, map);
  const float log_sum = log_natural(state[kSum]);
  const bool empty = state[kMax] == -RLHF_FAST_INFINITY && state[kSum] == 0.0f;
  const float undefined = RLHF_FAST_INFINITY - RLHF_FAST_INFINITY;
  if (threadIdx.x == 0) {
    out.reference[row] = state[kMax];
    out.log_sum[row] = log_sum;
    if (out.lse) out.lse[row] = empty ? state[kMax] : fma(state[kMax], map.outer, log_sum);
    if constexpr (kFields > kWeighted) {
      if (out.entropy) out.entropy[row] = log_sum - kLn2 * (state[kWeighted] / state[kSum]);
    }
    if constexpr (kFields > kSquares) {
      const float sum = state[kSum];
      if (out.sum_p2) out.sum_p2[row] = state[kSquares] / sum / sum;
      if (out.mean_logit) out.mean_logit[row] = state[kValues] * map.outer / float(width);
    }
  }
  for (int64_t k = threadIdx.x; out.logps && k < in.labels_per_row; k += kBlock) {
    const int64_t i = row * in.labels_per_row + k, y = label_at(in, i);
    float logp = 0.0f;
    if (y >= 0) {
      logp = fma(value(x[y]) - state[kMax], map.outer, -log_sum);
      logp = empty ? undefined : logp > 0.0f ? 0.0f : logp;
    }
    out.logps[i] = logp;
  }
}

// is_top1 needs the label's logit before the others: its own kernel, so that it costs nothing
// where it is not asked for. The row comes from L2 when the forward kernel has just read it.
template <class T>
__global__ void __launch_bounds__(kBlock) logps_is_top1_kernel(LogpsInputs in, bool* is_top1) {
  const int64_t row = blockIdx.x, width = in.logits.width;
  const T* x = row_pointer<const T>(in.logits, row);
  // (largest logit, its first position); a NaN beats everything.
  float max = -RLHF_FAST_INFINITY;
  int64_t first = width;
  for (int64_t j = threadIdx.x; j < width; j += kBlock) {
    const float v = to_float(x[j]);
    if (first == width || v > max || (v != v && max == max)) {
      max = v;
      first = j;
    }
  }
  RLHF_FAST_SHARED(float, maxima, kBlock);
  RLHF_FAST_SHARED(int64_t, firsts, kBlock);
  const int thread = threadIdx.x;
  maxima[thread] = max;
  firsts[thread] = first;
  __syncthreads();
  for (int step = kBlock / 2; step > 0; step /= 2) {
    if (thread < step) {
      const int other = thread + step;
      const float a = maxima[thread], b = maxima[other];
      const bool b_nan = b != b, a_nan = a != a;
      const bool earlier = firsts[other] < firsts[thread];
      const bool equal = a == b || (a_nan && b_nan);
      if (equal ? earlier : (b > a || b_nan)) {
        maxima[thread] = b;
        firsts[thread] = firsts[other];
      }
    }
    __syncthreads();
  }
  for (int64_t k = threadIdx.x; k < in.labels_per_row; k += kBlock) {
    const int64_t i = row * in.labels_per_row + k;
    is_top1[i] = label_at(in, i) == firsts[0];
  }
}

template <class T, Form kForm, bool kEntropy>
__global__ void __launch_bounds__(kBlock) logps_backward_kernel(LogpsInputs in, LogpsGrads grads) {
  const int64_t row = blockIdx.x, width = in.logits.width, num_labels = in.labels_per_row;
  const T* x = row_pointer<const T>(in.logits, row);
  T* dx = row_pointer<T>(grads.grad_logits, row);
  const LogitMap map = map_of_row(in, row);
  auto label_gradient = [&](int64_t k) {
    const int64_t i = row * num_labels + k, y = label_at(in, i);
    if (!grads.grad_logps || y < 0) return 0.0f;
    return kForm != Form::kPlain && to_float(x[y]) < map.threshold ? 0.0f : grads.grad_logps[i];
  };

  float label_sum = 0.0f;
#pragma unroll 1
  for (int64_t k = 0; k < num_labels; ++k) label_sum += label_gradient(k);
  const float grad_entropy = kEntropy ? grads.grad_entropy[row] : 0.0f;
  float base = (grads.grad_lse ? grads.grad_lse[row] : 0.0f) - label_sum;
  if constexpr (kEntropy) base -= grad_entropy * grads.entropy[row];
  const RowGradient formula(map, grads.reference[row], grads.log_sum[row], base, grad_entropy);

  // The labels' own elements, one per thread.
  const int64_t k = threadIdx.x;
  const int64_t y = k < num_labels ? label_at(in, row * num_labels + k) : -1;
  bool owner = y >= 0;  // of a label that stands several times in a row, the first is
  float own = 0.0f;
  if (owner) {
    float chosen = 0.0f;
#pragma unroll 1
    for (int64_t other = 0; other < num_labels; ++other) {
      if (label_at(in, row * num_labels + other) != y) continue;
      chosen += label_gradient(other);
      owner = owner && other >= k;
    }
    const float v = map.value<kForm>(to_float(x[y]));
    own = formula.operator()<kForm, kEntropy>(map, v);
    if (chosen != 0.0f) own = fma(chosen, map.derivative<kForm>(v), own);
  }
  __syncthreads();
  map_row<kBlock, kForm == Form::kSoftcap ? 1 : 2>(x, dx, width, [&](float logit) {
    return formula.operator()<kForm, kEntropy>(map, map.value<kForm>(logit));
  });
  __syncthreads();
  if (owner) from_float(dx[y], own);
}

// Calls body with the form as a type.
template <class Body>
void dispatch_form(const LogpsInputs& in, Body body) {
  if (in.softcap > 0.0f) return body(std::integral_constant<Form, Form::kSoftcap>{});
  if (in.row_thresholds) return body(std::integral_constant<Form, Form::kTruncated>{});
  body(std::integral_constant<Form, Form::kPlain>{});
}

}  // namespace
}  // namespace gpu

void logps_forward_cuda(const LogpsInputs& in, const LogpsOutputs& out, CudaTarget target) {
  const gpu::DeviceGuard guard(target.device);
  gpu::dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gpu::dispatch_form(in, [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      auto kernel = out.sum_p2 || out.mean_logit
                        ? &gpu::logps_forward_kernel<T, kForm, gpu::kWithAll>
                    : out.entropy ? &gpu::logps_forward_kernel<T, kForm, gpu::kWithEntropy>
                                  : &gpu::logps_forward_kernel<T, kForm, gpu::kWithLse>;
      gpu::launch(kernel, in.logits.num_rows, gpu::kBlock, target, in, out);
    });
    if (out.is_top1) {
      gpu::launch(&gpu::logps_is_top1_kernel<T>, in.logits.num_rows, gpu::kBlock, target, in,
                  out.is_top1);
    }
  });
}

void logps_backward_cuda(const LogpsInputs& in, const LogpsGrads& grads, CudaTarget target) {
  const gpu::DeviceGuard guard(target.device);
  gpu::dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gpu::dispatch_form(in, [&](auto form) {
      gpu::dispatch_bool(grads.grad_entropy != nullptr, [&](auto entropy) {
        gpu::launch(
            &gpu::logps_backward_kernel<T, decltype(form)::value, decltype(entropy)::value>,
            in.logits.num_rows, gpu::kBlock, target, in, grads);
      });
    });
  });
}

}  // namespace rlhf_fast
