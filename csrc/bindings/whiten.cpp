#include "rlhf_fast/whiten.h"

#include "module.h"

namespace rlhf_fast {

void bind_whiten(pybind11::module_& m) {
  using Address = std::uintptr_t;
  m.attr("WHITEN_CHUNK") = kWhitenChunk;
  m.def("whiten_statistics",
        [](int where, Address stream, Address values, Address mask, int64_t count,
           Address statistics, Address partials, Address ticket) {
          const WhitenInputs in{pointer<const float>(values), pointer<const bool>(mask), count};
          const WhitenStatistics out{pointer<double>(statistics), pointer<double>(partials),
                                     pointer<unsigned>(ticket)};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(whiten_statistics)(in, out, run_on(where, stream));
        });
  m.def("whiten_apply",
        [](int where, Address stream, Address values, Address mask, int64_t count, Address whitened,
           Address statistics, double epsilon, bool unbiased, bool shift_mean) {
          const WhitenInputs in{pointer<const float>(values), pointer<const bool>(mask), count};
          const WhitenOutputs out{pointer<float>(whitened), pointer<const double>(statistics),
                                  epsilon, unbiased, shift_mean};
          pybind11::gil_scoped_release release;
          RLHF_FAST_BIND(whiten_apply)(in, out, run_on(where, stream));
        });
}

}  // namespace rlhf_fast
