// What this machine can do at best: bytes read, bytes read and written in place, exponentials.
// Compiled by benchmarks/floors.py for the processor at hand.
#include <cstdint>
#include <thread>
#include <vector>

#include "../csrc/cpu/exponential.h"

using rlhf_fast::Exponential;
using namespace rlhf_fast::RLHF_FAST_ISA;

constexpr int kUnroll = 4, kStep = kUnroll * Vec::kWidth;

template <class Body>
static void on_threads(int64_t count, int threads, Body body) {
  std::vector<std::thread> others;
  const int64_t part = count / threads;
  for (int t = 1; t < threads; ++t) others.emplace_back([=] { body(t * part, (t + 1) * part); });
  body(0, part);
  for (auto& thread : others) thread.join();
}

static float total(const Vec (&sums)[kUnroll]) {
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

extern "C" float read_floats(const float* x, int64_t count, int threads) {
  volatile float sink = 0.0f;
  on_threads(count, threads, [&](int64_t begin, int64_t end) {
    Vec sums[kUnroll] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    for (int64_t i = begin; i + kStep <= end; i += kStep) {
      prefetch<kStep>(x + i);
      for (int k = 0; k < kUnroll; ++k) sums[k] = sums[k] + load(x + i + k * Vec::kWidth);
    }
    sink = total(sums);
  });
  return sink;
}

extern "C" void update_floats(float* x, int64_t count, int threads) {
  on_threads(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i + kStep <= end; i += kStep) {
      prefetch<kStep>(x + i);
      for (int k = 0; k < kUnroll; ++k) {
        float* p = x + i + k * Vec::kWidth;
        store(p, Vec(1.0f) - load(static_cast<const float*>(p)));
      }
    }
  });
}

// Sums 2^x over numbers that stay in the first-level cache, by the exponential of the kernels.
extern "C" float exponentials(int64_t count, int threads) {
  volatile float sink = 0.0f;
  on_threads(count, threads, [&](int64_t begin, int64_t end) {
    constexpr int kCached = 4096;
    float x[kCached];
    for (int i = 0; i < kCached; ++i) x[i] = -0.0039f * float(i);
    const Exponential<Vec, false> power(0.0f, 1.0f, 0.0f, 1.0f);
    Vec sums[kUnroll] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    for (int64_t done = begin; done + kCached <= end; done += kCached) {
      for (int i = 0; i < kCached; i += kStep) {
        for (int k = 0; k < kUnroll; ++k) {
          const Vec v = load(static_cast<const float*>(x + i + k * Vec::kWidth));
          sums[k] = power.add_to(sums[k], power.distance(v));
        }
      }
    }
    sink = total(sums);
  });
  return sink;
}
