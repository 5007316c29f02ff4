// Masked whitening. Sums are in double, because a large mean leaves little of a float's digits to the
// variance.
#include "rlhf_fast/whiten.h"

#include <cmath>

namespace rlhf_fast {
using std::sqrt;
}

#include "../math/whiten.h"  // after the functions it uses
#include "isa.h"
#include "tokens.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

namespace {

constexpr int kLanes = 16;

// Count, sum and sum of squares.
void sum_chunk(const WhitenInputs& in, Span chunk, double* result) {
  constexpr int64_t kBlock = 512;
  double sum[kLanes] = {}, squares[kLanes] = {};
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock) {
    const int64_t left = chunk.end - begin, size = left < kBlock ? left : kBlock;
    float x[kBlock];
    for (int64_t t = 0; t < size; t += Vec::kWidth) {
      const int64_t count = size - t < Vec::kWidth ? size - t : Vec::kWidth;
      const Vec value = load_some(in.values + begin, t, count), zero(0.0f);
      const Vec counts = in.mask ? load_some(in.mask + begin, t, count) : Vec(1.0f);
      store(x + t, select_lt(zero, counts, value, zero));
    }
    for (int64_t t = size + (-size & (Vec::kWidth - 1)); t % kLanes != 0; ++t) x[t] = 0.0f;
    for (int64_t t = 0; t < size; t += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double value = double(x[t + lane]);
        sum[lane] += value;
        squares[lane] += value * value;
      }
    }
  }
  result[0] = double(in.mask ? count_tokens(in.mask, chunk) : chunk.end - chunk.begin);
  result[1] = result[2] = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[1] += sum[lane];
    result[2] += squares[lane];
  }
}

}  // namespace

void whiten_statistics(const WhitenInputs& in, const WhitenStatistics& out, int num_threads) {
  const int64_t num_partials = num_chunks(in);
  parallel_for(num_partials, 4, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = p * kWhitenChunk;
      const int64_t end = begin + kWhitenChunk < in.count ? begin + kWhitenChunk : in.count;
      sum_chunk(in, {begin, end}, out.partials + 3 * p);
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
  const Vec zero(0.0f), mean(formula.mean), scale(formula.scale), offset(formula.offset);
  parallel_for(in.count, 16384, num_threads, [&](int64_t begin, int64_t end) {
    for_each_vector(
        {begin, end},
        [&](int64_t t, int64_t count) __attribute__((always_inline)) {
          const Vec x = (load_some(in.values, t, count) - mean) * scale + offset;
          const Vec counts = load_counts(in.mask, t, count);
          store_some(out.whitened, t, count, select_lt(zero, counts, x, zero));
        },
        [] {});
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(whiten_statistics, WhitenInputs, WhitenStatistics)
RLHF_FAST_CPU_ENTRY(whiten_apply, WhitenInputs, WhitenOutputs)

}  // namespace rlhf_fast
