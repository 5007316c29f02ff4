// Masked whitening. Plain loops that the compiler vectorises: sums are in double, because a large
// mean leaves little of a float's digits to the variance.
#include "rlhf_fast/whiten.h"

#include <algorithm>
#include <cmath>

namespace rlhf_fast {
using std::sqrt;
}

#include "../math/whiten.h"  // after the functions it uses
#include "isa.h"
#include "parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void whiten_statistics(const WhitenInputs& in, const WhitenStatistics& out, int num_threads) {
  const int64_t num_partials = num_chunks(in);
  parallel_for(num_partials, 4, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      constexpr int kLanes = 16;
      double count[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
      const int64_t begin = p * kWhitenChunk;
      const int64_t end = begin + kWhitenChunk < in.count ? begin + kWhitenChunk : in.count;
      auto add = [&](int lane, int64_t i) __attribute__((always_inline)) {
        const bool counts = !in.mask || in.mask[i];
        const double x = counts ? double(in.values[i]) : 0.0;
        count[lane] += counts ? 1.0 : 0.0;
        sum[lane] += x;
        squares[lane] += x * x;
      };
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) add(lane, i + lane);
      }
      for (; i < end; ++i) add(0, i);
      for (int lane = 1; lane < kLanes; ++lane) {
        count[0] += count[lane];
        sum[0] += sum[lane];
        squares[0] += squares[lane];
      }
      out.partials[3 * p] = count[0];
      out.partials[3 * p + 1] = sum[0];
      out.partials[3 * p + 2] = squares[0];
    }
  });
  for (int k = 0; k < 3; ++k) {
    double total = 0.0;
    for (int64_t p = 0; p < num_partials; ++p) total += out.partials[3 * p + k];
    out.statistics[k] = total;
  }
}

void whiten_apply(const WhitenInputs& in, const WhitenOutputs& out, int num_threads) {
  const Whitening formula(out);
  parallel_for(in.count, 16384, num_threads, [&](int64_t begin, int64_t end) {
    if (!in.mask) {
      for (int64_t i = begin; i < end; ++i) out.whitened[i] = formula(in.values[i]);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        const float x = formula(in.values[i]);
        out.whitened[i] = in.mask[i] ? x : 0.0f;
      }
    }
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(whiten_statistics, WhitenInputs, WhitenStatistics)
RLHF_FAST_CPU_ENTRY(whiten_apply, WhitenInputs, WhitenOutputs)

}  // namespace rlhf_fast
