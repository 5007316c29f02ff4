// The recurrence of generalised advantage estimation, arXiv 1506.02438, equations 11 and 16,
// written once for CUDA threads and CPU code.
#pragma once

#include "host_device.h"

namespace rlhf_fast {

// What a token hands to the one before it.
struct GaeState {
  float next_value, advantage;
};

// One token, or several in a row, as an affine map of the state. Such maps compose, so a long
// sequence can be cut into pieces that are summed up in parallel:
//   next_value' = carry * next_value + value
//   advantage'  = from_value * next_value + decay * advantage + gain
struct GaeStep {
  float carry, value, from_value, decay, gain;

  RLHF_FAST_HD float& operator[](int i) { return (&carry)[i]; }

  RLHF_FAST_HD GaeState operator()(const GaeState& s) const {
    return {carry * s.next_value + value, (from_value * s.next_value + gain) + decay * s.advantage};
  }
};
constexpr int kGaeStepFields = 5;

struct GaeFormula {
  float gamma;
  float decay;       // gamma * lambda
  bool skip_masked;  // a masked token passes the state on; else it is a step without reward

  RLHF_FAST_HD GaeStep identity() const { return {1.0f, 0.0f, 0.0f, 1.0f, 0.0f}; }
  RLHF_FAST_HD GaeStep token(float reward, float value) const {
    return {0.0f, value, gamma, decay, reward - value};
  }
  RLHF_FAST_HD GaeStep masked_token() const { return skip_masked ? identity() : token(0.0f, 0.0f); }
};

// `first`, then `second`.
RLHF_FAST_HD GaeStep then(const GaeStep& first, const GaeStep& second) {
  return {second.carry * first.carry, second.carry * first.value + second.value,
          second.from_value * first.carry + second.decay * first.from_value,
          second.decay * first.decay,
          second.from_value * first.value + (second.decay * first.gain + second.gain)};
}

}  // namespace rlhf_fast
