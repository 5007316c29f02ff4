// The value loss of one token, once, for CUDA threads (F = float) and CPU vectors (F = a SIMD
// type).
#pragma once

#include "host_device.h"
#include "rlhf_fast/value_loss.h"

namespace rlhf_fast {

enum class ValueSum : int { kClip, kValue, kReturn, kSquaredError, kSquaredReturn, kLoss };

template <class F>
struct ValueTerm {
  F slope;
  F sums[kNumValueSums];
};

// 1/2 max((v - R)^2, (clip(v) - R)^2), where clip keeps v within `clip` of the old value; PPO's
// released code, later written down as detail 9 of "The 37 implementation details of PPO".
template <class F>
RLHF_FAST_HD ValueTerm<F> value_term(const ValueLossInputs& in, F value, F old, F target) {
  const F zero(0.0f), half(0.5f);
  const F error = value - target;
  const F square = error * error;
  F loss = square, slope = error, clipped = zero;
  if (in.old_values) {
    const F low = old - F(in.clip), high = old + F(in.clip);
    const F bounded = select_lt(value, low, low, select_lt(high, value, high, value));
    const F bounded_square = (bounded - target) * (bounded - target);
    clipped = select_lt(square, bounded_square, F(1.0f), zero);
    loss = select_lt(square, bounded_square, bounded_square, square);
    slope = select_lt(square, bounded_square, zero, error);
  }
  return {slope, {clipped, value, target, square, target * target, half * loss}};
}

// From sums over the batch's tokens.
RLHF_FAST_HD float value_metric(ValueMetric metric, double num_tokens, double clip, double value,
                                double target, double squared_error, double squared_target) {
  const double n = num_tokens > 1.0 ? num_tokens : 1.0;
  const double bias = (value - target) / n, mean = target / n;
  const double variance = squared_target / n - mean * mean;
  switch (metric) {
    case ValueMetric::clip_fraction: return float(clip / n);
    case ValueMetric::value: return float(value / n);
    case ValueMetric::return_: return float(mean);
    case ValueMetric::squared_error: return float(squared_error / n);
    case ValueMetric::explained_variance:
      return variance > 0.0 ? float(1.0 - (squared_error / n - bias * bias) / variance) : 0.0f;
    case ValueMetric::num_tokens: break;
  }
  return float(num_tokens);
}

}  // namespace rlhf_fast
