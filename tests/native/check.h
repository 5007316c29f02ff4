// What the stand-alone checks share: comparisons that count failures, and numbers as raw bytes of a
// dtype. The programs are meant to be built with sanitizers: they have no Python, so a report is
// about the kernels alone, and every buffer ends where its data ends.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "rlhf_fast/common.h"

namespace rlhf_fast::checks {

namespace {  // each check counts its own failures

[[maybe_unused]] int comparisons = 0, failures = 0;

// `where` tells which of many: a size, a position, a loss.
inline void expect_near(double got, double want, double tolerance, const char* what,
                        int64_t where) {
  ++comparisons;
  if (std::fabs(got - want) <= tolerance) return;
  std::printf("%s (%ld): got %.9g, want %.9g\n", what, long(where), got, want);
  ++failures;
}

// float values that both 16-bit types hold exactly
inline float coarse(float x) { return std::round(x * 8.0f) / 8.0f; }

inline std::vector<unsigned char> packed(const std::vector<float>& x, DType dtype) {
  std::vector<unsigned char> bytes(x.size() * (dtype == DType::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x[i], 4);
    const uint16_t bfloat = uint16_t(bits >> 16);
    const _Float16 half = static_cast<_Float16>(x[i]);
    if (dtype == DType::kFloat32) std::memcpy(&bytes[4 * i], &bits, 4);
    if (dtype == DType::kFloat16) std::memcpy(&bytes[2 * i], &half, 2);
    if (dtype == DType::kBFloat16) std::memcpy(&bytes[2 * i], &bfloat, 2);
  }
  return bytes;
}

inline std::vector<float> unpacked(const std::vector<unsigned char>& bytes, DType dtype) {
  std::vector<float> x(bytes.size() / (dtype == DType::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < x.size(); ++i) {
    uint16_t bits16 = 0;
    if (dtype != DType::kFloat32) std::memcpy(&bits16, &bytes[2 * i], 2);
    const uint32_t bits = uint32_t(bits16) << 16;
    _Float16 half;
    std::memcpy(&half, &bits16, 2);
    if (dtype == DType::kFloat32) std::memcpy(&x[i], &bytes[4 * i], 4);
    if (dtype == DType::kFloat16) x[i] = static_cast<float>(half);
    if (dtype == DType::kBFloat16) std::memcpy(&x[i], &bits, 4);
  }
  return x;
}

// Prints what a check found; its exit status.
inline int report(const char* stem) {
  const bool ok = comparisons > 0 && failures == 0;
  std::printf("%s %s: %d comparisons, %d failures\n", stem, ok ? "ok" : "FAILED", comparisons,
              failures);
  return !ok;
}

}  // namespace
}  // namespace rlhf_fast::checks
