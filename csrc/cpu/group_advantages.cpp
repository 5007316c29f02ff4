// Advantages of completions within their groups; see csrc/math/advantages.h.
#include "rlhf_fast/group_advantages.h"

#include <cmath>

namespace rlhf_fast {
using std::sqrt;
}

#include "../math/advantages.h"  // after the functions it uses
#include "isa.h"
#include "parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

namespace {
struct OneLane {
  int64_t first = 0, stride = 1;
  double sum(double x) const { return x; }
};
}  // namespace

void group_advantages(const GroupAdvantagesInputs& in, const GroupAdvantagesOutputs& out,
                      int num_threads) {
  parallel_for(in.groups.count, 256, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) advantages_of_group(in, out, g, OneLane{});
  });
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(group_advantages, GroupAdvantagesInputs, GroupAdvantagesOutputs)

}  // namespace rlhf_fast
