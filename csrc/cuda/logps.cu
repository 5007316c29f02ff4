// Log-probs of labels from rows of logits, and their gradient.
//
// Forward: one block per row reads the row once (floor: N * V * sizeof(T) bytes) and reduces an
// online softmax state; entropy and the other statistics ride in the same state, so they cost
// arithmetic but no traffic. Backward: one block per row reads the logits once and writes the
// gradient once (floor: twice the bytes), possibly over the logits themselves: each element is read
// by the thread that later writes it, and the labels' own elements are read before a barrier and
// written after it. Rows without an upstream gradient are not read: they get zeros, whatever their
// logits. Where the upstream gradient is known beforehand, logps_with_grad does both with
// one read and one write: a cluster of blocks keeps the row in shared memory (resident_row.cuh).
// No atomics, no scratch memory, offsets in 64 bits.
#include "rlhf_fast/logps.h"

#include "launch.cuh"
#include "resident_row.cuh"
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

template <int kFields>
RLHF_FAST_DEVICE float entropy_of(const State<kFields>& state) {
  return log_natural(state[kSum]) - kLn2 * (state[kWeighted] / state[kSum]);
}

template <int kFields>
RLHF_FAST_DEVICE bool is_empty(const State<kFields>& state) {
  return state[kMax] == -RLHF_FAST_INFINITY && state[kSum] == 0.0f;
}

// The log-prob of a label whose logit has become v.
template <int kFields>
RLHF_FAST_DEVICE float logp_of(float v, const LogitMap& map, const State<kFields>& state) {
  const float logp = fma(v - state[kMax], map.outer, -log_natural(state[kSum]));
  const float undefined = RLHF_FAST_INFINITY - RLHF_FAST_INFINITY;
  return is_empty(state) ? undefined : logp > 0.0f ? 0.0f : logp;
}

template <int kFields>
RLHF_FAST_DEVICE void write_statistics(const LogpsInputs& in, const LogpsOutputs& out, int64_t row,
                                       const LogitMap& map, const State<kFields>& state) {
  const float sum = state[kSum], log_sum = log_natural(sum);
  out.reference[row] = state[kMax];
  out.log_sum[row] = log_sum;
  if (out.lse) out.lse[row] = is_empty(state) ? state[kMax] : fma(state[kMax], map.outer, log_sum);
  if constexpr (kFields > kWeighted) {
    if (out.entropy) out.entropy[row] = entropy_of(state);
  }
  if constexpr (kFields > kSquares) {
    if (out.sum_p2) out.sum_p2[row] = state[kSquares] / sum / sum;
    if (out.mean_logit) out.mean_logit[row] = state[kValues] * map.outer / float(in.logits.width);
  }
}

template <class T, Form kForm, int kFields>
__global__ void __launch_bounds__(kBlock) logps_forward_kernel(LogpsInputs in, LogpsOutputs out) {
  const int64_t row = blockIdx.x, width = in.logits.width;
  const T* x = row_pointer<const T>(in.logits, row);
  const LogitMap map = map_of_row(in, row);
  const State<kFields> state = softmax_of_row<kBlock, kForm, kFields>(x, width, map);
  if (threadIdx.x == 0) write_statistics(in, out, row, map, state);
  for (int64_t k = threadIdx.x; out.logps && k < in.labels_per_row; k += kBlock) {
    const int64_t i = row * in.labels_per_row + k, y = label_at(in, i);
    out.logps[i] = y < 0 ? 0.0f : logp_of(map.value<kForm>(to_float(x[y])), map, state);
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

// One row's labels in backward: thread k looks after label k.
template <class T, Form kForm>
struct RowLabels {
  int64_t own = -1;     // this thread's label; of one that stands several times, the first thread's
  float chosen = 0.0f;  // the upstream gradients of that label, and of all labels
  float all = 0.0f;
  bool pass_nothing = true;  // every one is 0; the same in all threads
  float v = 0.0f;            // read before the row may be overwritten

  RLHF_FAST_DEVICE RowLabels(const LogpsInputs& in, const float* grad_logps, const T* x,
                             int64_t row, const LogitMap& map) {
    const int64_t num_labels = in.labels_per_row, thread = threadIdx.x;
    auto label = [&](int64_t k) { return label_at(in, row * num_labels + k); };
    if (thread < num_labels) own = label(thread);
    if (own >= 0) v = map.value<kForm>(to_float(x[own]));
    const int64_t y = own;
#pragma unroll 1
    for (int64_t k = 0; k < num_labels; ++k) {
      const int64_t other = label(k);
      if (other < 0 || !grad_logps) continue;
      if (kForm != Form::kPlain && to_float(x[other]) < map.threshold) continue;
      const float gradient = grad_logps[row * num_labels + k];
      all += gradient;
      pass_nothing = pass_nothing && gradient == 0.0f;
      if (other == y) chosen += gradient;
      if (other == y && k < thread) own = -1;
    }
  }

  // The gradient at this thread's label.
  template <class Formula>
  RLHF_FAST_DEVICE float gradient(const Formula& formula, const LogitMap& map) const {
    const float of_all = formula(v);
    return chosen == 0.0f ? of_all : fma(chosen, map.derivative<kForm>(v), of_all);
  }
};

template <class T, Form kForm, bool kEntropy>
__global__ void __launch_bounds__(kBlock) logps_backward_kernel(LogpsInputs in, LogpsGrads grads) {
  const int64_t row = blockIdx.x, width = in.logits.width;
  const T* x = row_pointer<const T>(in.logits, row);
  T* dx = row_pointer<T>(grads.grad_logits, row);
  const LogitMap map = map_of_row(in, row);
  const RowLabels<T, kForm> labels(in, grads.grad_logps, x, row, map);
  const float grad_entropy = kEntropy ? grads.grad_entropy[row] : 0.0f;
  const float grad_lse = grads.grad_lse ? grads.grad_lse[row] : 0.0f;
  __syncthreads();
  if (labels.pass_nothing && grad_entropy == 0.0f && grad_lse == 0.0f) {
    return zero_row<kBlock>(dx, width);
  }
  float base = grad_lse - labels.all;
  if constexpr (kEntropy) base -= grad_entropy * grads.entropy[row];
  const GradientFormula<float, kForm, kEntropy> formula(
      map, {map, grads.reference[row], grads.log_sum[row], base, grad_entropy});
  const float own = labels.gradient(formula, map);
  map_row<kBlock, kForm == Form::kSoftcap ? 1 : 2>(
      x, dx, width, [&](float logit) { return formula(map.value<kForm>(logit)); });
  __syncthreads();
  if (labels.own >= 0) from_float(dx[labels.own], own);
}

// Forward, then backward over the logits: a cluster of blocks keeps the row in shared memory, so it
// is read once and written once.
template <class T, Form kForm, bool kFull>
__global__ void __launch_bounds__(kBlock, 2)
    logps_with_grad_kernel(LogpsInputs in, LogpsWithGrad work, int cluster) {
  constexpr int kFields = kFull ? kWithAll : kWithLse;
  RLHF_FAST_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t row = blockIdx.x / cluster;
  T* x = row_pointer<T>(in.logits, row);
  const LogitMap map = map_of_row(in, row);
  const RowLabels<T, kForm> labels(in, work.grad_logps, x, row, map);
  float label_v = 0.0f;  // for labels that RowLabels drops because they stand twice
  int64_t label = -1;
  if (int64_t(threadIdx.x) < in.labels_per_row) {
    label = label_at(in, row * in.labels_per_row + threadIdx.x);
    label_v = labels.v;
  }

  ResidentSlice<T, kBlock> slice(x, in.logits.width, cluster, shared);
  const auto state = softmax_of_slice<kBlock, kForm, kFields>(slice, map, cluster, shared);

  if (cluster_rank() == 0) {
    if (threadIdx.x == 0) write_statistics(in, work.out, row, map, state);
    if (work.out.logps && int64_t(threadIdx.x) < in.labels_per_row) {
      work.out.logps[row * in.labels_per_row + threadIdx.x] =
          label < 0 ? 0.0f : logp_of(label_v, map, state);
    }
  }
  const float grad_entropy = kFull && work.grad_entropy ? work.grad_entropy[row] : 0.0f;
  const float grad_lse = work.grad_lse ? work.grad_lse[row] : 0.0f;
  if (labels.pass_nothing && grad_entropy == 0.0f && grad_lse == 0.0f) {
    return slice.rewrite([](float) { return 0.0f; });
  }
  float base = grad_lse - labels.all;
  if constexpr (kFull) base -= grad_entropy == 0.0f ? 0.0f : grad_entropy * entropy_of(state);
  const GradientFormula<float, kForm, kFull> formula(
      map, {map, state[kMax], log_natural(state[kSum]), base, grad_entropy});
  slice.rewrite([&](float logit) { return formula(map.value<kForm>(logit)); });
  __syncthreads();
  if (labels.own >= 0 && slice.owns(labels.own, cluster)) {
    from_float(x[labels.own], labels.gradient(formula, map));
  }
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
  gpu::use_device(target);
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
  gpu::use_device(target);
  gpu::dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gpu::dispatch_form(in, [&](auto form) {
      gpu::dispatch_bool(grads.grad_entropy != nullptr, [&](auto entropy) {
        gpu::launch(&gpu::logps_backward_kernel<T, decltype(form)::value, decltype(entropy)::value>,
                    in.logits.num_rows, gpu::kBlock, target, in, grads);
      });
    });
  });
}

void logps_with_grad_cuda(const LogpsInputs& in, const LogpsWithGrad& work, CudaTarget target) {
  gpu::use_device(target);
  const LogpsOutputs& out = work.out;
  gpu::dispatch_dtype(in.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gpu::dispatch_form(in, [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      const bool full = out.entropy || out.sum_p2 || out.mean_logit || work.grad_entropy;
      auto kernel = full ? &gpu::logps_with_grad_kernel<T, kForm, true>
                         : &gpu::logps_with_grad_kernel<T, kForm, false>;
      const int64_t bytes = in.logits.width * int64_t(sizeof(T));
      const gpu::Shape shape = gpu::shape_of_resident_rows(kernel, bytes, 1, target.device);
      if (shape.cluster == 0) {  // the row does not fit: two passes over global memory
        logps_forward_cuda(in, out, target);
        logps_backward_cuda(in, grads_of(in, work), target);
        return;
      }
      if (out.is_top1) {
        gpu::launch(&gpu::logps_is_top1_kernel<T>, in.logits.num_rows, gpu::kBlock, target, in,
                    out.is_top1);
      }
      gpu::launch(kernel, in.logits.num_rows * shape.cluster, gpu::kBlock, target, shape, in, work,
                  shape.cluster);
    });
  });
}

}  // namespace rlhf_fast
