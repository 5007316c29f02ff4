// Host side: device guard, dtype dispatch, launches whose errors become exceptions.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "portable.cuh"

namespace rlhf_fast::gpu {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(int(error)) + " (" +
                           cudaGetErrorString(error) + ")");
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Blocks of a launch that belong together, and their dynamic shared memory.
struct Shape {
  int cluster = 1;
  size_t shared_bytes = 0;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, CudaTarget target, Shape shape,
            Args... args) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::invalid_argument("more than 2^31 - 1 blocks in one call");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(target.stream);
  config.dynamicSmemBytes = shape.shared_bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  if (shape.shared_bytes > 0) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "shared memory of a kernel");
  }
  check(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, CudaTarget target,
            Args... args) {
  launch(kernel, blocks, threads, target, Shape{}, args...);
}

// Calls body with a null pointer of the element type.
template <class Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(static_cast<float*>(nullptr));
    case DType::kFloat16: return body(static_cast<Float16*>(nullptr));
    case DType::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
  }
}

// Turns a run-time truth into a template argument: body(std::true_type or std::false_type).
template <class Body>
void dispatch_bool(bool value, Body&& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

}  // namespace rlhf_fast::gpu
