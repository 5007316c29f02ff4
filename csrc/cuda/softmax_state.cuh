// The online softmax of a row: one read, one state per thread, merged over the block.
#pragma once

#include "resident_row.cuh"
#include "rows.cuh"

#include "../math/logits.h"  // after the float functions it uses

namespace rlhf_fast::gpu {

#define RLHF_FAST_INFINITY __builtin_huge_valf()

// max of v, then sums over e = 2^((v - max) * outer2): of e, e * log2(e), e * e; and the sum of v.
// As many fields as the outputs need.
template <int kFields>
struct State {
  float field[kFields];
  RLHF_FAST_DEVICE float& operator[](int i) { return field[i]; }
  RLHF_FAST_DEVICE float operator[](int i) const { return field[i]; }
};
enum Field { kMax, kSum, kWeighted, kSquares, kValues };
constexpr int kWithLse = 2, kWithEntropy = 3, kWithAll = 5;

template <int kFields>
RLHF_FAST_DEVICE State<kFields> identity() {
  State<kFields> s{};
  s[kMax] = -RLHF_FAST_INFINITY;
  return s;
}

// The sums of `s` for a maximum that is `down` binary orders (<= 0) away from its own.
template <int kFields>
RLHF_FAST_DEVICE void rescale(State<kFields>& s, float down) {
  const float bounded = select_lt(down, -126.0f, -126.0f, down);
  const float scale = exp2(down);
  if constexpr (kFields > kWeighted) {
    s[kWeighted] = scale * fma(s[kSum], bounded, s[kWeighted]);
  }
  s[kSum] *= scale;
  if constexpr (kFields > kSquares) s[kSquares] *= scale * scale;
}

template <int kFields>
RLHF_FAST_DEVICE State<kFields> merge(State<kFields> a, State<kFields> b, float outer2) {
  const float max = fmaxf(a[kMax], b[kMax]);
  State<kFields> r{};
  // Where nothing but -inf was seen, the sums are 0 or NaN and need no rescaling.
  if (a[kMax] != -RLHF_FAST_INFINITY) rescale(a, times(a[kMax] - max, outer2));
  if (b[kMax] != -RLHF_FAST_INFINITY) rescale(b, times(b[kMax] - max, outer2));
#pragma unroll
  for (int i = kSum; i < kFields; ++i) r[i] = a[i] + b[i];
  r[kMax] = max;
  return r;
}

template <int kCount, int kFields>
RLHF_FAST_DEVICE void add(State<kFields>& s, const float (&v)[kCount], float outer2) {
  float max = s[kMax];
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, v[i]);
  // With only -inf (and NaN) so far, any finite reference makes every term 0 (or NaN).
  const float reference = max == -RLHF_FAST_INFINITY ? 0.0f : max;
  if (s[kMax] != -RLHF_FAST_INFINITY) rescale(s, times(s[kMax] - reference, outer2));
  s[kMax] = max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float u = times(v[i] - reference, outer2);
    const float e = exp2(u);
    s[kSum] += e;
    if constexpr (kFields > kWeighted) {
      s[kWeighted] = fma(e, select_lt(u, -126.0f, -126.0f, u), s[kWeighted]);
    }
    if constexpr (kFields > kSquares) s[kSquares] = fma(e, e, s[kSquares]);
    if constexpr (kFields > kValues) s[kValues] += v[i];
  }
}

template <int kBlock, Form kForm, int kFields, class T>
RLHF_FAST_DEVICE State<kFields> softmax_of_row(const T* x, int64_t width, const LogitMap& map) {
  State<kFields> state = identity<kFields>();
  read_row<kBlock, kForm == Form::kSoftcap ? 2 : 4>(  // more would spill
      x, width,
      [&](T logit) {
        const float v[1] = {map.value<kForm>(to_float(logit))};
        add(state, v, map.outer2);
      },
      [&](const Pack<T>& pack) {
        float v[Pack<T>::kSize];
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) v[k] = map.value<kForm>(to_float(pack.item[k]));
        add(state, v, map.outer2);
      });
  return reduce_block<kBlock>(
      state, identity<kFields>(),
      [&](const State<kFields>& a, const State<kFields>& b) { return merge(a, b, map.outer2); });
}

// The same of a row that a cluster of blocks keeps on the chip: loads it.
template <int kBlock, Form kForm, int kFields, class Slice>
RLHF_FAST_DEVICE State<kFields> softmax_of_slice(Slice& slice, const LogitMap& map, int cluster,
                                                 unsigned char* shared) {
  State<kFields> state = identity<kFields>();
  slice.template load<kForm == Form::kSoftcap ? 1 : 4>(
      [&](auto logit) {
        const float v[1] = {map.value<kForm>(to_float(logit))};
        add(state, v, map.outer2);
      },
      [&](const auto& pack) {
        float v[Slice::kSize];
#pragma unroll
        for (int k = 0; k < Slice::kSize; ++k) v[k] = map.value<kForm>(to_float(pack.item[k]));
        add(state, v, map.outer2);
      });
  auto merged = [&](const State<kFields>& a, const State<kFields>& b) {
    return merge(a, b, map.outer2);
  };
  state = reduce_block<kBlock>(state, identity<kFields>(), merged);
  return reduce_cluster(state, cluster, shared, merged);
}

}  // namespace rlhf_fast::gpu
