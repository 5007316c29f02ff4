// Walking one row with a whole block: 16-byte accesses, single elements at unaligned ends.
#pragma once

#include "portable.cuh"

namespace rlhf_fast::gpu {

template <class T>
RLHF_FAST_DEVICE T* row_pointer(const Rows& rows, int64_t r) {
  const int64_t outer = rows.inner == rows.num_rows ? 0 : r / rows.inner;
  return static_cast<T*>(rows.data) + outer * rows.outer_stride +
         (r - outer * rows.inner) * rows.inner_stride;
}

// A row cut into [0, head) + packs [head, tail) + [tail, width).
template <class T>
struct RowSpan {
  int64_t head, tail;
  RLHF_FAST_DEVICE RowSpan(const void* row, int64_t width) {
    constexpr int kSize = Pack<T>::kSize;
    const int offset = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
    head = offset ? kSize - offset : 0;
    if (head > width) head = width;
    tail = head + (width - head) / kSize * kSize;
  }
};

// Calls one(logit) for loose elements and pack(values) for 16 bytes at a time, kUnroll loads ahead.
template <int kBlock, int kUnroll, class T, class One, class Many>
RLHF_FAST_DEVICE void read_row(const T* x, int64_t width, One one, Many many) {
  constexpr int kSize = Pack<T>::kSize;
  const RowSpan<T> span(x, width);
  const int thread = threadIdx.x;
  if (thread < span.head) one(x[thread]);
  const T* body = x + span.head;
  const int64_t num_packs = (span.tail - span.head) / kSize;
  int64_t i = thread;
  for (; i + (kUnroll - 1) * kBlock < num_packs; i += kUnroll * kBlock) {
    Pack<T> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      packs[u].raw = load_streaming(body + (i + u * kBlock) * kSize);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) many(packs[u]);
  }
  for (; i < num_packs; i += kBlock) {
    Pack<T> pack;
    pack.raw = load_streaming(body + i * kSize);
    many(pack);
  }
  if (span.tail + thread < width) one(x[span.tail + thread]);
}

// y[j] = formula(x[j]); y may be x. Falls back to single elements when x and y are not equally
// aligned.
template <int kBlock, int kUnroll, class T, class Formula>
RLHF_FAST_DEVICE void map_row(const T* x, T* y, int64_t width, Formula formula) {
  constexpr int kSize = Pack<T>::kSize;
  const int thread = threadIdx.x;
  auto single = [&](int64_t j) { from_float(y[j], formula(to_float(x[j]))); };
  if ((reinterpret_cast<uintptr_t>(x) ^ reinterpret_cast<uintptr_t>(y)) & 15) {
    for (int64_t j = thread; j < width; j += kBlock) single(j);
    return;
  }
  const RowSpan<T> span(x, width);
  if (thread < span.head) single(thread);
  const int64_t num_packs = (span.tail - span.head) / kSize;
  auto write = [&](int64_t i, const Pack<T>& in) {
    Pack<T> out;
#pragma unroll
    for (int k = 0; k < kSize; ++k) from_float(out.item[k], formula(to_float(in.item[k])));
    store_streaming(y + span.head + i * kSize, out.raw);
  };
  int64_t i = thread;
  for (; i + (kUnroll - 1) * kBlock < num_packs; i += kUnroll * kBlock) {
    Pack<T> packs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      packs[u].raw = load_streaming(x + span.head + (i + u * kBlock) * kSize);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) write(i + u * kBlock, packs[u]);
  }
  for (; i < num_packs; i += kBlock) {
    Pack<T> pack;
    pack.raw = load_streaming(x + span.head + i * kSize);
    write(i, pack);
  }
  if (span.tail + thread < width) single(span.tail + thread);
}

// y[j] = 0 for a whole row.
template <int kBlock, class T>
RLHF_FAST_DEVICE void zero_row(T* y, int64_t width) {
  const RowSpan<T> span(y, width);
  const int thread = threadIdx.x;
  if (thread < span.head) y[thread] = T{};
#pragma unroll 1
  for (int64_t j = span.head + thread * Pack<T>::kSize; j < span.tail;
       j += kBlock * Pack<T>::kSize) {
    store_streaming(y + j, Vec16{});
  }
  if (span.tail + thread < width) y[span.tail + thread] = T{};
}

// Combines one value per thread over the block, in a fixed order; every thread gets the result.
// `merge` must be associative up to rounding; kBlock is a multiple of 32 and at most 1024.
template <int kBlock, class State, class Merge>
RLHF_FAST_DEVICE State reduce_block(State state, State identity, Merge merge) {
  constexpr int kWarps = kBlock / 32;
  constexpr int kWords = sizeof(State) / sizeof(float);
  static_assert(sizeof(State) == kWords * sizeof(float), "a state is made of floats");
  RLHF_FAST_SHARED(State, partial, kWarps);
  auto reduce_warp = [&](State s) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      State other;
#pragma unroll
      for (int w = 0; w < kWords; ++w) other[w] = __shfl_xor_sync(0xffffffffu, s[w], step);
      s = merge(s, other);
    }
    return s;
  };
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  state = reduce_warp(state);
  if (lane == 0) partial[warp] = state;
  __syncthreads();
  state = reduce_warp(lane < kWarps ? partial[lane] : identity);
  __syncthreads();  // `partial` may be used again
  return state;
}

// Sums that a block adds up together.
template <int kCount>
struct Totals {
  float at[kCount];
  RLHF_FAST_DEVICE float& operator[](int i) { return at[i]; }
  RLHF_FAST_DEVICE float operator[](int i) const { return at[i]; }
};

template <int kCount>
RLHF_FAST_DEVICE Totals<kCount> operator+(const Totals<kCount>& a, const Totals<kCount>& b) {
  Totals<kCount> sum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = a[i] + b[i];
  return sum;
}

template <int kBlock, int kCount>
RLHF_FAST_DEVICE Totals<kCount> sum_block(const Totals<kCount>& own) {
  using Sums = Totals<kCount>;
  return reduce_block<kBlock>(own, Sums{}, [](const Sums& a, const Sums& b) { return a + b; });
}

// Whether this is the last of the launch's blocks to come here; each comes once, after thread 0 has
// written what the last one is to read. Only the order of arrival is left to chance: what is made
// of the numbers must not depend on it. The ticket is 0 again for the next launch.
RLHF_FAST_DEVICE bool is_last_block(unsigned* ticket) {
  RLHF_FAST_SHARED(unsigned, last, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1 ? 1u : 0u;
    __threadfence();
    if (last[0]) *ticket = 0u;
  }
  __syncthreads();
  return last[0] != 0u;
}

}  // namespace rlhf_fast::gpu
