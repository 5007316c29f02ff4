#include "module.h"

PYBIND11_MODULE(RLHF_FAST_MODULE, m) {
  rlhf_fast::bind_kl(m);
  rlhf_fast::bind_logps(m);
}
