#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

// Weak: resolved to the OpenMP runtime that is in the process when this library is loaded, if any.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data,
                                                    unsigned num_threads, unsigned flags);

namespace rlhf_fast {

void run_pieces(int64_t count, int64_t piece, int num_threads,
                void (*body)(const void* data, int64_t begin, int64_t end), const void* data) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) {
      body(data, begin, std::min(begin + piece, count));
    }
  };
  const int64_t num_pieces = (count + piece - 1) / piece;
  num_threads = static_cast<int>(std::min<int64_t>(num_threads, num_pieces));
  if (num_threads <= 1) {
    work();
  } else if (GOMP_parallel) {
    GOMP_parallel([](void* p) { (*static_cast<decltype(work)*>(p))(); }, &work,
                  static_cast<unsigned>(num_threads), 0);
  } else {
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads; ++i) threads.emplace_back(work);
    work();
    for (auto& thread : threads) thread.join();
  }
}

}  // namespace rlhf_fast
