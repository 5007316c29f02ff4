// What the losses of token sequences share on the CPU.
#pragma once

#include "../math/aggregation.h"
#include "../math/sequences.h"
#include "parallel.h"
#include "simd.h"

namespace rlhf_fast::RLHF_FAST_ISA {

template <class T>
RLHF_FAST_INLINE Vec load_some(const T* p, int64_t t, int64_t count) {
  return count == Vec::kWidth ? load(p + t) : load_part(p + t, count);
}
// The same from a stream that a loop walks along. A row is about a page, so the processor's own
// prefetching starts anew in each; padding is skipped, so a few vectors ahead are enough.
RLHF_FAST_INLINE Vec load_stream(const float* p, int64_t t, int64_t count) {
  prefetch<Vec::kWidth, 2048>(p + t);
  return load_some(p, t, count);
}
// Asks for the first tokens of the sequence after s where padding may lie before them: streams that
// jump over it would wait for memory anew in each row.
template <class... Streams>
RLHF_FAST_INLINE void prefetch_next(const Sequences& sequences, const bool* mask, int64_t s,
                                    const Streams*... streams) {
  if (!mask || s + 1 >= sequences.count) return;
  const Span next = span_of(sequences, s + 1);
  constexpr int64_t kLine = 16, kHead = 512;  // floats, as many as load_stream looks ahead
  const int64_t end = next.begin + kHead < next.end ? next.begin + kHead : next.end;
  for (int64_t t = next.begin; t < end; t += kLine) {
    ((streams ? prefetch<1, 0>(streams + t) : void()), ...);
  }
}
RLHF_FAST_INLINE void store_some(float* to, int64_t t, int64_t count, Vec x) {
  count == Vec::kWidth ? store(to + t, x) : store_part(to + t, x, count);
}

// 1 where a token is inside and the mask holds.
RLHF_FAST_INLINE Vec load_counts(const bool* mask, int64_t t, int64_t count) {
  const Vec counts = mask ? load_some(mask, t, count) : Vec(1.0f);
  return count < Vec::kWidth ? keep_lanes(counts, count, 0.0f) : counts;
}

// Adds x where a token counts; what it is elsewhere, NaN included, is not looked at.
RLHF_FAST_INLINE Vec add_counted(Vec sum, Vec counts, Vec x) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_setzero_ps(), counts.v, _CMP_LT_OQ);
  return _mm512_mask_add_ps(sum.v, mask, sum.v, x.v);
#else
  return sum + select_lt(Vec(0.0f), counts, x, Vec(0.0f));
#endif
}

// Whether the mask leaves out a whole vector, as it does with padding.
RLHF_FAST_INLINE bool none_counts(const bool* mask, int64_t t, int64_t count) {
  if (!mask || count < Vec::kWidth) return false;
  uint64_t words[2] = {};
  std::memcpy(words, mask + t, Vec::kWidth);
  return (words[0] | words[1]) == 0;
}

// Calls body(t, count) for each vector of tokens, and flush() now and then: where sums must be
// exact, they leave the vector's lanes before rounding errors pile up.
template <class Body, class Flush>
RLHF_FAST_INLINE void for_each_vector(Span span, Body body, Flush flush) {
  constexpr int64_t kBlock = 16 * Vec::kWidth;
  for (int64_t t = span.begin; t < span.end;) {
    const int64_t end = t + kBlock < span.end ? t + kBlock : span.end;
    for (; t + Vec::kWidth <= end; t += Vec::kWidth) body(t, int64_t(Vec::kWidth));
    if (t < end) body(t, end - t);
    t = end;
    flush();
  }
}

RLHF_FAST_INLINE int64_t count_tokens(const bool* mask, Span span) {
  int64_t sum = 0;
  for (int64_t t = span.begin; t < span.end;) {
    const int64_t end = t + 128 < span.end ? t + 128 : span.end;
    uint8_t part = 0;  // the compiler adds bytes, many at a time
    for (; t < end; ++t) part = uint8_t(part + mask[t]);
    sum += part;
  }
  return sum;
}

// Few sequences are one thread's piece unless they are long.
RLHF_FAST_INLINE int64_t sequences_per_piece(const Sequences& sequences) {
  return 1 + sequences.count * 8192 / (sequences.total + 1);
}

// How many tokens of each sequence count; returns the batch's weight and the number of all. Bytes
// are counted so fast that other threads take part only where there are millions.
struct Lengths {
  float weight;
  double num_tokens;
};
RLHF_FAST_INLINE Lengths measure(const Sequences& sequences, const bool* mask,
                                 const Aggregation& aggregation, float* lengths, int num_threads) {
  parallel_for(sequences.count, 128 * sequences_per_piece(sequences), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const Span span = span_of(sequences, s);
                   lengths[s] = float(mask ? count_tokens(mask, span) : span.end - span.begin);
                 }
               });
  double num_tokens = 0.0, num_sequences = 0.0;
  for (int64_t s = 0; s < sequences.count; ++s) {
    num_tokens += lengths[s];
    num_sequences += lengths[s] > 0.0f;
  }
  return {batch_weight(aggregation, float(num_tokens), float(num_sequences)), num_tokens};
}

// Column m of the sequences' sums, added up in order.
RLHF_FAST_INLINE double sum_column(const float* partials, int64_t count, int width, int m) {
  double sum = 0.0;
  for (int64_t s = 0; s < count; ++s) sum += double(partials[s * width + m]);
  return sum;
}

}  // namespace rlhf_fast::RLHF_FAST_ISA
