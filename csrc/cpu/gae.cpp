// Advantages and returns of sequences, last token first. Compiled once per instruction set.
//
// A vector of tokens that all count is scanned in a vector: after log2(width) shifted
// multiply-adds each lane holds the sum over the lanes behind it, and one more brings in the state
// from the next vector. Where a mask mixes, tokens go one by one through the same recurrence.
#include "rlhf_fast/gae.h"

#include <cstring>

#include "../math/gae.h"
#include "../math/sequences.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int64_t kAhead = 512;  // tokens

// decay^1, decay^2, decay^4, ... and, for lane i, decay^(width - i).
struct Powers {
  Vec of_shift[4];
  Vec to_end;

  explicit Powers(float decay) {
    float power = decay;
    for (Vec& p : of_shift) {
      p = Vec(power);
      power *= power;
    }
    float lanes[kWidth];
    power = 1.0f;
    for (int i = kWidth - 1; i >= 0; --i) lanes[i] = power *= decay;
    to_end = load(static_cast<const float*>(lanes));
  }
};

template <int kShift>
RLHF_FAST_INLINE Vec scan(Vec x, const Vec* power) {
  if constexpr (kShift < kWidth) {
    return scan<2 * kShift>(fma(*power, shift_down<kShift>(x, Vec(0.0f)), x), power + 1);
  } else {
    return x;
  }
}

int count_set(const bool* mask) {
  int count = 0;
  for (int i = 0; i < kWidth; ++i) count += mask[i];
  return count;
}

class Scanner {
 public:
  Scanner(const GaeInputs& in, const GaeOutputs& out)
      : in_(in),
        out_(out),
        formula_{in.gamma, in.gamma * in.lambda, in.skip_masked},
        powers_(formula_.decay) {}

  void sequence(int64_t s) const {
    const Span span = span_of(in_.sequences, s);
    GaeState state{in_.bootstrap_values ? in_.bootstrap_values[s] : 0.0f, 0.0f};
    int64_t i = span.end;
    for (; i - kWidth >= span.begin; i -= kWidth) {
      const int64_t first = i - kWidth;
      const int counted = in_.mask ? count_set(in_.mask + first) : kWidth;
      if (counted == kWidth) {
        state = vector(first, state);
      } else if (counted == 0 && in_.skip_masked) {
        std::memset(out_.advantages + first, 0, kWidth * sizeof(float));
        std::memset(out_.returns + first, 0, kWidth * sizeof(float));
      } else {
        for (int64_t t = i - 1; t >= first; --t) state = token(t, state);
      }
    }
    for (int64_t t = i - 1; t >= span.begin; --t) state = token(t, state);
  }

 private:
  GaeState token(int64_t t, GaeState state) const {
    if (in_.mask && !in_.mask[t]) {
      out_.advantages[t] = out_.returns[t] = 0.0f;
      return formula_.masked_token()(state);
    }
    const float value = in_.values ? in_.values[t] : 0.0f;
    state = formula_.token(in_.rewards[t], value)(state);
    out_.advantages[t] = state.advantage;
    out_.returns[t] = state.advantage + value;
    return state;
  }

  RLHF_FAST_INLINE GaeState vector(int64_t t, const GaeState& state) const {
    prefetch(t - kAhead);
    const Vec value = in_.values ? load(in_.values + t) : Vec(0.0f);
    const Vec next_value = shift_down<1>(value, Vec(state.next_value));
    const Vec delta = fma(Vec(formula_.gamma), next_value, load(in_.rewards + t) - value);
    const Vec within = scan<1>(delta, powers_.of_shift);
    const Vec advantage = fma(powers_.to_end, Vec(state.advantage), within);
    store(out_.advantages + t, advantage);
    store(out_.returns + t, advantage + value);
    return {first_lane(value), first_lane(advantage)};
  }

  // The recurrence keeps the processor from running ahead to these loads by itself.
  RLHF_FAST_INLINE void prefetch(int64_t t) const {
    if (t < 0) return;
    __builtin_prefetch(in_.rewards + t);
    if (in_.values) __builtin_prefetch(in_.values + t);
    __builtin_prefetch(out_.advantages + t, 1);
    __builtin_prefetch(out_.returns + t, 1);
  }

  const GaeInputs& in_;
  const GaeOutputs& out_;
  GaeFormula formula_;
  Powers powers_;
};

}  // namespace

void gae_forward(const GaeInputs& in, const GaeOutputs& out, int num_threads) {
  const Scanner scanner(in, out);
  const int64_t count = in.sequences.count, total = in.sequences.total;
  const int64_t piece = total > count * 16384 ? 1 : 1 + count * 16384 / (total + 1);
  parallel_for(count, piece, num_threads, [&](int64_t begin, int64_t end) {
    // Backwards, as the tokens: memory is then walked in one direction, which it is faster at.
    for (int64_t s = end - 1; s >= begin; --s) scanner.sequence(s);
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(gae_forward, GaeInputs, GaeOutputs)

}  // namespace rlhf_fast
