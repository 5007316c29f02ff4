// A block of CUDA threads on the CPU: what its threads share, and the calls in which they wait for
// one another. Misuse that a GPU answers with wrong numbers or a hang ends the program here.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <vector>

#include "fiber.h"
#include "gpu.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

struct Block;

struct Fiber {
  Context context;
  dim3 thread_index;
  unsigned lane = 0, warp = 0;
  Block* block = nullptr;
  bool done = false;
  bool waiting = false;
  const char* where = "";  // the call it waits in
};

enum class Collective { kNone, kShuffle, kBallot, kSyncWarp };
inline const char* name_of(Collective c) {
  switch (c) {
    case Collective::kShuffle: return "a shuffle";
    case Collective::kBallot: return "a ballot";
    case Collective::kSyncWarp: return "__syncwarp";
    case Collective::kNone: break;
  }
  return "nothing";
}

struct Warp {
  struct Lane {
    Fiber* fiber = nullptr;
    Collective kind = Collective::kNone;
    uint32_t mask = 0;
    uint64_t in = 0, out = 0;
    int source = 0;
  };
  Lane lanes[32];
  uint32_t arrived = 0, alive = 0;
};

struct Barrier {
  unsigned expected = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  const char* file = nullptr;
  int line = 0;
};

struct Cluster;

struct Block {
  dim3 index;
  unsigned rank = 0;  // in its cluster
  Cluster* cluster = nullptr;
  Barrier barrier;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* dynamic_shared = nullptr;
  std::vector<std::pair<const void*, void*>> static_shared;  // by declaration
  size_t static_bytes = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  size_t dynamic_bytes = 0;
};

// Stacks outlive launches: mapping them anew each time would cost more than the kernels.
class StackPool {
 public:
  static std::vector<char*> take() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (pool().empty()) return {};
    auto stacks = std::move(pool().back());
    pool().pop_back();
    return stacks;
  }
  static void give(std::vector<char*> stacks) {
    const std::lock_guard<std::mutex> lock(mutex());
    pool().push_back(std::move(stacks));
  }

 private:
  static std::mutex& mutex() {
    static auto* m = new std::mutex;
    return *m;
  }
  static std::vector<std::vector<char*>>& pool() {
    static auto* p = new std::vector<std::vector<char*>>;
    return *p;
  }
};

// What one OS thread runs.
struct Worker {
  Context scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  dim3 grid, block;
  uint64_t progress = 0;  // counts whatever lets another fiber go on
  std::vector<char*> stacks = StackPool::take();

  ~Worker() { StackPool::give(std::move(stacks)); }
};
inline thread_local Worker* worker = nullptr;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::fprintf(stderr, "CUDA emulation: ");
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  if (worker && worker->current) {
    const Fiber& f = *worker->current;
    std::fprintf(stderr, " [block (%u,%u,%u), thread (%u,%u,%u)]", f.block->index.x,
                 f.block->index.y, f.block->index.z, f.thread_index.x, f.thread_index.y,
                 f.thread_index.z);
  }
  std::fprintf(stderr, "\n");
  std::abort();
}
inline void require(bool condition, const char* what) {
  if (!condition) fail("%s", what);
}

// ---- waiting

inline void wait_here(Fiber* f) {
  f->waiting = true;
  while (f->waiting) switch_context(f->context, worker->scheduler);
}

inline void open_barrier(Barrier& barrier) {
  ++worker->progress;
  barrier.arrived = 0;
  barrier.file = nullptr;
  for (Fiber* f : barrier.waiting) f->waiting = false;
  barrier.waiting.clear();
}

inline void arrive_and_wait(Barrier& barrier, const char* what, const char* file, int line) {
  const Unwatched unwatched;
  Fiber* f = worker->current;
  f->where = what;
  if (barrier.file && (barrier.line != line || std::strcmp(barrier.file, file) != 0)) {
    fail("divergent %s: some threads wait at %s:%d, this one at %s:%d", what, barrier.file,
         barrier.line, file, line);
  }
  barrier.file = file;
  barrier.line = line;
  release(&barrier);
  if (++barrier.arrived == barrier.expected) {
    open_barrier(barrier);
  } else {
    barrier.waiting.push_back(f);
    wait_here(f);
  }
  acquire(&barrier);
}

inline void sync_block(const char* file, int line) {
  arrive_and_wait(worker->current->block->barrier, "__syncthreads", file, line);
}
inline void sync_cluster() {
  arrive_and_wait(worker->current->block->cluster->barrier, "cluster barrier", "", 0);
}

// All lanes of `mask` meet here; each gets the ballot, or what its source lane brought.
inline uint64_t meet(uint32_t mask, Collective kind, uint64_t in, int source) {
  const Unwatched unwatched;
  Fiber* f = worker->current;
  f->where = name_of(kind);
  Warp& warp = f->block->warps[f->warp];
  const unsigned self = f->lane;
  if (!(mask >> self & 1))
    fail("lane %u calls %s whose mask %08x leaves it out", self, f->where, mask);
  if (mask & ~warp.alive) fail("%s names lanes that have returned: mask %08x", f->where, mask);
  warp.lanes[self] = {f, kind, mask, in, 0, source};
  warp.arrived |= 1u << self;
  if (kind == Collective::kSyncWarp) release(&warp);  // shuffles and ballots order no memory
  if ((warp.arrived & mask) != mask) {
    wait_here(f);
  } else {
    ++worker->progress;
    uint32_t ballot = 0;
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      const Warp::Lane& lane = warp.lanes[i];
      if (lane.mask != mask) fail("lanes meet with masks %08x and %08x", lane.mask, mask);
      if (lane.kind != kind) fail("lanes meet in %s and in %s", name_of(lane.kind), name_of(kind));
      ballot |= uint32_t(lane.in != 0) << i;
    }
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Warp::Lane& lane = warp.lanes[i];
      if (kind == Collective::kShuffle) {
        if (!(mask >> lane.source & 1)) fail("shuffle from lane %d outside its mask", lane.source);
        lane.out = warp.lanes[lane.source].in;
      } else {
        lane.out = ballot;
      }
      lane.fiber->waiting = false;
    }
    warp.arrived &= ~mask;
  }
  if (kind == Collective::kSyncWarp) acquire(&warp);
  return warp.lanes[self].out;
}

template <class T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(mask, Collective::kShuffle, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- shared memory

inline void* poisoned(size_t alignment, size_t bytes) {
  void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  std::memset(p, 0xff, bytes);
#if EMULATION_ASAN
  const size_t padded = (bytes + alignment - 1) / alignment * alignment;
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(p) + bytes, padded - bytes);
#endif
  return p;
}
inline void release_memory(void* p, [[maybe_unused]] size_t bytes) {
#if EMULATION_ASAN
  ASAN_UNPOISON_MEMORY_REGION(p, (bytes + 127) / 128 * 128);
#endif
  std::free(p);
}

inline void* static_shared(const void* declaration, size_t bytes) {
  const Unwatched unwatched;
  Block& block = *worker->current->block;
  for (auto& entry : block.static_shared) {
    if (entry.first == declaration) return entry.second;
  }
  block.static_bytes += bytes;
  require(block.static_bytes + block.cluster->dynamic_bytes <= Gpu().max_shared_bytes(),
          "more shared memory than a block of this GPU may have");
  block.static_shared.emplace_back(declaration, poisoned(16, bytes));
  return block.static_shared.back().second;
}
inline void* dynamic_shared() { return worker->current->block->dynamic_shared; }

inline unsigned cluster_rank() { return worker->current->block->rank; }
inline unsigned cluster_size() {
  return static_cast<unsigned>(worker->current->block->cluster->blocks.size());
}
// The address in another block of the cluster that corresponds to p in this one.
inline void* cluster_address(void* p, unsigned rank) {
  const Unwatched unwatched;
  Block& own = *worker->current->block;
  const auto offset = static_cast<size_t>(static_cast<unsigned char*>(p) - own.dynamic_shared);
  require(offset < own.cluster->dynamic_bytes, "cluster address outside dynamic shared memory");
  require(rank < own.cluster->blocks.size(), "no such block in the cluster");
  return own.cluster->blocks[rank].dynamic_shared + offset;
}

}  // namespace emulation
