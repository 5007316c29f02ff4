// The part of CUDA's language and runtime that the kernels and launchers use, on the emulator.
#pragma once

#include <cmath>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};

// Objects, not macros: `config.gridDim` must keep its meaning.
namespace emulation {
inline const dim3& current_thread() { return worker->current->thread_index; }
inline const dim3& current_block() { return worker->current->block->index; }
inline const dim3& current_block_shape() { return worker->block; }
inline const dim3& current_grid() { return worker->grid; }
template <const dim3& (*get)()>
struct Index {
  struct {
    operator unsigned() const { return get().x; }
  } x;
  struct {
    operator unsigned() const { return get().y; }
  } y;
  struct {
    operator unsigned() const { return get().z; }
  } z;
};
}  // namespace emulation
constexpr emulation::Index<&emulation::current_thread> threadIdx{};
constexpr emulation::Index<&emulation::current_block> blockIdx{};
constexpr emulation::Index<&emulation::current_block_shape> blockDim{};
constexpr emulation::Index<&emulation::current_grid> gridDim{};

#define __syncthreads() emulation::sync_block(__FILE__, __LINE__)

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulation::meet(mask, emulation::Collective::kSyncWarp, 0, 0);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return emulation::shuffle(mask, value, source & 31);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip) {
  return emulation::shuffle(mask, value, int(emulation::worker->current->lane) ^ flip);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
  const int lane = int(emulation::worker->current->lane);
  return emulation::shuffle(mask, value, lane >= distance ? lane - distance : lane);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
// Ordered, unlike CUDA's: ThreadSanitizer does not see what fences add to relaxed operations.
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return uint32_t(emulation::meet(mask, emulation::Collective::kBallot, predicate != 0, 0));
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config->attrs[i].val.clusterDim.x;
    }
  }
  const unsigned threads = emulation::volume(config->blockDim);
  const emulation::Gpu gpu;
  if (threads == 0 || threads > 1024 || config->dynamicSmemBytes > gpu.max_shared_bytes() ||
      cluster == 0 || cluster > (gpu.has_clusters() ? 8 : 1) || config->gridDim.x % cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (gpu.code < 90 && cluster > 1) emulation::fail("a cluster of code that knows none");
  const std::tuple<Params...> copies(static_cast<Params>(args)...);
  emulation::launch(config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
                    [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Gpu gpu;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(gpu.max_shared_bytes()); break;
    case cudaDevAttrClusterLaunch: *value = gpu.has_clusters(); break;
  }
  return cudaSuccess;
}
// The compiler's count of static shared memory is not known here: all the kernels that ask have
// less, which is checked when they run.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {1024, emulation::Gpu().code};
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, kernel);
  const size_t most = emulation::Gpu().max_shared_bytes() - attributes.sharedSizeBytes;
  return bytes >= 0 && size_t(bytes) <= most ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                     ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration"
                                                  : "invalid value";
}
