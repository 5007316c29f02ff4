// Sums of token values per sequence. Compiled once per instruction set.
//
// Lanes are added as floats over blocks of kBlock tokens and then to a double, so the error does
// not grow with the sequence. The lane loops are plain code of fixed length, which the compiler
// turns into vectors, the mask included.
#include "rlhf_fast/segment_sum.h"

#include "../math/sequences.h"
#include "isa.h"
#include "parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int kLanes = 32;
constexpr int64_t kBlock = 1024;
constexpr int64_t kTokensPerPiece = 16384;  // some microseconds of work

int64_t sequences_per_piece(const Sequences& sequences) {
  if (sequences.count == 0) return 1;
  const int64_t mean = sequences.total / sequences.count;
  return mean >= kTokensPerPiece ? 1 : kTokensPerPiece / (mean + 1) + 1;
}

template <bool kMask, bool kWeights>
RLHF_FAST_HD float term(const SegmentSumInputs& in, int64_t t) {
  const float x = kWeights ? in.values[t] * in.weights[t] : in.values[t];
  return kMask && !in.mask[t] ? 0.0f : x;
}

template <bool kMask, bool kWeights>
double sum_of(const SegmentSumInputs& in, Span span) {
  double total = 0.0;
  int64_t t = span.begin;
  while (t + kLanes <= span.end) {
    float lanes[kLanes] = {};
    const int64_t end = t + kBlock < span.end ? t + kBlock : span.end;
    for (; t + kLanes <= end; t += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += term<kMask, kWeights>(in, t + j);
    }
    for (float lane : lanes) total += lane;
  }
  for (; t < span.end; ++t) total += term<kMask, kWeights>(in, t);
  return total;
}

int64_t count_of(const SegmentSumInputs& in, Span span) {
  if (!in.mask) return span.end - span.begin;
  int64_t count = 0;
  for (int64_t t = span.begin; t < span.end; ++t) count += in.mask[t];
  return count;
}

}  // namespace

void segment_sum(const SegmentSumInputs& in, const SegmentSumOutputs& out, int num_threads) {
  const auto sum = in.mask ? (in.weights ? &sum_of<true, true> : &sum_of<true, false>)
                           : (in.weights ? &sum_of<false, true> : &sum_of<false, false>);
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const Span span = span_of(in.sequences, s);
                   const int64_t count = count_of(in, span);
                   const double total = sum(in, span);
                   const bool divide = in.mean && count > 0;
                   out.sums[s] =
                       static_cast<float>(divide ? total / static_cast<double>(count) : total);
                   out.counts[s] = static_cast<float>(count);
                 }
               });
}

void segment_sum_backward(const SegmentSumInputs& in, const SegmentSumGrads& grads,
                          int num_threads) {
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const Span span = span_of(in.sequences, s);
                   const bool divide = in.mean && grads.counts[s] > 0.0f;
                   const float g = divide ? grads.grad_sums[s] / grads.counts[s]  //
                                          : grads.grad_sums[s];
                   for (int64_t t = span.begin; t < span.end; ++t) {
                     const float share = in.weights ? g * in.weights[t] : g;
                     grads.grad_values[t] = in.mask && !in.mask[t] ? 0.0f : share;
                   }
                 }
               });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(segment_sum, SegmentSumInputs, SegmentSumOutputs)
RLHF_FAST_CPU_ENTRY(segment_sum_backward, SegmentSumInputs, SegmentSumGrads)

}  // namespace rlhf_fast
