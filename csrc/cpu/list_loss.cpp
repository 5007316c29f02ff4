// Losses of ranked lists with their gradients, in double: lists are short. Groups are independent;
// their sum is taken in order afterwards.
#include "rlhf_fast/list_loss.h"

#include "../math/lists.h"
#include "isa.h"
#include "parallel.h"

namespace rlhf_fast {

// Throws for groups that are empty or overlap and for labels that have no order. Defined below.
void check_inputs(const ListInputs& in);

namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kGroupsPerPiece = 16;

double one_group(const ListInputs& in, const ListOutputs& out, Span span) {
  const Group<double> group = group_of<double>(in, out, span);
  for (int64_t i = span.begin; i < span.end; ++i) {
    out.workspace[i] = prepare_item(in.loss, group, i);
  }
  double loss = 0.0;
  for (int64_t i = span.begin; i < span.end; ++i) {
    const Total share = finish_item(in, group, i);
    loss += share.value;
    out.grads[i] = static_cast<float>(share.grad);
  }
  return loss;
}

}  // namespace

void list_loss(const ListInputs& in, const ListOutputs& out, int num_threads) {
  check_inputs(in);
  parallel_for(in.groups.count, kGroupsPerPiece, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      out.losses[s] = static_cast<float>(one_group(in, out, span_of(in.groups, s)));
    }
  });
  double total = 0.0;
  for (int64_t s = 0; s < in.groups.count; ++s) total += out.losses[s];
  *out.total = static_cast<float>(total);
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(list_loss, ListInputs, ListOutputs)

}  // namespace rlhf_fast

#if defined(RLHF_FAST_ISA_IS_BASELINE)

#include <stdexcept>
#include <string>

void rlhf_fast::check_inputs(const ListInputs& in) {
  const Sequences& g = in.groups;
  bool rising = g.offsets[0] == 0 && g.offsets[g.count] == g.total;
  for (int64_t s = 0; s < g.count; ++s) rising = rising && g.offsets[s] < g.offsets[s + 1];
  if (!rising) {
    std::string got;
    for (int64_t s = 0; s <= g.count && s < 8; ++s) got += std::to_string(g.offsets[s]) + " ";
    throw std::invalid_argument("list_loss: cu_groups must rise from 0 to " +
                                std::to_string(g.total) + " without an empty group, got " + got +
                                (g.count > 7 ? "...; " : "; ") + "pass the cumulative group sizes");
  }
  for (int64_t i = 0; i < g.total; ++i) {
    if (in.labels[i] == in.labels[i]) continue;
    throw std::invalid_argument("list_loss: labels must not be NaN, got one at index " +
                                std::to_string(i) + "; leave such items out");
  }
}

#endif
