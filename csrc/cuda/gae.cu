// Advantages and returns of sequences, last token first.
//
// One block per sequence walks it from the end in tiles of kBlock * kItems tokens. Each token is an
// affine map of a small state (csrc/math/gae.h); a thread composes the maps of its tokens, a scan
// over the block composes those of the threads behind it, and each thread then applies its own
// tokens one by one. So a row of T tokens takes T / (kBlock * kItems) short rounds instead of T.
// Floor: rewards, values and mask read once, advantages and returns written once, 17 bytes a token.
#include "rlhf_fast/gae.h"

#include "launch.cuh"

#include "../math/gae.h"
#include "../math/sequences.h"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kBlock = 256;
constexpr int kItems = 4;
constexpr int kWarps = kBlock / 32;

// The maps of all threads before this one, in order; `all` receives those of the whole block.
RLHF_FAST_DEVICE GaeStep scan_block(GaeStep own, GaeStep identity, GaeStep& all) {
  RLHF_FAST_SHARED(GaeStep, totals, kWarps);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  GaeStep inclusive = own, before = identity;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    GaeStep other = identity;
#pragma unroll
    for (int f = 0; f < kGaeStepFields; ++f) {
      other[f] = __shfl_up_sync(0xffffffffu, inclusive[f], distance);
    }
    if (lane >= distance) inclusive = then(other, inclusive);
  }
#pragma unroll
  for (int f = 0; f < kGaeStepFields; ++f) {
    before[f] = __shfl_up_sync(0xffffffffu, inclusive[f], 1);
  }
  if (lane == 0) before = identity;
  if (lane == 31) totals[warp] = inclusive;
  __syncthreads();
  GaeStep prefix = identity;
  all = identity;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) prefix = all;
    all = then(all, totals[w]);
  }
  __syncthreads();  // `totals` may be used again
  return then(prefix, before);
}

__global__ void __launch_bounds__(kBlock) gae_forward_kernel(GaeInputs in, GaeOutputs out) {
  const Span span = span_of(in.sequences, blockIdx.x);
  const GaeFormula formula{in.gamma, in.gamma * in.lambda, in.skip_masked};
  GaeState state{in.bootstrap_values ? in.bootstrap_values[blockIdx.x] : 0.0f, 0.0f};

  for (int64_t end = span.end; end > span.begin; end -= kBlock * kItems) {
    const int64_t last = end - 1 - int64_t(threadIdx.x) * kItems;
    GaeStep steps[kItems], own = formula.identity();
    float values[kItems];
    bool counts[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t t = last - k;
      const bool inside = t >= span.begin;
      counts[k] = inside && (!in.mask || in.mask[t]);
      values[k] = counts[k] && in.values ? in.values[t] : 0.0f;
      steps[k] = counts[k] ? formula.token(in.rewards[t], values[k])
                 : inside  ? formula.masked_token()
                           : formula.identity();
      own = then(own, steps[k]);
    }
    GaeStep all;
    GaeState here = scan_block(own, formula.identity(), all)(state);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      here = steps[k](here);
      if (last - k < span.begin) continue;
      out.advantages[last - k] = counts[k] ? here.advantage : 0.0f;
      out.returns[last - k] = counts[k] ? here.advantage + values[k] : 0.0f;
    }
    state = all(state);
  }
}

}  // namespace
}  // namespace gpu

void gae_forward_cuda(const GaeInputs& in, const GaeOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::gae_forward_kernel, in.sequences.count, gpu::kBlock, target, in, out);
}

}  // namespace rlhf_fast
