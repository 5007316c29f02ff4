// What every module of bindings shares. Each stem adds its functions with bind_<stem>().
#pragma once

#include <pybind11/pybind11.h>

#include "rlhf_fast/common.h"

namespace rlhf_fast {

// Where to run: the CPU module takes (threads, 0), the CUDA module (device, stream).
#if defined(RLHF_FAST_BIND_CUDA)
inline CudaTarget run_on(int device, std::uintptr_t stream) { return {device, stream}; }
#define RLHF_FAST_BIND(stem) stem##_cuda
#else
inline int run_on(int num_threads, std::uintptr_t) { return num_threads; }
#define RLHF_FAST_BIND(stem) stem##_cpu
#endif

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, rows, width, inner, outer stride, inner stride), as ops/native.py builds it
inline Rows rows_from(const pybind11::tuple& t) {
  return {pointer<void>(t[0].cast<std::uintptr_t>()),
          static_cast<DType>(t[1].cast<int>()),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<int64_t>(),
          t[6].cast<int64_t>()};
}

// (count, length, total, address of the offsets), as ops/sequences.py builds it
inline Sequences sequences_from(const pybind11::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          pointer<const int64_t>(t[3].cast<std::uintptr_t>())};
}

// (denominator, mean over tokens, scale, addresses of the normaliser and of the sequences'
// weights), as ops/aggregation.py builds it
inline Aggregation aggregation_from(const pybind11::tuple& t) {
  return {static_cast<Denominator>(t[0].cast<int>()), t[1].cast<bool>(), t[2].cast<float>(),
          pointer<const float>(t[3].cast<std::uintptr_t>()),
          pointer<const float>(t[4].cast<std::uintptr_t>())};
}

// (address, stride), as ops/native.py builds it
inline Column column_from(const pybind11::handle& t) {
  const auto [address, stride] = t.cast<std::pair<std::uintptr_t, int64_t>>();
  return {pointer<const float>(address), stride};
}

void bind_gae(pybind11::module_& m);
void bind_group_advantages(pybind11::module_& m);
void bind_kl(pybind11::module_& m);
void bind_list_loss(pybind11::module_& m);
void bind_logps(pybind11::module_& m);
void bind_policy_loss(pybind11::module_& m);
void bind_preference_loss(pybind11::module_& m);
void bind_reward_model_loss(pybind11::module_& m);
void bind_segment_sum(pybind11::module_& m);
void bind_token_preference_loss(pybind11::module_& m);
void bind_value_loss(pybind11::module_& m);
void bind_whiten(pybind11::module_& m);

}  // namespace rlhf_fast
