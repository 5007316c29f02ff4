// The GPU that is emulated: what its blocks may have, and how far off its fast functions are.
//
// RLHF_FAST_EMULATION_GPU=86 makes it one of compute capability 8.6; 90:80 is one of 9.0 that runs
// code made for 8.0, as the driver compiles it from PTX. Without it: 9.0.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

struct Gpu {
  int capability = 90, code = 90;

  Gpu() {
    const char* chosen = std::getenv("RLHF_FAST_EMULATION_GPU");
    if (!chosen) return;
    if (std::sscanf(chosen, "%d:%d", &capability, &code) == 1) code = capability;
  }
  bool has_clusters() const { return capability >= 90; }
  // For static and dynamic shared memory of a block together.
  size_t max_shared_bytes() const {
    switch (capability) {
      case 80:
      case 87: return 163 * 1024;
      case 86:
      case 89:
      case 120:
      case 121: return 99 * 1024;
      default: return 227 * 1024;
    }
  }
};

// y with an error of up to `bound` that depends on x alone and looks like chance.
inline float with_error(float y, float x, float bound) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits *= 0x9e3779b1u;
  bits ^= bits >> 15;
  bits *= 0x85ebca77u;
  bits ^= bits >> 13;
  return float(double(y) + double(int32_t(bits)) * 0x1p-31 * double(bound));
}
inline float without_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f * x : x; }

// As wrong as ex2.approx.ftz.f32 and lg2.approx.ftz.f32 may be: CUDA's expf, good to an ulp, is
// made of the former; the manual gives the latter an absolute error near 1. Both are exact where
// the exponent is whole.
inline float approximate_exp2(float x) {
  const float y = ::exp2f(without_subnormal(x));
  const bool exact = !(std::fabs(x) < 0x1p23f) || std::floor(x) == x;
  return without_subnormal(exact ? y : with_error(y, x, 0x1p-23f * y));
}
inline float approximate_log2(float x) {
  const float y = ::log2f(without_subnormal(x));
  const bool exact = !std::isfinite(y) || std::floor(y) == y;
  return exact ? y : with_error(y, x, 0x1p-22f * std::fmax(1.0f, std::fabs(y)));
}

}  // namespace emulation
