// Divergence of two rows of logits and its gradients. Compiled once per instruction set.
//
// Forward reads both rows once; the Jensen-Shannon divergence needs their log-sums first and reads
// them a second time, from the cache. Backward reads both once and writes one or both gradients.
#include "rlhf_fast/kl.h"

#include <cmath>
#include <initializer_list>
#include <vector>

#include "../math/divergence.h"
#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "softmax_row.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

// Both rows' softmax sums and KL(a || b), read once. With e = exp(z - z_ref) and d = z - z_ref of
// each row, KL(a || b) = sum(ea * (da - db)) / sum(ea) + log(sum_b / sum_a); the last term is taken
// in double, so the log-sums' rounding does not enter the divergence.
struct RowPair {
  SoftmaxRow a, b;  // a.weighted is the sum over da - db, in units of v
  double kl;
};

template <class T>
RowPair read_pair(const T* xa, const T* xb, int64_t vocab, const LogitMap& map) {
  constexpr int kWidth = Vec::kWidth;
  constexpr float kRedo = 4.0f;  // as in softmax_row.h, with the weighted sum
  RowPair rows;
  SoftmaxRow &a = rows.a, &b = rows.b;
  for (int64_t begin = 0; begin < vocab;) {
    const int64_t length = begin == 0 ? 8 * kWidth : kBlock;
    const int64_t end = begin + length < vocab ? begin + length : vocab;
    const Exponential<Vec, true> power_a(a.reference, map.outer2, 0.0f, 1.0f);
    const Exponential<Vec, true> power_b(b.reference, map.outer2, 0.0f, 1.0f);
    const Vec lowest_a = power_a.distance(Vec(-kInfinity)), reference_b(b.reference);
    Vec sum_a[2], sum_b[2], weighted[2];
    for (Vec* v : {sum_a, sum_b, weighted}) v[0] = v[1] = Vec(0.0f);
    Vec highest_a(-kInfinity), highest_b(-kInfinity);
    auto add = [&](int k, Vec va, Vec vb) __attribute__((always_inline)) {
      highest_a = max(va, highest_a);
      highest_b = max(vb, highest_b);
      const Vec da = power_a.distance(va), ea = power_a(da);
      sum_a[k] = sum_a[k] + ea;
      sum_b[k] = power_b.add_to(sum_b[k], power_b.distance(vb));
      // What `a` excludes adds nothing, also where b excludes it too.
      const Vec term = ea * (da - (vb - reference_b));
      weighted[k] = weighted[k] + select_lt(lowest_a, da, term, da * Vec(0.0f));
    };
    int64_t i = begin;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      prefetch<2 * kWidth>(xa + i);
      prefetch<2 * kWidth>(xb + i);
      Vec va[2], vb[2];
      load_pair(xa + i, va[0], va[1]);
      load_pair(xb + i, vb[0], vb[1]);
      for (int k = 0; k < 2; ++k) add(k, va[k], vb[k]);
    }
    for (; i < end; i += kWidth) {
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      add(0, keep_lanes(load_part(xa + i, count), count, -kInfinity),
          keep_lanes(load_part(xb + i, count), count, -kInfinity));
    }
    const float top_a = max_of(highest_a), top_b = max_of(highest_b);
    const bool raise_a = (top_a - a.reference) * map.outer2 > kRedo;
    const bool raise_b = (top_b - b.reference) * map.outer2 > kRedo;
    if (raise_b) {
      if (a.sum != 0.0) a.weighted += a.sum * (double(top_b) - b.reference);
      b.raise(top_b, map.outer2);
    }
    if (raise_a) a.raise(top_a, map.outer2);
    if (raise_a || raise_b) continue;
    a.sum += sum_of(sum_a[0] + sum_a[1]);
    b.sum += sum_of(sum_b[0] + sum_b[1]);
    a.weighted += sum_of(weighted[0] + weighted[1]);
    begin = end;
  }
  rows.kl = map.outer * (a.weighted / a.sum) + std::log(b.sum / a.sum);
  return rows;
}

LogSoftmax side(float reference, double log_sum, const LogitMap& map) {
  return {reference, map.outer2, float(log_sum / kLn2Exact)};
}

enum class Sides { kNone, kA, kB, kBoth };

// KL of both rows from their mixture, and one side's ratios to it if they are to be kept. The
// arithmetic leaves the memory idle: the time to ask for the rows that come next.
template <Sides kKept, class T>
void kl_from_mixture(const T* xa, const T* xb, const T* next_a, const T* next_b, int64_t vocab,
                     const MixtureMap& map, double& kl_a, double& kl_b, Vec* kept) {
  constexpr int kWidth = Vec::kWidth;
  kl_a = kl_b = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    Vec sum_a[2], sum_b[2];
    for (Vec* v : {sum_a, sum_b}) v[0] = v[1] = Vec(0.0f);
    auto add = [&](int k, Vec va, Vec vb) __attribute__((always_inline)) {
      const Mixture<Vec> m(map, va, vb);
      sum_a[k] = fma(m.pa, m.ratio_a, sum_a[k]);
      sum_b[k] = fma(m.pb, m.ratio_b, sum_b[k]);
      if constexpr (kKept != Sides::kNone) *kept++ = kKept == Sides::kA ? m.ratio_a : m.ratio_b;
    };
    int64_t i = begin;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      prefetch_far<2 * kWidth>(next_a + i);
      prefetch_far<2 * kWidth>(next_b + i);
      Vec va[2], vb[2];
      load_pair(xa + i, va[0], va[1]);
      load_pair(xb + i, vb[0], vb[1]);
      for (int k = 0; k < 2; ++k) add(k, va[k], vb[k]);
    }
    for (; i < end; i += kWidth) {  // absent lanes get the probability 0 on both sides
      const int64_t count = end - i < kWidth ? end - i : kWidth;
      add(0, keep_lanes(load_part(xa + i, count), count, -kInfinity),
          keep_lanes(load_part(xb + i, count), count, -kInfinity));
    }
    kl_a += kLn2Exact * sum_of(sum_a[0] + sum_a[1]);
    kl_b += kLn2Exact * sum_of(sum_b[0] + sum_b[1]);
  }
}

// A row's divergence and statistics. `next` is the row that the thread will probably read next.
template <class T, bool kJsd, Sides kKept = Sides::kNone>
void forward_row(const KlInputs& in, const KlOutputs& out, int64_t row, int64_t next,
                 Vec* kept = nullptr) {
  const T* xa = row_pointer<const T>(in.a, row);
  const T* xb = row_pointer<const T>(in.b, row);
  const LogitMap map(1.0f, 0.0f, in.temperature);
  RowPair rows;
  double kl_a, kl_b = 0.0;
  if constexpr (kJsd) {
    rows.a = softmax_row<T, Form::kPlain, false, false>(xa, in.a.width, map);
    rows.b = softmax_row<T, Form::kPlain, false, false>(xb, in.a.width, map);
    const MixtureMap mixture(side(rows.a.reference, std::log(rows.a.sum), map),
                             side(rows.b.reference, std::log(rows.b.sum), map), in.beta);
    kl_from_mixture<kKept>(xa, xb, row_pointer<const T>(in.a, next),
                           row_pointer<const T>(in.b, next), in.a.width, mixture, kl_a, kl_b, kept);
  } else {
    rows = read_pair(xa, xb, in.a.width, map);
    kl_a = rows.kl;
  }
  out.divergence[row] = float(kJsd ? in.beta * kl_a + (1.0 - in.beta) * kl_b : kl_a);
  const float stats[kNumKlStats] = {rows.a.reference, rows.a.log_sum(), rows.b.reference,
                                    rows.b.log_sum(), float(kl_a),      float(kl_b)};
  for (int s = 0; s < kNumKlStats; ++s) out.stats[s * in.a.num_rows + row] = stats[s];
}

// formula(n, a, b, da, db) gives the gradients at a row's n-th pair of vectors.
template <Sides kWritten, class T, class Formula>
void write_row(const T* xa, const T* xb, T* da, T* db, int64_t vocab, const Formula formula) {
  constexpr int kWidth = Vec::kWidth;
  constexpr bool kWriteA = kWritten != Sides::kB, kWriteB = kWritten != Sides::kA;
  int64_t i = 0;
  for (; i + 2 * kWidth <= vocab; i += 2 * kWidth) {
    prefetch<2 * kWidth>(xa + i);
    prefetch<2 * kWidth>(xb + i);
    Vec va[2], vb[2], ga[2], gb[2];
    load_pair(xa + i, va[0], va[1]);
    load_pair(xb + i, vb[0], vb[1]);
    for (int k = 0; k < 2; ++k) formula(i / kWidth + k, va[k], vb[k], ga[k], gb[k]);
    if constexpr (kWriteA) store_pair(da + i, ga[0], ga[1]);
    if constexpr (kWriteB) store_pair(db + i, gb[0], gb[1]);
  }
  for (; i < vocab; i += kWidth) {
    const int64_t count = vocab - i < kWidth ? vocab - i : kWidth;
    Vec ga, gb;
    formula(i / kWidth, load_part(xa + i, count), load_part(xb + i, count), ga, gb);
    if constexpr (kWriteA) store_part(da + i, ga, count);
    if constexpr (kWriteB) store_part(db + i, gb, count);
  }
}

template <bool kJsd, Sides kWritten, class T>
void write_gradients(const T* xa, const T* xb, T* da, T* db, int64_t vocab,
                     const DivergenceGradient& gradient, const Vec* kept) {
  if constexpr (!kJsd || kWritten == Sides::kBoth) {
    write_row<kWritten>(
        xa, xb, da, db, vocab,
        [gradient](int64_t, Vec va, Vec vb, Vec& ga, Vec& gb)
            __attribute__((always_inline)) { gradient.operator()<kJsd>(va, vb, ga, gb); });
  } else {
    // With one side wanted, its probability comes from its own logits alone.
    const LogSoftmax& own = kWritten == Sides::kA ? gradient.a : gradient.b;
    const Exponential<Vec, true> power(own.reference, own.outer2, own.log2_sum, 1.0f);
    auto apply = [gradient, power](Vec va, Vec vb, Vec ratio_a, Vec ratio_b, Vec& ga, Vec& gb)
                     __attribute__((always_inline)) {
                       ga = gradient.jsd_a(power(power.distance(va)), ratio_a);
                       gb = gradient.jsd_b(power(power.distance(vb)), ratio_b);
                     };
    const MixtureMap map(gradient.a, gradient.b, gradient.beta);
    if (kept) {
      write_row<kWritten>(
          xa, xb, da, db, vocab,
          [apply, kept](int64_t n, Vec va, Vec vb, Vec& ga, Vec& gb)
              __attribute__((always_inline)) { apply(va, vb, kept[n], kept[n], ga, gb); });
    } else {
      write_row<kWritten>(xa, xb, da, db, vocab,
                          [apply, map](int64_t, Vec va, Vec vb, Vec& ga, Vec& gb)
                              __attribute__((always_inline)) {
                                const Mixture<Vec> m(map, va, vb);
                                apply(va, vb, m.ratio_a, m.ratio_b, ga, gb);
                              });
    }
  }
}

template <class T, bool kJsd>
void backward_row(const KlInputs& in, const KlGrads& grads, int64_t row, const Vec* kept) {
  const T* xa = row_pointer<const T>(in.a, row);
  const T* xb = row_pointer<const T>(in.b, row);
  T* da = grads.grad_a.data ? row_pointer<T>(grads.grad_a, row) : nullptr;
  T* db = grads.grad_b.data ? row_pointer<T>(grads.grad_b, row) : nullptr;
  const int64_t vocab = in.a.width;
  const LogitMap map(1.0f, 0.0f, in.temperature);
  auto stat = [&](int s) { return grads.stats[s * in.a.num_rows + row]; };
  const DivergenceGradient gradient{
      side(stat(0), stat(1), map),           side(stat(2), stat(3), map), stat(4), stat(5), in.beta,
      grads.grad_divergence[row] * map.slope};
  if (gradient.scale == 0.0f) {
    if (da) std::memset(static_cast<void*>(da), 0, size_t(vocab) * sizeof(T));
    if (db) std::memset(static_cast<void*>(db), 0, size_t(vocab) * sizeof(T));
    return;
  }
  auto write = da && db ? &write_gradients<kJsd, Sides::kBoth, T>
               : da     ? &write_gradients<kJsd, Sides::kA, T>
                        : &write_gradients<kJsd, Sides::kB, T>;
  write(xa, xb, da, db, vocab, gradient, kept);
}

template <class T, bool kJsd>
void forward_only(const KlInputs& in, const KlOutputs& out, int64_t row, int64_t next) {
  forward_row<T, kJsd>(in, out, row, next);
}
template <class T, bool kJsd>
void backward_only(const KlInputs& in, const KlGrads& grads, int64_t row, int64_t) {
  backward_row<T, kJsd>(in, grads, row, nullptr);
}
template <class T, bool kJsd>
void row_with_grad(const KlInputs& in, const KlWithGrad& work, int64_t row, int64_t next) {
  Vec* kept = nullptr;
  if constexpr (kJsd) {
    // A logarithm takes longer than writing it down; one row's stay in the second-level cache.
    static thread_local std::vector<Vec> ratios;
    ratios.resize(size_t(in.a.width / Vec::kWidth + 1));
    kept = ratios.data();
  }
  auto forward = work.over_a ? &forward_row<T, kJsd, Sides::kA> : &forward_row<T, kJsd, Sides::kB>;
  forward(in, work.out, row, next, kept);
  backward_row<T, kJsd>(in, grads_of(in, work), row, kept);
}

template <class In, class Out>
void run_rows(void (*row)(const In&, const Out&, int64_t, int64_t), const In& in, const Out& out,
              int num_threads) {
  const int64_t num_rows = in.a.num_rows, piece = rows_per_piece(in.a.width);
  parallel_for(num_rows, piece, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      // A guess: other threads may be faster or slower.
      const int64_t next = r + 1 < end ? r + 1 : end + (num_threads - 1) * piece;
      row(in, out, r, next < num_rows ? next : r);
    }
  });
}

}  // namespace

void kl_forward(const KlInputs& in, const KlOutputs& out, int num_threads) {
  dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows(in.jsd ? &forward_only<T, true> : &forward_only<T, false>, in, out, num_threads);
  });
}

void kl_backward(const KlInputs& in, const KlGrads& grads, int num_threads) {
  dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows(in.jsd ? &backward_only<T, true> : &backward_only<T, false>, in, grads, num_threads);
  });
}

void kl_with_grad(const KlInputs& in, const KlWithGrad& work, int num_threads) {
  dispatch_dtype(in.a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_rows(in.jsd ? &row_with_grad<T, true> : &row_with_grad<T, false>, in, work, num_threads);
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(kl_forward, KlInputs, KlOutputs)
RLHF_FAST_CPU_ENTRY(kl_backward, KlInputs, KlGrads)
RLHF_FAST_CPU_ENTRY(kl_with_grad, KlInputs, KlWithGrad)

}  // namespace rlhf_fast
