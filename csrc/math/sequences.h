// Where a sequence's tokens lie.
#pragma once

#include "host_device.h"
#include "rlhf_fast/common.h"

namespace rlhf_fast {

struct Span {
  int64_t begin, end;
};

// Kept inside the tokens whatever the offsets say, which CUDA kernels cannot check beforehand.
RLHF_FAST_HD Span span_of(const Sequences& sequences, int64_t s) {
  if (!sequences.offsets) return {s * sequences.length, (s + 1) * sequences.length};
  int64_t begin = sequences.offsets[s], end = sequences.offsets[s + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > sequences.total ? sequences.total : end;
  return {begin, end < begin ? begin : end};
}

}  // namespace rlhf_fast
