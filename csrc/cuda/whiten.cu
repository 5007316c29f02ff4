// Masked whitening in two launches, as nothing can be mapped before all is summed: each block sums
// one chunk, the last one to end adds the chunks' sums in a fixed order; then each block maps its
// part. Floor: the values and the mask read twice, the result written once, 14 bytes a number; at a
// batch's size all of it stays in L2.
#include "rlhf_fast/whiten.h"

#include "launch.cuh"
#include "rows.cuh"

#include "../math/whiten.h"  // after the float functions it uses

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / 32;

struct Sums {
  double count = 0.0, sum = 0.0, squares = 0.0;
};

// In a fixed order; thread 0 gets the result.
RLHF_FAST_DEVICE Sums sum_block(Sums s) {
  RLHF_FAST_SHARED(double, warps, 3 * kWarps);
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    s.count += __shfl_xor_sync(0xffffffffu, s.count, step);
    s.sum += __shfl_xor_sync(0xffffffffu, s.sum, step);
    s.squares += __shfl_xor_sync(0xffffffffu, s.squares, step);
  }
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) {
    warps[3 * warp] = s.count;
    warps[3 * warp + 1] = s.sum;
    warps[3 * warp + 2] = s.squares;
  }
  __syncthreads();
  Sums total;
  for (int w = 0; w < kWarps; ++w) {
    total.count += warps[3 * w];
    total.sum += warps[3 * w + 1];
    total.squares += warps[3 * w + 2];
  }
  __syncthreads();  // `warps` may be used again
  return total;
}

RLHF_FAST_DEVICE void write(double* to, const Sums& s) {
  if (threadIdx.x != 0) return;
  to[0] = s.count;
  to[1] = s.sum;
  to[2] = s.squares;
}

__global__ void __launch_bounds__(kBlock)
    whiten_statistics_kernel(WhitenInputs in, WhitenStatistics out) {
  const int64_t begin = int64_t(blockIdx.x) * kWhitenChunk;
  const int64_t end = begin + kWhitenChunk < in.count ? begin + kWhitenChunk : in.count;
  Sums s;
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlock) {
    if (in.mask && !in.mask[i]) continue;
    const double x = double(in.values[i]);
    s.count += 1.0;
    s.sum += x;
    s.squares += x * x;
  }
  write(out.partials + 3 * int64_t(blockIdx.x), sum_block(s));
  if (!is_last_block(out.ticket)) return;
  s = Sums{};
  for (unsigned p = threadIdx.x; p < gridDim.x; p += kBlock) {
    s.count += out.partials[3 * p];
    s.sum += out.partials[3 * p + 1];
    s.squares += out.partials[3 * p + 2];
  }
  write(out.statistics, sum_block(s));
}

__global__ void __launch_bounds__(kBlock) whiten_apply_kernel(WhitenInputs in, WhitenOutputs out) {
  const Whitening formula(out);
  const int64_t begin = int64_t(blockIdx.x) * kWhitenChunk;
  const int64_t end = begin + kWhitenChunk < in.count ? begin + kWhitenChunk : in.count;
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlock) {
    out.whitened[i] = !in.mask || in.mask[i] ? formula(in.values[i]) : 0.0f;
  }
}

}  // namespace
}  // namespace gpu

void whiten_statistics_cuda(const WhitenInputs& in, const WhitenStatistics& out,
                            CudaTarget target) {
  gpu::use_device(target);
  const int64_t blocks = in.count > 0 ? num_chunks(in) : 1;  // of nothing: zeros
  gpu::launch(&gpu::whiten_statistics_kernel, blocks, gpu::kBlock, target, in, out);
}

void whiten_apply_cuda(const WhitenInputs& in, const WhitenOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::whiten_apply_kernel, num_chunks(in), gpu::kBlock, target, in, out);
}

}  // namespace rlhf_fast
