// Divergence of two rows of logits and its gradients.
//
// Forward: one block per row reads both rows once (floor: 2 * N * V * sizeof(T) bytes); the
// Jensen-Shannon divergence reads them again, from L2 as far as that reaches. Backward: one block
// per row reads both and writes one or both gradients, possibly over the logits (floor: 2 reads and
// 1 or 2 writes). No atomics, no scratch memory, offsets in 64 bits.
#include "rlhf_fast/kl.h"

#include "launch.cuh"
#include "rows.cuh"
#include "softmax_state.cuh"

#include "../math/divergence.h"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kBlock = 512;

struct Pair {
  float value[2];
  RLHF_FAST_DEVICE float& operator[](int i) { return value[i]; }
  RLHF_FAST_DEVICE float operator[](int i) const { return value[i]; }
};

// Walks two equally long rows: single(j) for loose elements, packs(j) for 16 bytes from element j
// on. All addresses must be equally aligned for that; otherwise every element is loose.
template <class T, class Single, class Packs>
RLHF_FAST_DEVICE void walk(const T* x, bool equally_aligned, int64_t width, Single single,
                           Packs packs) {
  RowSpan<T> span(x, width);
  if (!equally_aligned) span.head = span.tail = width;
  for (int64_t j = threadIdx.x; j < span.head; j += kBlock) single(j);
  for (int64_t j = span.head + threadIdx.x * Pack<T>::kSize; j < span.tail;
       j += kBlock * Pack<T>::kSize) {
    packs(j);
  }
  for (int64_t j = span.tail + threadIdx.x; j < width; j += kBlock) single(j);
}

RLHF_FAST_DEVICE bool same_alignment(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

// Calls add(a, b) with one or with 16 bytes' worth of elements of both rows.
template <class T, class Add>
RLHF_FAST_DEVICE void read_pair(const T* xa, const T* xb, int64_t width, Add add) {
  walk(
      xa, same_alignment(xa, xb), width,
      [&](int64_t j) {
        const float a[1] = {to_float(xa[j])}, b[1] = {to_float(xb[j])};
        add(a, b);
      },
      [&](int64_t j) {
        constexpr int kSize = Pack<T>::kSize;
        Pack<T> pa, pb;
        pa.raw = load_streaming(xa + j);
        pb.raw = load_streaming(xb + j);
        float a[kSize], b[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) a[k] = to_float(pa.item[k]), b[k] = to_float(pb.item[k]);
        add(a, b);
      });
}

RLHF_FAST_DEVICE void write_stats(const KlInputs& in, const KlOutputs& out, float divergence,
                                  const float (&stats)[kNumKlStats]) {
  if (threadIdx.x != 0) return;
  out.divergence[blockIdx.x] = divergence;
#pragma unroll
  for (int s = 0; s < kNumKlStats; ++s) out.stats[s * in.a.num_rows + blockIdx.x] = stats[s];
}

// Both rows' softmax sums, and over e = 2^ua the sum of e * (ua - ub), where u is a logit's
// distance from its row's maximum in binary orders. KL(a || b) follows from them, so one read is
// enough.
struct PairState {
  float field[5];
  RLHF_FAST_DEVICE float& operator[](int i) { return field[i]; }
};
enum PairField { kMaxA, kSumA, kMaxB, kSumB, kRatio };

// The sums of `s` for maxima that are at least as large as its own.
RLHF_FAST_DEVICE void raise(PairState& s, float max_a, float max_b, float outer2) {
  const bool none_a = s[kMaxA] == -RLHF_FAST_INFINITY, none_b = s[kMaxB] == -RLHF_FAST_INFINITY;
  const float down_a = none_a ? 0.0f : times(s[kMaxA] - max_a, outer2);
  const float down_b = none_b ? 0.0f : times(s[kMaxB] - max_b, outer2);
  const float near_a = select_lt(down_a, -126.0f, -126.0f, down_a);
  const float scale_a = exp2(down_a);
  s[kRatio] = scale_a * fma(s[kSumA], near_a - down_b, s[kRatio]);
  s[kSumA] *= scale_a;
  s[kSumB] *= exp2(down_b);
  s[kMaxA] = max_a;
  s[kMaxB] = max_b;
}

RLHF_FAST_DEVICE PairState merge(PairState p, PairState q, float outer2) {
  const float max_a = fmaxf(p[kMaxA], q[kMaxA]), max_b = fmaxf(p[kMaxB], q[kMaxB]);
  raise(p, max_a, max_b, outer2);
  raise(q, max_a, max_b, outer2);
  p[kSumA] += q[kSumA];
  p[kSumB] += q[kSumB];
  p[kRatio] += q[kRatio];
  return p;
}

template <class T>
__global__ void __launch_bounds__(kBlock) kl_forward_kernel(KlInputs in, KlOutputs out) {
  const T* xa = row_pointer<const T>(in.a, blockIdx.x);
  const T* xb = row_pointer<const T>(in.b, blockIdx.x);
  const LogitMap map(1.0f, 0.0f, in.temperature);
  const PairState identity{{-RLHF_FAST_INFINITY, 0.0f, -RLHF_FAST_INFINITY, 0.0f, 0.0f}};
  PairState s = identity;
  read_pair(xa, xb, in.a.width, [&](const auto& a, const auto& b) {
    constexpr int kCount = sizeof(a) / sizeof(float);
    float max_a = s[kMaxA], max_b = s[kMaxB];
#pragma unroll
    for (int k = 0; k < kCount; ++k) max_a = fmaxf(max_a, a[k]), max_b = fmaxf(max_b, b[k]);
    if (max_a > s[kMaxA] || max_b > s[kMaxB]) raise(s, max_a, max_b, map.outer2);
    // With only -inf so far, any finite reference makes every term 0; a NaN stays one.
    const float ref_a = max_a == -RLHF_FAST_INFINITY ? 0.0f : max_a;
    const float ref_b = max_b == -RLHF_FAST_INFINITY ? 0.0f : max_b;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float ua = times(a[k] - ref_a, map.outer2), ub = times(b[k] - ref_b, map.outer2);
      const float ea = exp2(ua);
      s[kSumA] += ea;
      s[kSumB] += exp2(ub);
      // What `a` excludes adds nothing, also where b excludes it too.
      s[kRatio] += select_lt(ua, -126.0f, 0.0f, ea * (ua - ub));
    }
  });
  s = reduce_block<kBlock>(
      s, identity, [&](const PairState& p, const PairState& q) { return merge(p, q, map.outer2); });
  const float log_sum_a = log_natural(s[kSumA]), log_sum_b = log_natural(s[kSumB]);
  const float kl = kLn2 * (s[kRatio] / s[kSumA]) + log_natural(s[kSumB] / s[kSumA]);
  write_stats(in, out, kl, {s[kMaxA], log_sum_a, s[kMaxB], log_sum_b, kl, 0.0f});
}

// The mixture needs both log-sums before its first term: the rows are read twice.
template <class T>
__global__ void __launch_bounds__(kBlock) kl_jsd_forward_kernel(KlInputs in, KlOutputs out) {
  const int64_t width = in.a.width;
  const T* xa = row_pointer<const T>(in.a, blockIdx.x);
  const T* xb = row_pointer<const T>(in.b, blockIdx.x);
  const LogitMap map(1.0f, 0.0f, in.temperature);
  const auto ra = softmax_of_row<kBlock, Form::kPlain, kWithLse>(xa, width, map);
  const auto rb = softmax_of_row<kBlock, Form::kPlain, kWithLse>(xb, width, map);
  const float log_sum_a = log_natural(ra[kSum]), log_sum_b = log_natural(rb[kSum]);
  const LogSoftmax a{ra[kMax], map.outer2, log_sum_a * kLog2e};
  const LogSoftmax b{rb[kMax], map.outer2, log_sum_b * kLog2e};
  Pair sums{{0.0f, 0.0f}};
  read_pair(xa, xb, width, [&](const auto& x, const auto& y) {
#pragma unroll
    for (int k = 0; k < int(sizeof(x) / sizeof(float)); ++k) {
      const float la = a.log2_p(x[k]), lb = b.log2_p(y[k]), pa = exp2(la), pb = exp2(lb);
      const float lm = log2_mixture(pa, pb, in.beta);
      sums[0] += p_log_ratio(pa, la, lm);
      sums[1] += p_log_ratio(pb, lb, lm);
    }
  });
  sums = reduce_block<kBlock>(sums, Pair{{0.0f, 0.0f}}, [](const Pair& p, const Pair& q) {
    return Pair{{p[0] + q[0], p[1] + q[1]}};
  });
  const float kl_a = sums[0] * kLn2, kl_b = sums[1] * kLn2;
  write_stats(in, out, fma(in.beta, kl_a, (1.0f - in.beta) * kl_b),
              {ra[kMax], log_sum_a, rb[kMax], log_sum_b, kl_a, kl_b});
}

template <class T, bool kJsd>
__global__ void __launch_bounds__(kBlock) kl_backward_kernel(KlInputs in, KlGrads grads) {
  const int64_t row = blockIdx.x, width = in.a.width, n = in.a.num_rows;
  const T* xa = row_pointer<const T>(in.a, row);
  const T* xb = row_pointer<const T>(in.b, row);
  T* da = grads.grad_a.data ? row_pointer<T>(grads.grad_a, row) : nullptr;
  T* db = grads.grad_b.data ? row_pointer<T>(grads.grad_b, row) : nullptr;
  const LogitMap map(1.0f, 0.0f, in.temperature);
  const float* stats = grads.stats + row;
  const DivergenceGradient formula{{stats[0], map.outer2, stats[n] * kLog2e},
                                   {stats[2 * n], map.outer2, stats[3 * n] * kLog2e},
                                   stats[4 * n],
                                   stats[5 * n],
                                   in.beta,
                                   grads.grad_divergence[row] * map.slope};
  const bool aligned =
      same_alignment(xa, xb) && (!da || same_alignment(xa, da)) && (!db || same_alignment(xa, db));
  walk(
      xa, aligned, width,
      [&](int64_t j) {
        float ga, gb;
        formula.operator()<kJsd>(to_float(xa[j]), to_float(xb[j]), ga, gb);
        if (da) from_float(da[j], ga);
        if (db) from_float(db[j], gb);
      },
      [&](int64_t j) {
        Pack<T> pa, pb;
        pa.raw = load_streaming(xa + j);
        pb.raw = load_streaming(xb + j);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) {
          float ga, gb;
          formula.operator()<kJsd>(to_float(pa.item[k]), to_float(pb.item[k]), ga, gb);
          from_float(pa.item[k], ga);
          from_float(pb.item[k], gb);
        }
        if (da) store_streaming(da + j, pa.raw);
        if (db) store_streaming(db + j, pb.raw);
      });
}

}  // namespace
}  // namespace gpu

void kl_forward_cuda(const KlInputs& in, const KlOutputs& out, CudaTarget target) {
  const gpu::DeviceGuard guard(target.device);
  gpu::dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto kernel = in.jsd ? &gpu::kl_jsd_forward_kernel<T> : &gpu::kl_forward_kernel<T>;
    gpu::launch(kernel, in.a.num_rows, gpu::kBlock, target, in, out);
  });
}

void kl_backward_cuda(const KlInputs& in, const KlGrads& grads, CudaTarget target) {
  const gpu::DeviceGuard guard(target.device);
  gpu::dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto kernel = in.jsd ? &gpu::kl_backward_kernel<T, true> : &gpu::kl_backward_kernel<T, false>;
    gpu::launch(kernel, in.a.num_rows, gpu::kBlock, target, in, grads);
  });
}

}  // namespace rlhf_fast
