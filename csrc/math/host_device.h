// Marks functions that CPU and CUDA share.
#pragma once

#if defined(__CUDACC__)
#define RLHF_FAST_HD __host__ __device__ __forceinline__
#else
#define RLHF_FAST_HD inline __attribute__((always_inline))
#endif
