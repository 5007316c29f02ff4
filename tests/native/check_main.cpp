// check_address, check_thread: every op's checks under one sanitizer.
#include <cstdio>
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  using namespace rlhf_fast::checks;
  const bool few = argc > 1 && !std::strcmp(argv[1], "few");
  std::mt19937 random(1);
  check_kl(few, random);
  check_logps(few, random);
  std::printf("%s: %d cases, %d failures\n", failures ? "FAILED" : "ok", cases, failures);
  return failures != 0;
}
