// Sums of token values per sequence. Compiled once per instruction set.
#include "rlhf_fast/segment_sum.h"

#include "isa.h"
#include "segments.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void segment_sum(const SegmentSumInputs& in, const SegmentSumOutputs& out, int num_threads) {
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const Totals t = add_up_segment(in, span_of(in.sequences, s));
                   const double divisor = in.mean && t.count > 0 ? double(t.count) : 1.0;
                   out.sums[s] = static_cast<float>(t.sum / divisor);
                   out.counts[s] = static_cast<float>(t.count);
                 }
               });
}

void segment_sum_backward(const SegmentSumInputs& in, const SegmentSumGrads& grads,
                          int num_threads) {
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const bool divide = in.mean && grads.counts[s] > 0.0f;
                   const float g = grads.grad_sums[s] / (divide ? grads.counts[s] : 1.0f);
                   spread_over_segment(in, span_of(in.sequences, s), g, grads.grad_values);
                 }
               });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(segment_sum, SegmentSumInputs, SegmentSumOutputs)
RLHF_FAST_CPU_ENTRY(segment_sum_backward, SegmentSumInputs, SegmentSumGrads)

}  // namespace rlhf_fast
