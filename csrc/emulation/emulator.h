// Runs CUDA kernels on the CPU, one fiber per CUDA thread. A block, or a cluster of blocks, lives
// on one OS thread; several OS threads take blocks in parallel.
//
// It is stricter than a GPU: shared memory starts as NaN, and divergent barriers, warp collectives
// whose lanes disagree, shuffles from lanes that take no part, and deadlocks end the program with a
// message. Under ThreadSanitizer every CUDA thread is a thread of its own, so a missing barrier is
// reported as a data race; under AddressSanitizer shared memory has exact bounds.
//
// RLHF_FAST_EMULATION_ORDER=reverse|shuffled changes the order in which warps run.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "block.h"

namespace emulation {

EMULATION_SWITCHES inline void fiber_main() {
  arrive(worker->scheduler);
  Fiber* f = worker->current;
  acquire(f->block->cluster);
  (*worker->kernel)();
  f = worker->current;
  release(f->block->cluster);
  {
    const Unwatched unwatched;
    ++worker->progress;
    f->done = true;
    Block& block = *f->block;
    block.warps[f->warp].alive &= ~(1u << f->lane);
    // A thread that has returned no longer counts at a barrier.
    for (Barrier* barrier : {&block.barrier, &block.cluster->barrier}) {
      if (--barrier->expected && barrier->arrived == barrier->expected) open_barrier(*barrier);
    }
  }
  switch_context(f->context, worker->scheduler, /*from_ends=*/true);
  std::abort();
}

inline unsigned volume(dim3 d) { return d.x * d.y * d.z; }

inline void start_block(Block& block, Cluster& cluster, uint64_t index, size_t dynamic_bytes) {
  const dim3 shape = worker->block, grid = worker->grid;
  const unsigned num_threads = volume(shape);
  block.index = dim3(unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                     unsigned(index / grid.x / grid.y));
  block.cluster = &cluster;
  block.barrier.expected = num_threads;
  block.fibers = std::vector<Fiber>(num_threads);
  block.warps = std::vector<Warp>((num_threads + 31) / 32);
  block.dynamic_shared = static_cast<unsigned char*>(poisoned(128, dynamic_bytes));
  for (unsigned t = 0; t < num_threads; ++t) {
    Fiber& f = block.fibers[t];
    f.thread_index = dim3(t % shape.x, t / shape.x % shape.y, t / shape.x / shape.y);
    f.lane = t % 32;
    f.warp = t / 32;
    f.block = &block;
    block.warps[f.warp].alive |= 1u << f.lane;
    const unsigned slot = block.rank * num_threads + t;
    while (worker->stacks.size() <= slot) {
      worker->stacks.push_back(static_cast<char*>(std::aligned_alloc(4096, kStackBytes)));
    }
    // Tops at different offsets, or all fibers would fight for the same cache sets.
    f.context.prepare(worker->stacks[slot], slot * 320 % 20480, fiber_main);
  }
}

enum class Order { kForward, kReverse, kShuffled };
inline Order order() {
  static const Order chosen = [] {
    const char* s = std::getenv("RLHF_FAST_EMULATION_ORDER");
    if (s && !std::strcmp(s, "reverse")) return Order::kReverse;
    if (s && !std::strcmp(s, "shuffled")) return Order::kShuffled;
    return Order::kForward;
  }();
  return chosen;
}

// Runs every lane of a warp until all of them wait or have returned; gives how many returned.
inline unsigned run_warp(Block& block, unsigned warp) {
  const unsigned begin = warp * 32;
  const unsigned end = std::min<unsigned>(begin + 32, unsigned(block.fibers.size()));
  unsigned finished = 0;
  for (uint64_t before = worker->progress - 1; before != worker->progress;) {
    before = worker->progress;
    for (unsigned i = begin; i < end; ++i) {
      Fiber& f = block.fibers[order() == Order::kReverse ? end - 1 - (i - begin) : i];
      if (f.done || f.waiting) continue;
      worker->current = &f;
      switch_context(worker->scheduler, f.context);
      worker->current = nullptr;
      finished += f.done;
    }
  }
  return finished;
}

inline void run_cluster(unsigned cluster_size, uint64_t first_block, size_t dynamic_bytes) {
  const Unwatched unwatched;
  Cluster cluster;
  cluster.blocks = std::vector<Block>(cluster_size);
  cluster.dynamic_bytes = dynamic_bytes;
  for (unsigned rank = 0; rank < cluster_size; ++rank) {
    cluster.blocks[rank].rank = rank;
    start_block(cluster.blocks[rank], cluster, first_block + rank, dynamic_bytes);
  }
  unsigned left = cluster_size * volume(worker->block);
  cluster.barrier.expected = left;
  release(&cluster);

  const unsigned warps_per_block = unsigned(cluster.blocks[0].warps.size());
  std::vector<unsigned> turns(cluster_size * warps_per_block);
  for (unsigned i = 0; i < turns.size(); ++i) turns[i] = i;
  if (order() == Order::kReverse) std::reverse(turns.begin(), turns.end());
  uint64_t random = 0x9e3779b97f4a7c15u + first_block;
  while (left) {
    if (order() == Order::kShuffled) {
      for (size_t i = turns.size(); i > 1; --i) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::swap(turns[i - 1], turns[random % i]);
      }
    }
    const uint64_t before = worker->progress;
    for (unsigned turn : turns) {
      left -= run_warp(cluster.blocks[turn / warps_per_block], turn % warps_per_block);
    }
    if (left && worker->progress == before) {
      for (Block& block : cluster.blocks) {
        for (Fiber& f : block.fibers) {
          if (f.done) continue;
          worker->current = &f;
          fail("deadlock: %u threads left, one waits in %s", left, f.where);
        }
      }
    }
  }
  acquire(&cluster);
  for (Block& block : cluster.blocks) {
    release_memory(block.dynamic_shared, dynamic_bytes);
    for (auto& entry : block.static_shared) release_memory(entry.second, 0);
#if EMULATION_TSAN
    for (Fiber& f : block.fibers) __tsan_destroy_fiber(f.context.tsan);
#endif
  }
}

}  // namespace emulation

// Kernels launched so far; tests read it from the module by this name.
extern "C" {
inline __attribute__((visibility("default"), used)) std::atomic<int64_t> emulated_launches{0};
}

namespace emulation {

inline void launch(dim3 grid, dim3 block, unsigned cluster_size, size_t dynamic_bytes,
                   const std::function<void()>& kernel) {
  ++emulated_launches;
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster_size;
  std::atomic<uint64_t> next{0};
  auto work = [&] {
    Worker self;
    self.kernel = &kernel;
    self.grid = grid;
    self.block = block;
#if EMULATION_TSAN
    self.scheduler.tsan = __tsan_get_current_fiber();
#endif
    worker = &self;
    for (uint64_t i; (i = next.fetch_add(1)) < clusters;) {
      run_cluster(cluster_size, i * cluster_size, dynamic_bytes);
    }
    worker = nullptr;
  };
#if EMULATION_ASAN || EMULATION_TSAN
  const unsigned num_workers = 1;
#else
  const unsigned num_workers =
      unsigned(std::min<uint64_t>(clusters, std::max(1u, std::thread::hardware_concurrency())));
#endif
  std::vector<std::thread> others;
  for (unsigned i = 1; i < num_workers; ++i) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
}

}  // namespace emulation
