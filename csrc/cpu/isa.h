// One entry point over the bodies compiled for several instruction sets.
//
// A stem's file is compiled as namespaces portable, avx2, avx512 and avx512bf16. The portable one
// also defines the public function, which picks a body by what the processor has;
// RLHF_FAST_CPU=portable, avx2 or avx512 in the environment lowers the choice, for tests. Whatever
// is compiled in the AVX namespaces must not define inline functions that other files share: the
// linker could keep that copy for all.
#pragma once

#if defined(RLHF_FAST_ISA_IS_BASELINE)

#include <cstdlib>
#include <cstring>

namespace rlhf_fast {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

inline Isa best_isa() {
#if defined(RLHF_FAST_X86_BODIES)
  const char* limit = std::getenv("RLHF_FAST_CPU");
  if (limit && !std::strcmp(limit, "portable")) return Isa::kPortable;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!avx2) return Isa::kPortable;
  if (!avx512 || (limit && !std::strcmp(limit, "avx2"))) return Isa::kAvx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16");
  return bf16 && !(limit && !std::strcmp(limit, "avx512")) ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

}  // namespace rlhf_fast

#endif

#if !defined(RLHF_FAST_ISA_IS_BASELINE)
#define RLHF_FAST_CPU_ENTRY(name, Inputs, Outputs)
#elif !defined(RLHF_FAST_X86_BODIES)
#define RLHF_FAST_CPU_ENTRY(name, Inputs, Outputs)                         \
  void name##_cpu(const Inputs& in, const Outputs& out, int num_threads) { \
    portable::name(in, out, num_threads);                                  \
  }
#else
#define RLHF_FAST_CPU_ENTRY(name, Inputs, Outputs)                          \
  namespace avx2 {                                                          \
  void name(const Inputs& in, const Outputs& out, int num_threads);         \
  }                                                                         \
  namespace avx512 {                                                        \
  void name(const Inputs& in, const Outputs& out, int num_threads);         \
  }                                                                         \
  namespace avx512bf16 {                                                    \
  void name(const Inputs& in, const Outputs& out, int num_threads);         \
  }                                                                         \
  void name##_cpu(const Inputs& in, const Outputs& out, int num_threads) {  \
    switch (best_isa()) {                                                   \
      case Isa::kAvx512Bf16: return avx512bf16::name(in, out, num_threads); \
      case Isa::kAvx512: return avx512::name(in, out, num_threads);         \
      case Isa::kAvx2: return avx2::name(in, out, num_threads);             \
      case Isa::kPortable: return portable::name(in, out, num_threads);     \
    }                                                                       \
  }
#endif
