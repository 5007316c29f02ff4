// What two rows of logits come to on CUDA: the sums of both while they are read, and the statistics
// that remain.
#pragma once

#include "rlhf_fast/kl.h"

#include "rows.cuh"
#include "softmax_state.cuh"

#include "../math/divergence.h"

namespace rlhf_fast::gpu {
namespace {

using Pair = Totals<2>;
struct AddPairs {
  RLHF_FAST_DEVICE Pair operator()(const Pair& p, const Pair& q) const { return p + q; }
};

// Both rows' terms against their mixture, for which both log-sums must be known.
struct MixtureTerms {
  LogSoftmax a, b;
  float beta;
  Pair sums{};

  RLHF_FAST_DEVICE MixtureTerms(const State<kWithLse>& ra, const State<kWithLse>& rb,
                                const LogitMap& map, float beta)
      : a{ra[kMax], map.outer2, log_natural(ra[kSum]) * kLog2e},
        b{rb[kMax], map.outer2, log_natural(rb[kSum]) * kLog2e},
        beta(beta) {}

  template <int kCount>
  RLHF_FAST_DEVICE void add(const float (&x)[kCount], const float (&y)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Mixture<float> m(a, b, beta, x[k], y[k]);
      sums[0] = fma(m.pa, m.ratio_a, sums[0]);
      sums[1] = fma(m.pb, m.ratio_b, sums[1]);
    }
  }
};

// Both rows' softmax sums, and over e = 2^ua the sum of e * (ua - ub), where u is a logit's
// distance from its row's maximum in binary orders. KL(a || b) follows from them, so one read is
// enough.
struct PairState {
  float field[5];
  RLHF_FAST_DEVICE float& operator[](int i) { return field[i]; }
  RLHF_FAST_DEVICE float operator[](int i) const { return field[i]; }
};
enum PairField { kMaxA, kSumA, kMaxB, kSumB, kRatio };

// The sums of `s` for maxima that are at least as large as its own.
RLHF_FAST_DEVICE void raise(PairState& s, float max_a, float max_b, float outer2) {
  const bool none_a = s[kMaxA] == -RLHF_FAST_INFINITY, none_b = s[kMaxB] == -RLHF_FAST_INFINITY;
  const float down_a = none_a ? 0.0f : times(s[kMaxA] - max_a, outer2);
  const float down_b = none_b ? 0.0f : times(s[kMaxB] - max_b, outer2);
  const float near_a = select_lt(down_a, -126.0f, -126.0f, down_a);
  const float scale_a = exp2(down_a);
  // Of logits at the dtype's end down_b may be -inf: no 0 * inf.
  s[kRatio] = scale_a == 0.0f ? 0.0f : scale_a * fma(s[kSumA], near_a - down_b, s[kRatio]);
  s[kSumA] *= scale_a;
  s[kSumB] *= exp2(down_b);
  s[kMaxA] = max_a;
  s[kMaxB] = max_b;
}

RLHF_FAST_DEVICE PairState merge(PairState p, PairState q, float outer2) {
  const float max_a = fmaxf(p[kMaxA], q[kMaxA]), max_b = fmaxf(p[kMaxB], q[kMaxB]);
  raise(p, max_a, max_b, outer2);
  raise(q, max_a, max_b, outer2);
  p[kSumA] += q[kSumA];
  p[kSumB] += q[kSumB];
  p[kRatio] += q[kRatio];
  return p;
}

RLHF_FAST_DEVICE PairState no_pairs() {
  return {{-RLHF_FAST_INFINITY, 0.0f, -RLHF_FAST_INFINITY, 0.0f, 0.0f}};
}

template <int kCount>
RLHF_FAST_DEVICE void add(PairState& s, const float (&a)[kCount], const float (&b)[kCount],
                          float outer2) {
  float max_a = s[kMaxA], max_b = s[kMaxB];
#pragma unroll
  for (int k = 0; k < kCount; ++k) max_a = fmaxf(max_a, a[k]), max_b = fmaxf(max_b, b[k]);
  if (max_a > s[kMaxA] || max_b > s[kMaxB]) raise(s, max_a, max_b, outer2);
  // With only -inf so far, any finite reference makes every term 0; a NaN stays one.
  const float ref_a = max_a == -RLHF_FAST_INFINITY ? 0.0f : max_a;
  const float ref_b = max_b == -RLHF_FAST_INFINITY ? 0.0f : max_b;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float ua = times(a[k] - ref_a, outer2), ub = times(b[k] - ref_b, outer2);
    const float ea = exp2(ua);
    s[kSumA] += ea;
    s[kSumB] += exp2(ub);
    // What `a` excludes adds nothing, also where b excludes it too.
    s[kRatio] += select_lt(ua, -126.0f, 0.0f, ea * (ua - ub));
  }
}

// What forward leaves for backward, and the divergence.
struct PairStats {
  float max_a, log_sum_a, max_b, log_sum_b, kl_a, kl_b;

  RLHF_FAST_DEVICE explicit PairStats(PairState s)
      : max_a(s[kMaxA]),
        log_sum_a(log_natural(s[kSumA])),
        max_b(s[kMaxB]),
        log_sum_b(log_natural(s[kSumB])),
        kl_a(kLn2 * (s[kRatio] / s[kSumA]) + log_natural(s[kSumB] / s[kSumA])),
        kl_b(0.0f) {}
  RLHF_FAST_DEVICE PairStats(const State<kWithLse>& ra, const State<kWithLse>& rb, Pair sums)
      : max_a(ra[kMax]),
        log_sum_a(log_natural(ra[kSum])),
        max_b(rb[kMax]),
        log_sum_b(log_natural(rb[kSum])),
        kl_a(sums[0] * kLn2),
        kl_b(sums[1] * kLn2) {}
  RLHF_FAST_DEVICE PairStats(const float* stats, int64_t n)
      : max_a(stats[0]),
        log_sum_a(stats[n]),
        max_b(stats[2 * n]),
        log_sum_b(stats[3 * n]),
        kl_a(stats[4 * n]),
        kl_b(stats[5 * n]) {}

  RLHF_FAST_DEVICE void write(const KlInputs& in, const KlOutputs& out, int64_t row) const {
    if (threadIdx.x != 0) return;
    out.divergence[row] = in.jsd ? fma(in.beta, kl_a, (1.0f - in.beta) * kl_b) : kl_a;
    const float stats[kNumKlStats] = {max_a, log_sum_a, max_b, log_sum_b, kl_a, kl_b};
#pragma unroll
    for (int s = 0; s < kNumKlStats; ++s) out.stats[s * in.a.num_rows + row] = stats[s];
  }

  RLHF_FAST_DEVICE DivergenceGradient gradient(const LogitMap& map, float beta,
                                               float upstream) const {
    return {{max_a, map.outer2, log_sum_a * kLog2e},
            {max_b, map.outer2, log_sum_b * kLog2e},
            kl_a,
            kl_b,
            beta,
            upstream * map.slope};
  }
};

}  // namespace
}  // namespace rlhf_fast::gpu
