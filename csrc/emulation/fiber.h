// A switchable stack, with the annotations that keep AddressSanitizer and ThreadSanitizer informed.
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#define EMULATION_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// Functions on both sides of a switch must not keep a shadow call stack.
#define EMULATION_SWITCHES __attribute__((noinline, no_sanitize("thread")))
#else
#define EMULATION_SWITCHES __attribute__((noinline))
#endif

namespace emulation {

// The emulator's own bookkeeping is no part of the program under the race checker.
struct Unwatched {
#if EMULATION_TSAN
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
#else
  Unwatched() {}
#endif
};
// What one thread did before release(p) has happened before what another does after acquire(p).
inline void release([[maybe_unused]] void* p) {
#if EMULATION_TSAN
  __tsan_release(p);
#endif
}
inline void acquire([[maybe_unused]] void* p) {
#if EMULATION_TSAN
  __tsan_acquire(p);
#endif
}

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, stores its top in *from, moves to `to`.
extern "C" void rlhf_fast_emulation_switch(void** from, void* to);
asm(R"(
.text
.weak rlhf_fast_emulation_switch
.type rlhf_fast_emulation_switch, @function
rlhf_fast_emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size rlhf_fast_emulation_switch, .-rlhf_fast_emulation_switch
)");
#else
#error "the emulator's stack switch is written for x86-64"
#endif

constexpr size_t kStackBytes = 64 * 1024;

// One side of a switch: a fiber, or the scheduler that runs fibers.
struct Context {
  void* top = nullptr;
#if EMULATION_ASAN
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if EMULATION_TSAN
  void* tsan = nullptr;
#endif

  // Prepares an own stack on which entry() will run; it must never return.
  void prepare(char* stack, size_t offset, void (*entry)()) {
#if EMULATION_ASAN
    ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
    bottom = stack;
    size = kStackBytes;
#endif
#if EMULATION_TSAN
    tsan = __tsan_create_fiber(0);
#endif
    void** slot = reinterpret_cast<void**>(stack + kStackBytes - offset);
    *--slot = nullptr;  // the return address entry() never uses; aligns the stack as a call would
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
    top = slot;
  }
};

EMULATION_SWITCHES inline void switch_context(Context& from, Context& to,
                                              [[maybe_unused]] bool from_ends = false) {
#if EMULATION_ASAN
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if EMULATION_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  rlhf_fast_emulation_switch(&from.top, to.top);
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Called first on a fresh stack; remembers the stack it was entered from.
inline void arrive([[maybe_unused]] Context& from) {
#if EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.size);
#endif
}

}  // namespace emulation
