// Threads for the CPU kernels, without a second OpenMP runtime in the process: if one is loaded
// already (importing torch loads it), its workers are used; otherwise threads are started per call.
#pragma once

#include <cstdint>

namespace rlhf_fast {

// Calls body(data, begin, end) over pieces of [0, count). Which thread takes which piece is left to
// chance, so a body must not let its result depend on it.
void run_pieces(int64_t count, int64_t piece, int num_threads,
                void (*body)(const void* data, int64_t begin, int64_t end), const void* data);

template <class Body>
inline void parallel_for(int64_t count, int64_t piece, int num_threads, const Body& body) {
  run_pieces(
      count, piece, num_threads,
      [](const void* data, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(data))(begin, end);
      },
      &body);
}

}  // namespace rlhf_fast
