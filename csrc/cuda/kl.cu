// Divergence of two rows of logits and its gradients.
//
// Forward: one block per row reads both rows once (floor: 2 * N * V * sizeof(T) bytes); the
// Jensen-Shannon divergence, whose terms need both log-sums, reads them once too: a cluster of
// blocks keeps them in shared memory (resident_row.cuh). Rows that do not fit or are not equally
// aligned are read again, from L2 as far as that reaches. Backward: one block per row reads both
// and writes one or both gradients, possibly over the logits (floor: 2 reads and 1 or 2 writes);
// rows whose upstream gradient is 0 are not read and get zeros. Where the upstream gradient is known
// beforehand, kl_with_grad does both with two reads and one write. No atomics, no scratch memory, offsets in 64 bits.
#include "rlhf_fast/kl.h"

#include "kl_state.cuh"
#include "launch.cuh"
#include "resident_row.cuh"
#include "rows.cuh"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kBlock = 512;

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

template <class T>
__global__ void __launch_bounds__(kBlock) kl_forward_kernel(KlInputs in, KlOutputs out) {
  const T* xa = row_pointer<const T>(in.a, blockIdx.x);
  const T* xb = row_pointer<const T>(in.b, blockIdx.x);
  const LogitMap map(1.0f, 0.0f, in.temperature);
  PairState s = no_pairs();
  read_pair(xa, xb, in.a.width, [&](const auto& a, const auto& b) { add(s, a, b, map.outer2); });
  s = reduce_block<kBlock>(s, no_pairs(), [&](const PairState& p, const PairState& q) {
    return merge(p, q, map.outer2);
  });
  PairStats(s).write(in, out, blockIdx.x);
}

// The rows are read twice.
template <class T>
__global__ void __launch_bounds__(kBlock) kl_jsd_forward_kernel(KlInputs in, KlOutputs out) {
  const int64_t width = in.a.width;
  const T* xa = row_pointer<const T>(in.a, blockIdx.x);
  const T* xb = row_pointer<const T>(in.b, blockIdx.x);
  const LogitMap map(1.0f, 0.0f, in.temperature);
  const auto ra = softmax_of_row<kBlock, Form::kPlain, kWithLse>(xa, width, map);
  const auto rb = softmax_of_row<kBlock, Form::kPlain, kWithLse>(xb, width, map);
  MixtureTerms terms(ra, rb, map, in.beta);
  read_pair(xa, xb, width, [&](const auto& x, const auto& y) { terms.add(x, y); });
  const Pair sums = sum_block<kBlock>(terms.sums);
  PairStats(ra, rb, sums).write(in, out, blockIdx.x);
}

// The statistics of two rows, which this loads on the way.
template <class T, bool kJsd>
RLHF_FAST_DEVICE PairStats stats_of_slices(ResidentSlice<T, kBlock>& a, ResidentSlice<T, kBlock>& b,
                                           const LogitMap& map, float beta, int cluster,
                                           unsigned char* shared) {
  if constexpr (kJsd) {
    const auto ra = softmax_of_slice<kBlock, Form::kPlain, kWithLse>(a, map, cluster, shared);
    const auto rb = softmax_of_slice<kBlock, Form::kPlain, kWithLse>(b, map, cluster, shared);
    MixtureTerms terms(ra, rb, map, beta);
    a.walk_with(b, [&](const auto& x, const auto& y) { terms.add(x, y); });
    const Pair sums = sum_block<kBlock>(terms.sums);
    return PairStats(ra, rb, reduce_cluster(sums, cluster, shared, AddPairs{}));
  } else {
    a.template load<4>([](T) {}, [](const Pack<T>&) {});
    b.template load<4>([](T) {}, [](const Pack<T>&) {});
    PairState s = no_pairs();
    a.walk_with(b, [&](const auto& x, const auto& y) { add(s, x, y, map.outer2); });
    auto merged = [&](const PairState& p, const PairState& q) { return merge(p, q, map.outer2); };
    s = reduce_block<kBlock>(s, no_pairs(), merged);
    return PairStats(reduce_cluster(s, cluster, shared, merged));
  }
}

// The rows are read once and kept by a cluster of blocks; the gradient, if its upstream is given,
// is written over one of them. Two blocks share a multiprocessor; without clusters their rows
// seldom fit, and the plain divergence would spill registers there.
template <class T, bool kJsd>
__global__ void __launch_bounds__(kBlock, kHasClusters || kJsd ? 2 : 1)
    kl_resident_kernel(KlInputs in, KlWithGrad work, int cluster) {
  RLHF_FAST_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t row = blockIdx.x / cluster, width = in.a.width;
  const LogitMap map(1.0f, 0.0f, in.temperature);
  ResidentSlice<T, kBlock> a(row_pointer<T>(in.a, row), width, cluster, shared);
  ResidentSlice<T, kBlock> b(row_pointer<T>(in.b, row), width, cluster,
                             shared + slice_bytes(width * int64_t(sizeof(T)), cluster));
  const PairStats stats = stats_of_slices<T, kJsd>(a, b, map, in.beta, cluster, shared);
  if (cluster_rank() == 0) stats.write(in, work.out, row);
  if (!work.grad_divergence) return;
  const DivergenceGradient formula = stats.gradient(map, in.beta, work.grad_divergence[row]);
  if (formula.scale == 0.0f) {
    const auto zero = [](float) { return 0.0f; };
    return work.over_a ? a.rewrite(zero) : b.rewrite(zero);
  }
  float ga, gb;
  if (work.over_a) {
    a.rewrite_with(b, [&](float x, float y) {
      formula.operator()<kJsd>(x, y, ga, gb);
      return ga;
    });
  } else {
    b.rewrite_with(a, [&](float y, float x) {
      formula.operator()<kJsd>(x, y, ga, gb);
      return gb;
    });
  }
}

// Whether each row of `a` begins at the same place within 16 bytes as the row of b.
template <class T>
bool all_equally_aligned(const Rows& a, const Rows& b) {
  const auto apart = [](int64_t x, int64_t y) { return (x - y) * int64_t(sizeof(T)) % 16 != 0; };
  const auto at = [](const Rows& rows) { return reinterpret_cast<uintptr_t>(rows.data) % 16; };
  return a.inner == b.inner && at(a) == at(b) && !apart(a.outer_stride, b.outer_stride) &&
         !apart(a.inner_stride, b.inner_stride);
}

// Launches that, if the rows are equally aligned and fit.
template <class T>
bool launch_resident(const KlInputs& in, const KlWithGrad& work, CudaTarget target) {
  if (!all_equally_aligned<T>(in.a, in.b)) return false;
  const int64_t bytes = in.a.width * int64_t(sizeof(T));
  auto kernel = in.jsd ? &kl_resident_kernel<T, true> : &kl_resident_kernel<T, false>;
  const Shape shape = shape_of_resident_rows(kernel, bytes, 2, target.device);
  if (shape.cluster == 0) return false;
  launch(kernel, in.a.num_rows * shape.cluster, kBlock, target, shape, in, work, shape.cluster);
  return true;
}

template <class T, bool kJsd>
__global__ void __launch_bounds__(kBlock) kl_backward_kernel(KlInputs in, KlGrads grads) {
  const int64_t row = blockIdx.x, width = in.a.width, n = in.a.num_rows;
  const T* xa = row_pointer<const T>(in.a, row);
  const T* xb = row_pointer<const T>(in.b, row);
  T* da = grads.grad_a.data ? row_pointer<T>(grads.grad_a, row) : nullptr;
  T* db = grads.grad_b.data ? row_pointer<T>(grads.grad_b, row) : nullptr;
  const LogitMap map(1.0f, 0.0f, in.temperature);
  const DivergenceGradient formula =
      PairStats(grads.stats + row, n).gradient(map, in.beta, grads.grad_divergence[row]);
  if (formula.scale == 0.0f) {
    if (da) zero_row<kBlock>(da, width);
    if (db) zero_row<kBlock>(db, width);
    return;
  }
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
  gpu::use_device(target);
  gpu::dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (in.jsd && gpu::launch_resident<T>(in, {out, nullptr, false}, target)) return;
    auto kernel = in.jsd ? &gpu::kl_jsd_forward_kernel<T> : &gpu::kl_forward_kernel<T>;
    gpu::launch(kernel, in.a.num_rows, gpu::kBlock, target, in, out);
  });
}

void kl_backward_cuda(const KlInputs& in, const KlGrads& grads, CudaTarget target) {
  gpu::use_device(target);
  gpu::dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto kernel = in.jsd ? &gpu::kl_backward_kernel<T, true> : &gpu::kl_backward_kernel<T, false>;
    gpu::launch(kernel, in.a.num_rows, gpu::kBlock, target, in, grads);
  });
}

void kl_with_grad_cuda(const KlInputs& in, const KlWithGrad& work, CudaTarget target) {
  gpu::use_device(target);
  gpu::dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (gpu::launch_resident<T>(in, work, target)) return;
    kl_forward_cuda(in, work.out, target);
    kl_backward_cuda(in, grads_of(in, work), target);
  });
}

}  // namespace rlhf_fast
