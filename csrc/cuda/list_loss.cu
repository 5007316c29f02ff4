// Losses of ranked lists with their gradients, in one launch.
//
// One block, one thread an item; lists are some items long and a batch is some hundreds of items,
// so the launch is the cost. Every item needs a number from every other item of its group: the
// block computes these first, waits, and then computes shares and gradients. Sums per group and in
// total are taken in a fixed order.
#include "rlhf_fast/list_loss.h"

#include "launch.cuh"
#include "portable.cuh"
#include "rows.cuh"

#include "../math/lists.h"

namespace rlhf_fast {
namespace gpu {
namespace {

constexpr int kListBlock = 256;

// The group that holds an item; an empty span where the offsets have none.
RLHF_FAST_DEVICE Span find_group(const Sequences& groups, int64_t item) {
  int64_t low = 0, high = groups.count;  // the last group that begins at or before the item
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (groups.offsets[middle] <= item ? low : high) = middle;
  }
  const Span span = span_of(groups, low);
  return item >= span.begin && item < span.end ? span : Span{item, item};
}

__global__ void __launch_bounds__(kListBlock) list_loss_kernel(ListInputs in, ListOutputs out) {
  for (int64_t i = threadIdx.x; i < in.groups.total; i += kListBlock) {
    const Group<float> group = group_of<float>(in, out, find_group(in.groups, i));
    out.workspace[i] = prepare_item(in.loss, group, i);
  }
  __syncthreads();
  double* values = out.workspace + in.groups.total;
  for (int64_t i = threadIdx.x; i < in.groups.total; i += kListBlock) {
    const Group<float> group = group_of<float>(in, out, find_group(in.groups, i));
    const Total share = group.begin < group.end ? finish_item(in, group, i) : Total{};
    out.grads[i] = static_cast<float>(share.grad);
    values[i] = share.value;
  }
  __syncthreads();
  Totals<1> total{};
  for (int64_t s = threadIdx.x; s < in.groups.count; s += kListBlock) {
    const Span span = span_of(in.groups, s);
    double loss = 0.0;
    for (int64_t i = span.begin; i < span.end; ++i) loss += values[i];
    out.losses[s] = static_cast<float>(loss);
    total[0] += out.losses[s];
  }
  total = sum_block<kListBlock>(total);
  if (threadIdx.x == 0) *out.total = total[0];
}

}  // namespace
}  // namespace gpu

void list_loss_cuda(const ListInputs& in, const ListOutputs& out, CudaTarget target) {
  gpu::use_device(target);
  gpu::launch(&gpu::list_loss_kernel, 1, gpu::kListBlock, target, in, out);
}

}  // namespace rlhf_fast
