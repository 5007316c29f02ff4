# Stand-alone programs that run the kernels under sanitizers. Configured by the top-level file with
# -DRLHF_FAST_SANITIZERS=ON; see CONTRIBUTING.md.
# Checks as calls instead of inlined code: a third of the time to compile. Of that again a sixth
# without marks where each inlined lambda's variables begin and end.
set(ADDRESS_FLAGS -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined
    -fno-sanitize-address-use-after-scope -fno-sanitize-recover=all
    --param asan-instrumentation-with-call-threshold=0)
set(THREAD_FLAGS -O1 -g1 -fsanitize=thread)

set(CHECKS main ${STEMS})
list(TRANSFORM CHECKS PREPEND tests/native/check_)
list(TRANSFORM CHECKS APPEND .cpp)

foreach(kind address thread)
  string(TOUPPER ${kind}_FLAGS flags)
  add_cpu_kernels(cpu_${kind} ${${flags}})
  add_emulated_kernels(emulated_${kind} ${${flags}})
  add_executable(check_${kind} ${CHECKS})
  target_compile_options(check_${kind} PRIVATE ${${flags}})
  target_link_options(check_${kind} PRIVATE ${${flags}})
  target_link_libraries(check_${kind} PRIVATE cpu_${kind} emulated_${kind})
endforeach()
