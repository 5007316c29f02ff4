// Preference losses of a batch from log-probs of tokens: sums, losses and gradient in one launch.
//
// One block per pair: it adds up the tokens of both responses, one thread makes the loss and its
// two slopes of the sums, and all threads write these to the tokens. The last block to end adds up
// what the pairs have written, in a fixed order. Floor: each log-prob and its mask read once, the
// gradient written once: 9 bytes a token, and 4 more for the reference's log-probs unless their
// sums are given. The mask is read again from L1.
#include "rlhf_fast/token_preference_loss.h"

#include "pairs.cuh"
#include "tokens.cuh"

#include "../math/token_preference.h"

namespace rlhf_fast {
namespace gpu {
namespace {

static_assert(kTokenBlock == kPairBlock);

RLHF_FAST_DEVICE void add_up_tokens(const TokenPreferenceInputs& in, Span span, int side,
                                    PairSums* sums) {
  Totals<3> sum{};
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
    if (in.mask && !in.mask[t]) continue;
    const float weight = in.weights ? in.weights[t] : 1.0f;
    sum[0] += in.logps[t] * weight;
    if (in.ref_logps) sum[1] += in.ref_logps[t] * weight;
    sum[2] += 1.0f;
  }
  sum = sum_block<kTokenBlock>(sum);
  if (threadIdx.x != 0) return;
  sums->logps[side] = sum[0];
  sums->ref_logps[side] = sum[1];
  sums->tokens[side] = sum[2];
}

__global__ void __launch_bounds__(kTokenBlock)
    token_preference_loss_kernel(TokenPreferenceInputs in, TokenPreferenceOutputs out) {
  RLHF_FAST_SHARED(PairSums, sums, 1);
  RLHF_FAST_SHARED(float, slopes, 2);
  const int64_t pair = blockIdx.x;
  for (int side = 0; side < 2; ++side) {
    add_up_tokens(in, span_of(in.sequences, sequence_of(in, pair, side)), side, sums);
  }
  if (threadIdx.x == 0) {
    const PreferenceResult<float> r = preference_of_sums<float>(in, *sums, pair);
    write_pair(in.pairs, out.pairs, pair, r);
    slopes[0] = r.loss.d_first;
    slopes[1] = r.loss.d_second;
  }
  __syncthreads();
  for (int side = 0; side < 2 && out.d_logps; ++side) {
    const Span span = span_of(in.sequences, sequence_of(in, pair, side));
    for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kTokenBlock) {
      const float slope = in.weights ? slopes[side] * in.weights[t] : slopes[side];
      out.d_logps[t] = !in.mask || in.mask[t] ? slope : 0.0f;
    }
  }
  if (is_last_block(out.ticket)) add_up_pairs(in.pairs.count, out.pairs);
}

}  // namespace
}  // namespace gpu

void token_preference_loss_cuda(const TokenPreferenceInputs& in, const TokenPreferenceOutputs& out,
                                CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::token_preference_loss_kernel, in.pairs.count, gpu::kTokenBlock, target, in,
              out);
}

}  // namespace rlhf_fast
