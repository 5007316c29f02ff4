// How sums become a map of the values, written once for CUDA threads and CPU code.
#pragma once

#include "host_device.h"
#include "rlhf_fast/whiten.h"

namespace rlhf_fast {

RLHF_FAST_HD int64_t num_chunks(const WhitenInputs& in) {
  return (in.count + kWhitenChunk - 1) / kWhitenChunk;
}

// x -> (x - mean) * scale + offset
struct Whitening {
  float mean, scale, offset;

  RLHF_FAST_HD Whitening(const WhitenOutputs& out) {
    const double count = out.statistics[0];
    const double average = count > 0.0 ? out.statistics[1] / count : 0.0;
    // One value has no variance to divide by: it becomes 0, as its distance from the mean is.
    const double freedom =
        out.unbiased ? (count > 1.0 ? count - 1.0 : 1.0) : (count > 0.0 ? count : 1.0);
    double variance = (out.statistics[2] - average * out.statistics[1]) / freedom;
    variance = variance < 0.0 ? 0.0 : variance;
    mean = float(average);
    scale = float(1.0 / sqrt(variance + out.epsilon));
    offset = out.shift_mean ? 0.0f : mean;
  }
  RLHF_FAST_HD float operator()(float x) const { return (x - mean) * scale + offset; }
};

}  // namespace rlhf_fast
