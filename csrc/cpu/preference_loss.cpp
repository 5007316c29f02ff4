// Preference losses of a batch with their gradients. A batch is a few pairs, so every pair is
// computed in double: it costs nothing next to the call, and the results are correctly rounded
// however large the log-probs are.
#include "rlhf_fast/preference_loss.h"

#include "isa.h"
#include "pairs.h"
#include "parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {

void preference_loss(const PreferenceInputs& in, const PreferenceOutputs& out, int num_threads) {
  constexpr int64_t kPiece = 256;  // pairs per task, some tens of microseconds
  check_inputs(in);
  parallel_for(in.count, kPiece, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) write_pair(in, out, i, preference_of<double>(in, i));
  });
  add_up_pairs(in.count, out);
}

}  // namespace RLHF_FAST_ISA

RLHF_FAST_CPU_ENTRY(preference_loss, PreferenceInputs, PreferenceOutputs)

}  // namespace rlhf_fast

#if defined(RLHF_FAST_ISA_IS_BASELINE)

#include <stdexcept>
#include <string>

namespace {

template <class Valid>
void check_column(const char* name, const char* must, const char* advice,
                  const rlhf_fast::Column& column, int64_t count, Valid valid) {
  for (int64_t i = 0; column.data && i < count; ++i) {
    const float x = column.data[i * column.stride];
    if (valid(x)) continue;
    throw std::invalid_argument(std::string("preference_loss: ") + name + " must " + must +
                                ", got " + std::to_string(x) + " at index " + std::to_string(i) +
                                "; " + advice);
  }
}

}  // namespace

void rlhf_fast::check_inputs(const PreferenceInputs& in) {
  const auto is_length = [](float x) { return x >= 0.0f; };
  check_column("targets", "lie in [0, 1]", "they are probabilities that the chosen one wins",
               in.targets, in.count, [](float x) { return x >= 0.0f && x <= 1.0f; });
  check_column("weights", "not be negative or NaN", "0 leaves a pair out", in.weights, in.count,
               [](float x) { return x >= 0.0f; });
  check_column("margins", "not be NaN", "0 asks for none", in.margins, in.count,
               [](float x) { return x == x; });
  for (const Column& lengths : {in.chosen_lengths, in.rejected_lengths}) {
    check_column("lengths", "not be negative or NaN", "count the response's tokens", lengths,
                 in.count, is_length);
  }
}

#endif
