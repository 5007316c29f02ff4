// The value model's loss, gradient and metrics. Compiled once per instruction set.
#include "rlhf_fast/value_loss.h"

#include "isa.h"
#include "tokens.h"

#include "../math/value.h"  // after the vector type it uses

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int kLoss = int(ValueSum::kLoss);

void sequence(const ValueLossInputs& in, const ValueLossOutputs& out, int64_t s, float weight) {
  weight = token_weight(in.aggregation, weight, s, out.lengths[s]);
  const Vec zero(0.0f);
  prefetch_next(in.sequences, in.mask, s, in.values, in.old_values, in.returns, out.d_values);
  double totals[kNumValueSums] = {};
  Vec sums[kNumValueSums];
  for (Vec& sum : sums) sum = zero;
  for_each_vector(
      span_of(in.sequences, s),
      [&](int64_t t, int64_t count) __attribute__((always_inline)) {
        const Vec value = load_stream(in.values, t, count);
        const Vec old = in.old_values ? load_stream(in.old_values, t, count) : value;
        const Vec counts = load_counts(in.mask, t, count);
        const ValueTerm<Vec> term = value_term(in, value, old, load_stream(in.returns, t, count));
        for (int m = 0; m < kNumValueSums; ++m) {
          sums[m] = add_counted(sums[m], counts, term.sums[m]);
        }
        const Vec slope = select_lt(zero, counts, term.slope * Vec(weight), zero);
        if (out.d_values) store_some(out.d_values, t, count, slope);
      },
      [&]() __attribute__((always_inline)) {
        for (int m = 0; m < kNumValueSums; ++m) {
          totals[m] += sum_of(sums[m]);
          sums[m] = zero;
        }
      });
  totals[kLoss] *= weight;
  for (int m = 0; m < kNumValueSums; ++m) out.partials[s * kNumValueSums + m] = float(totals[m]);
}

}  // namespace

void value_loss(const ValueLossInputs& in, const ValueLossOutputs& out, int num_threads) {
  const Lengths lengths = measure(in.sequences, in.mask, in.aggregation, out.lengths, num_threads);
  parallel_for(in.sequences.count, sequences_per_piece(in.sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) sequence(in, out, s, lengths.weight);
               });
  double sums[kNumValueSums];
  for (int m = 0; m < kNumValueSums; ++m) {
    sums[m] = sum_column(out.partials, in.sequences.count, kNumValueSums, m);
  }
  *out.loss = float(sums[kLoss]);
  *out.scale = 1.0f;
  for (int m = 0; m < kNumValueMetrics; ++m) {
    out.metrics[m] = value_metric(static_cast<ValueMetric>(m), lengths.num_tokens, sums[0], sums[1],
                                  sums[2], sums[3], sums[4]);
  }
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(value_loss, ValueLossInputs, ValueLossOutputs)

}  // namespace rlhf_fast
