// Preference losses from log-probs of tokens. A pair is one thread's work: its tokens are added up,
// its loss is computed in double, and the two slopes are written to its tokens, whose mask is still
// in the cache then.
#include "rlhf_fast/token_preference_loss.h"

#include "isa.h"
#include "pairs.h"
#include "segments.h"

#include "../math/token_preference.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

void one_pair(const TokenPreferenceInputs& in, const TokenPreferenceOutputs& out, int64_t pair) {
  SegmentSumInputs tokens{in.sequences, in.logps, in.mask, in.weights};
  SegmentSumInputs ref_tokens = tokens;
  ref_tokens.values = in.ref_logps;
  PairSums sums{};
  Span spans[2];
  for (int side = 0; side < 2; ++side) {
    spans[side] = span_of(in.sequences, sequence_of(in, pair, side));
    const Totals total = add_up_segment(tokens, spans[side]);
    sums.logps[side] = float(total.sum);
    sums.tokens[side] = float(total.count);
    if (in.ref_logps) sums.ref_logps[side] = float(add_up_segment(ref_tokens, spans[side]).sum);
  }
  const PreferenceResult<double> r = preference_of_sums<double>(in, sums, pair);
  write_pair(in.pairs, out.pairs, pair, r);
  if (!out.d_logps) return;
  spread_over_segment(tokens, spans[0], float(r.loss.d_first), out.d_logps);
  spread_over_segment(tokens, spans[1], float(r.loss.d_second), out.d_logps);
}

}  // namespace

void token_preference_loss(const TokenPreferenceInputs& in, const TokenPreferenceOutputs& out,
                           int num_threads) {
  check_inputs(in.pairs);
  parallel_for(in.pairs.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) one_pair(in, out, i);
               });
  add_up_pairs(in.pairs.count, out.pairs);
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(token_preference_loss, TokenPreferenceInputs, TokenPreferenceOutputs)

}  // namespace rlhf_fast
