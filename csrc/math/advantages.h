// Advantages within one group, written once for a warp and for a CPU thread. A group has a handful
// of completions, so everything is computed in double: equal rewards give exactly 0.
//
// `Lanes` says how the members are shared out: this lane takes members first, first + stride, ...;
// sum(x) and max(x) combine one value per lane and give every lane the result.
#pragma once

#include "host_device.h"
#include "rlhf_fast/group_advantages.h"
#include "sequences.h"

namespace rlhf_fast {

struct GroupStatistics {
  double count, mean, deviation;
};

template <class Lanes, class Term>
RLHF_FAST_HD double sum_over(const Lanes& lanes, int64_t count, Term term) {
  double sum = 0.0;
  for (int64_t i = lanes.first; i < count; i += lanes.stride) sum += term(i);
  return lanes.sum(sum);
}

// C(of_these, k) / C(of_all, k): how likely k drawn members are all among these.
RLHF_FAST_HD double all_drawn(double of_these, double of_all, int64_t k) {
  double product = 1.0;
  for (int64_t i = 0; i < k; ++i) {
    product *= of_these > double(i) ? (of_these - double(i)) / (of_all - double(i)) : 0.0;
  }
  return product;
}

// arXiv 2508.10751, equations 11, 12, 14 and 15: the advantage when the reward is that of the best
// of k.
RLHF_FAST_HD double pass_at_k(bool right, double count, double num_wrong, int64_t k,
                              double epsilon) {
  const double mean = 1.0 - all_drawn(num_wrong, count, k);
  const double deviation = sqrt(mean * (1.0 - mean));
  const double expected = right ? 1.0 : 1.0 - all_drawn(num_wrong - 1.0, count - 1.0, k - 1);
  return deviation > 0.0 ? (expected - mean) / (deviation + epsilon) : 0.0;
}

template <class Lanes>
RLHF_FAST_HD void advantages_of_group(const GroupAdvantagesInputs& in,
                                      const GroupAdvantagesOutputs& out, int64_t group,
                                      const Lanes& lanes) {
  const Span span = span_of(in.groups, group);
  const int64_t count = span.end - span.begin;
  const float* rewards = in.rewards + span.begin;
  float* advantages = out.advantages + span.begin;
  const double n = double(count), epsilon = double(in.epsilon);
  const GroupEstimator which = in.estimator;
  if (count == 1) {
    const double scale = which == GroupEstimator::grpo ? 1.0 + epsilon : 1.0;
    if (lanes.first == 0) advantages[0] = in.keep_single ? float(double(rewards[0]) / scale) : 0.0f;
    return;
  }

  const double mean = sum_over(lanes, count, [&](int64_t i) { return double(rewards[i]); }) / n;
  double baseline = mean, divisor = 1.0;
  if (which == GroupEstimator::grpo || which == GroupEstimator::best) {
    const double squares = sum_over(lanes, count, [&](int64_t i) {
      return (double(rewards[i]) - mean) * (double(rewards[i]) - mean);
    });
    divisor = sqrt(squares / (in.unbiased ? n - 1.0 : n)) + epsilon;
  } else if (which == GroupEstimator::rloo) {
    divisor = (n - 1.0) / n;  // r_i - mean of the others
  } else if (which == GroupEstimator::maxrl) {
    divisor = mean + epsilon;
  } else if (which == GroupEstimator::opo) {
    const double total =
        sum_over(lanes, count, [&](int64_t i) { return double(in.weights[span.begin + i]); });
    baseline = sum_over(lanes, count, [&](int64_t i) {
      return double(in.weights[span.begin + i]) * double(rewards[i]);
    });
    baseline = total > 0.0 ? baseline / total : mean;
  }
  const double num_wrong =
      sum_over(lanes, count, [&](int64_t i) { return rewards[i] > 0.0f ? 0.0 : 1.0; });

  for (int64_t i = lanes.first; i < count; i += lanes.stride) {
    const float own = rewards[i];
    double advantage = (double(own) - baseline) / divisor;
    if (which == GroupEstimator::pass_at_k) {
      advantage = own == own ? pass_at_k(own > 0.0f, n, num_wrong, in.k, epsilon) : double(own);
    } else if (which == GroupEstimator::best || which == GroupEstimator::rank) {
      double below = 0.0, equal = 0.0, runner_up = -1e300;
      bool is_best = true;
      for (int64_t j = 0; j < count; ++j) {
        const float other = rewards[j];
        below += other < own ? 1.0 : 0.0;
        equal += other == own ? 1.0 : 0.0;
        if (j == i) continue;
        runner_up = double(other) > runner_up ? double(other) : runner_up;
        is_best = is_best && (other < own || (other == own && i < j));
      }
      advantage = which == GroupEstimator::best
                      ? (is_best ? (double(own) - runner_up) / divisor : 0.0)
                      : (below + 0.5 * (equal - 1.0)) / (n - 1.0) - 0.5;
      if (own != own) advantage = double(own);
    }
    advantages[i] = float(advantage);
  }
}

}  // namespace rlhf_fast
