// What this machine can do at best: bytes read, bytes read and written in place, exponentials.
// Compiled by benchmarks/floors.py for the processor at hand.
#include <cstdint>
#include <thread>
#include <vector>

template <class Body>
static void on_threads(int64_t count, int threads, Body body) {
  std::vector<std::thread> others;
  const int64_t part = count / threads;
  for (int t = 1; t < threads; ++t) others.emplace_back([=] { body(t * part, (t + 1) * part); });
  body(0, part);
  for (auto& thread : others) thread.join();
}

extern "C" float read_floats(const float* x, int64_t count, int threads) {
  volatile float sink = 0.0f;
  on_threads(count, threads, [&](int64_t begin, int64_t end) {
    float sum = 0.0f;
    for (int64_t i = begin; i < end; ++i) sum += x[i];
    sink = sum;
  });
  return sink;
}

extern "C" void update_floats(float* x, int64_t count, int threads) {
  on_threads(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) x[i] = 1.0f - x[i];
  });
}

// Sums 2^x over a buffer that stays in the first-level cache; x in [-16, 0].
extern "C" float exponentials(int64_t count, int threads) {
  volatile float sink = 0.0f;
  on_threads(count, threads, [&](int64_t begin, int64_t end) {
    float buffer[4096];
    for (int i = 0; i < 4096; ++i) buffer[i] = -0.0039f * float(i);
    float sum = 0.0f;
    for (int64_t done = begin; done < end; done += 4096) {
      for (int i = 0; i < 4096; ++i) {
        const float x = buffer[i], n = __builtin_rintf(x), f = x - n;
        float p = 1.32647261e-3f * f + 9.67151299e-3f;
        p = p * f + 5.55073358e-2f;
        p = p * f + 2.40222424e-1f;
        p = p * f + 6.93147004e-1f;
        p = p * f + 1.0f;
        union {
          int32_t bits;
          float value;
        } power;
        power.bits = (int32_t(n) + 127) << 23;
        sum += p * power.value;
      }
      buffer[done & 4095] = sum * 0.0f;  // so that the loop is not computed once for all
    }
    sink = sum;
  });
  return sink;
}
