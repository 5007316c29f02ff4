// A row that stays on the chip between its two passes: each block of a cluster keeps a slice of it
// in shared memory. So a softmax and what is made of it cost one read and one write of global
// memory.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

#include "../math/host_device.h"

namespace rlhf_fast::gpu {

// The start of dynamic shared memory, where blocks leave what the others need; the slice follows.
constexpr size_t kExchangeBytes = 128;

// One block's share of a row: whole 16-byte packs in shared memory. What does not fill a pack, at
// an unaligned start or end, stays with single threads of the first and the last block.
template <class T, int kBlock>
struct ResidentSlice {
  static constexpr int kSize = Pack<T>::kSize;
  T* row;
  Pack<T>* kept;
  int64_t first, count;  // packs of this block, from `body` on
  T* body;
  int64_t loose = -1;  // the element that this thread keeps in a register
  T loose_value{};

  RLHF_FAST_DEVICE ResidentSlice(T* row, int64_t width, int cluster, unsigned char* shared)
      : row(row), kept(reinterpret_cast<Pack<T>*>(shared + kExchangeBytes)) {
    const RowSpan<T> span(row, width);
    const int64_t num_packs = (span.tail - span.head) / kSize;
    const int64_t share = (num_packs + cluster - 1) / cluster;
    const int64_t rank = cluster_rank();
    first = share * rank < num_packs ? share * rank : num_packs;
    count = (first + share < num_packs ? first + share : num_packs) - first;
    body = row + span.head;
    const int64_t thread = threadIdx.x;
    if (rank == 0 && thread < span.head) loose = thread;
    // The tail goes to other threads than the head, so that each keeps one element at most.
    const int64_t in_tail = thread - kBlock / 2;
    if (rank == cluster - 1 && in_tail >= 0 && span.tail + in_tail < width) {
      loose = span.tail + in_tail;
    }
    if (loose >= 0) loose_value = row[loose];
  }

  // The first pass: global memory to shared memory, kUnroll loads ahead. Calls one(element) and
  // many(pack).
  template <int kUnroll, class One, class Many>
  RLHF_FAST_DEVICE void load(One one, Many many) {
    if (loose >= 0) one(loose_value);
    int64_t i = threadIdx.x;
    for (; i + (kUnroll - 1) * kBlock < count; i += kUnroll * kBlock) {
      Pack<T> packs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        packs[u].raw = load_streaming(body + (first + i + u * kBlock) * kSize);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        kept[i + u * kBlock].raw = packs[u].raw;
        many(packs[u]);
      }
    }
    for (; i < count; i += kBlock) {
      Pack<T> pack;
      pack.raw = load_streaming(body + (first + i) * kSize);
      kept[i].raw = pack.raw;
      many(pack);
    }
  }

  // A pass over two rows that were cut alike: visit(x, y) with one or with a pack's elements that
  // this thread loaded of both.
  template <class Visit>
  RLHF_FAST_DEVICE void walk_with(const ResidentSlice& other, Visit visit) const {
    if (loose >= 0) {
      const float x[1] = {to_float(loose_value)}, y[1] = {to_float(other.loose_value)};
      visit(x, y);
    }
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kBlock) {
      Pack<T> mine, theirs;
      mine.raw = kept[i].raw;
      theirs.raw = other.kept[i].raw;
      float x[kSize], y[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        x[k] = to_float(mine.item[k]), y[k] = to_float(theirs.item[k]);
      visit(x, y);
    }
  }

  // The second pass: every thread rewrites what it loaded.
  template <class Formula>
  RLHF_FAST_DEVICE void rewrite(Formula formula) {
    if (loose >= 0) from_float(row[loose], formula(to_float(loose_value)));
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kBlock) {
      Pack<T> in, out;
      in.raw = kept[i].raw;
#pragma unroll
      for (int k = 0; k < kSize; ++k) from_float(out.item[k], formula(to_float(in.item[k])));
      store_streaming(body + (first + i) * kSize, out.raw);
    }
  }

  // The same from two rows that were cut alike: this one becomes formula(its own, the other's).
  template <class Formula>
  RLHF_FAST_DEVICE void rewrite_with(const ResidentSlice& other, Formula formula) {
    if (loose >= 0) {
      from_float(row[loose], formula(to_float(loose_value), to_float(other.loose_value)));
    }
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < count; i += kBlock) {
      Pack<T> mine, theirs, out;
      mine.raw = kept[i].raw;
      theirs.raw = other.kept[i].raw;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        from_float(out.item[k], formula(to_float(mine.item[k]), to_float(theirs.item[k])));
      }
      store_streaming(body + (first + i) * kSize, out.raw);
    }
  }

  // Whether this block rewrites element j of the row.
  RLHF_FAST_DEVICE bool owns(int64_t j, int cluster) const {
    const int64_t rank = cluster_rank(), pack = j - (body - row);
    if (pack < 0) return rank == 0;
    if (pack / kSize >= first && pack / kSize < first + count) return true;
    const int64_t in_packs = (first + count) * kSize;  // of the last block: where the tail begins
    return rank == cluster - 1 && pack >= in_packs;
  }
};

// Combines one state per block over the cluster, in order of rank; every thread gets the result.
template <class State, class Merge>
RLHF_FAST_DEVICE State reduce_cluster(const State& own, int cluster, unsigned char* shared,
                                      Merge merge) {
  constexpr int kWords = sizeof(State) / sizeof(float);
  static_assert(sizeof(State) <= kExchangeBytes, "the exchange area holds one state");
  float* exchange = reinterpret_cast<float*>(shared);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) exchange[w] = own[w];
  }
  cluster_sync();
  State total;
#pragma unroll
  for (int w = 0; w < kWords; ++w) total[w] = load_from_block(exchange + w, 0);
  for (int rank = 1; rank < cluster; ++rank) {
    State other;
#pragma unroll
    for (int w = 0; w < kWords; ++w) other[w] = load_from_block(exchange + w, rank);
    total = merge(total, other);
  }
  cluster_sync();  // no block may end, or write there again, while others still read
  return total;
}

// Shared memory for one block's slice of a row.
RLHF_FAST_HD int64_t slice_bytes(int64_t row_bytes, int cluster) {
  return (row_bytes / 16 / cluster + 1) * 16;
}

// The launch of a kernel that keeps rows of `row_bytes` on the chip, num_rows of them at a time:
// the smallest cluster whose slices let several blocks share a multiprocessor, so that one loads
// while another computes. Cluster 0: it cannot be.
template <class... Params>
Shape shape_of_resident_rows(void (*kernel)(Params...), int64_t row_bytes, int num_rows,
                             int device) {
  const KernelLimits limits(kernel, device);
  constexpr int64_t kPreferred = 72 << 10;
  const int largest = limits.has_clusters ? 8 : 1;  // 8 blocks are what every such GPU supports
  int cluster = 1;
  auto shared_bytes = [&] {
    return int64_t(kExchangeBytes) + num_rows * slice_bytes(row_bytes, cluster);
  };
  while (cluster < largest && shared_bytes() > kPreferred) cluster *= 2;
  if (shared_bytes() > limits.dynamic_bytes) return {0};
  return {cluster, static_cast<int>(shared_bytes()), limits.dynamic_bytes};
}

}  // namespace rlhf_fast::gpu
