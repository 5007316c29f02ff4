// Sums over one sequence's tokens, and a number handed back to each of them.
//
// Lanes are added as floats over blocks of kBlock tokens and then to a double, so the error does
// not grow with the sequence. The lane loops are plain code of fixed length, which the compiler
// turns into vectors, the mask included.
#pragma once

#include "rlhf_fast/segment_sum.h"

#include "tokens.h"

namespace rlhf_fast::RLHF_FAST_ISA {

// x where the mask is set, else 0: by its bits, since a NaN times 0 is not 0, and a branch per
// token costs ten times the addition. Of bytes, not of bool, the compiler makes vectors.
RLHF_FAST_INLINE float kept(float x, unsigned char mask) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0u - uint32_t(mask);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

struct Totals {
  double sum = 0.0;
  int64_t count = 0;
};

template <bool kMask, bool kWeights>
RLHF_FAST_INLINE Totals totals_of(const SegmentSumInputs& in, Span span) {
  const auto* mask = reinterpret_cast<const unsigned char*>(in.mask);
  constexpr int kLanes = 32;
  constexpr int64_t kBlock = 1024;
  Totals total;
  int64_t t = span.begin;
  while (t + kLanes <= span.end) {
    float lanes[kLanes] = {};
    uint32_t counts[kLanes] = {};
    const int64_t end = t + kBlock < span.end ? t + kBlock : span.end;
    for (; t + kLanes <= end; t += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float x = kWeights ? in.values[t + j] * in.weights[t + j] : in.values[t + j];
        lanes[j] += kMask ? kept(x, mask[t + j]) : x;
        if constexpr (kMask) counts[j] += mask[t + j];
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
RLHF_FAST_INLINE void spread(const SegmentSumInputs& in, Span span, float g, float* grad_values) {
  const auto* mask = reinterpret_cast<const unsigned char*>(in.mask);
  for (int64_t t = span.begin; t < span.end; ++t) {
    const float share = kWeights ? g * in.weights[t] : g;
    grad_values[t] = kMask ? kept(share, mask[t]) : share;
  }
}

inline Totals add_up_segment(const SegmentSumInputs& in, Span span) {
  if (in.mask)
    return in.weights ? totals_of<true, true>(in, span) : totals_of<true, false>(in, span);
  return in.weights ? totals_of<false, true>(in, span) : totals_of<false, false>(in, span);
}

inline void spread_over_segment(const SegmentSumInputs& in, Span span, float g, float* to) {
  if (in.mask) {
    in.weights ? spread<true, true>(in, span, g, to) : spread<true, false>(in, span, g, to);
  } else {
    in.weights ? spread<false, true>(in, span, g, to) : spread<false, false>(in, span, g, to);
  }
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
