// Sums of token values per sequence. Compiled once per instruction set.
//
// Lanes are added as floats over blocks of kBlock tokens and then to a double, so the error does
// not grow with the sequence. The lane loops are plain code of fixed length, which the compiler
// turns into vectors, the mask included.
#include "rlhf_fast/segment_sum.h"

#include "isa.h"
#include "tokens.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kBlock = 1024;

struct Totals {
  double sum = 0.0;
  int64_t count = 0;
};

template <bool kMask, bool kWeights>
Totals totals_of(const SegmentSumInputs& in, Span span) {
  Totals total;
  int64_t t = span.begin;
  while (t + kLanes <= span.end) {
    float lanes[kLanes] = {};
    uint32_t counts[kLanes] = {};
    const int64_t end = t + kBlock < span.end ? t + kBlock : span.end;
    for (; t + kLanes <= end; t += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float x = kWeights ? in.values[t + j] * in.weights[t + j] : in.values[t + j];
        lanes[j] += kMask ? kept(x, in.mask[t + j]) : x;
        if constexpr (kMask) counts[j] += in.mask[t + j];
      }
    }
    for (int j = 0; j < kLanes; ++j) {
      total.sum += lanes[j];
      total.count += counts[j];
    }
  }
  for (; t < span.end; ++t) {
    if (kMask && !in.mask[t]) continue;
    total.sum += kWeights ? in.values[t] * in.weights[t] : in.values[t];
    total.count += 1;
  }
  if constexpr (!kMask) total.count = span.end - span.begin;
  return total;
}

template <bool kMask, bool kWeights>
void spread(const SegmentSumInputs& in, Span span, float g, float* grad_values) {
  for (int64_t t = span.begin; t < span.end; ++t) {
    const float share = kWeights ? g * in.weights[t] : g;
    grad_values[t] = kMask ? kept(share, in.mask[t]) : share;
  }
}

}  // namespace

void segment_sum(const SegmentSumInputs& in, const SegmentSumOutputs& out, int num_threads) {
  const auto totals = in.mask ? (in.weights ? &totals_of<true, true> : &totals_of<true, false>)
                              : (in.weights ? &totals_of<false, true> : &totals_of<false, false>);
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const Totals t = totals(in, span_of(in.sequences, s));
                   const double divisor = in.mean && t.count > 0 ? double(t.count) : 1.0;
                   out.sums[s] = static_cast<float>(t.sum / divisor);
                   out.counts[s] = static_cast<float>(t.count);
                 }
               });
}

void segment_sum_backward(const SegmentSumInputs& in, const SegmentSumGrads& grads,
                          int num_threads) {
  const auto write = in.mask ? (in.weights ? &spread<true, true> : &spread<true, false>)
                             : (in.weights ? &spread<false, true> : &spread<false, false>);
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const bool divide = in.mean && grads.counts[s] > 0.0f;
                   const float g = grads.grad_sums[s] / (divide ? grads.counts[s] : 1.0f);
                   write(in, span_of(in.sequences, s), g, grads.grad_values);
                 }
               });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(segment_sum, SegmentSumInputs, SegmentSumOutputs)
RLHF_FAST_CPU_ENTRY(segment_sum_backward, SegmentSumInputs, SegmentSumGrads)

}  // namespace rlhf_fast
