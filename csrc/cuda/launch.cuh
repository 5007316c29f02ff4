// Host side: device, dtype dispatch, launches whose errors become exceptions.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "portable.cuh"

namespace rlhf_fast::gpu {

#if !defined(RLHF_FAST_ARCHS)
#define RLHF_FAST_ARCHS "another machine"  // an emulated build
#endif

inline const char* advice_on(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "; update the GPU's driver, or build with the CUDA toolkit that torch was built with";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "; this build is for " RLHF_FAST_ARCHS
             ": install again with RLHF_FAST_CUDA_ARCHS=native";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
      return "; an earlier kernel has failed, of this package or another: CUDA_LAUNCH_BLOCKING=1 "
             "shows which";
    default: return "";
  }
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("rlhf_fast: a CUDA kernel must start, got CUDA error " +
                           std::to_string(int(error)) + " (" + cudaGetErrorString(error) + ")" +
                           advice_on(error));
}

// Makes the device the calling thread's, and leaves it so: who calls goes back (ops/native.py), as
// going back to a device without a context would start one there, of some hundred MB.
inline void use_device(CudaTarget target) {
  int current = 0;
  check(cudaGetDevice(&current));
  if (current != target.device) check(cudaSetDevice(target.device));
}

// What a launch of a kernel may ask for.
struct KernelLimits {
  int dynamic_bytes = 0;  // of shared memory, beside what the kernel declares
  bool has_clusters = false;

  template <class... Params>
  KernelLimits(void (*kernel)(Params...), int device) {
    int block_bytes = 0, cluster_launch = 0;
    cudaFuncAttributes attributes{};
    check(cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaDeviceGetAttribute(&cluster_launch, cudaDevAttrClusterLaunch, device));
    check(cudaFuncGetAttributes(&attributes, kernel));
    dynamic_bytes = block_bytes - static_cast<int>(attributes.sharedSizeBytes);
    // A new GPU may run code that was compiled for an old one, and takes every block for the first.
    has_clusters = cluster_launch != 0 && attributes.ptxVersion >= 90;
  }
};

// Blocks of a launch that belong together, their dynamic shared memory, and how much of it could
// be.
struct Shape {
  int cluster = 1;
  int shared_bytes = 0;
  int most_shared_bytes = 0;
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
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  if (shape.shared_bytes > 0) {
    // Not what this launch needs: another thread may launch the kernel with longer rows meanwhile.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shape.most_shared_bytes));
  }
  check(cudaLaunchKernelEx(&config, kernel, args...));
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
