// Fibers for the simulator: stacks of their own, between which one thread of the CPU switches.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gdfast::cuda::simulator {

#if defined(__x86_64__)
// Saves what a function must not change, on the stack that it leaves. Thirty times as fast as
// swapcontext, which asks the kernel for the signal mask each time.
extern "C" void gdfast_simulator_switch(void** from, void* to);
asm(R"(
.text
.type gdfast_simulator_switch, @function
gdfast_simulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gdfast_simulator_switch, . - gdfast_simulator_switch
)");
#endif

// Where execution stands: that of a fiber, or that of whoever started them.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() {
    if (memory_ != nullptr) munmap(memory_, kStack + page());
  }

  // Makes the next switch to this one begin entry, which never returns.
  void begin(void (*entry)()) {
    if (memory_ == nullptr) allocate();
#if defined(__SANITIZE_ADDRESS__)
    // Of one that ended only entry's own frame is left; all of it where it was given up on the way.
    constexpr size_t kEntry = 4096;
    const size_t used = ended_ ? kEntry : kStack;
    __asan_unpoison_memory_region(static_cast<unsigned char*>(bottom_) + kStack - used, used);
    ended_ = false;
#endif
#if defined(__x86_64__)
    // As if a caller at address 0 had called entry: the stack is 8 past a multiple of 16 there.
    auto** top = static_cast<void**>(bottom_) + kStack / sizeof(void*);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = kStack;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves this one for another; last where nobody comes back.
  void switch_to(Context& other, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    ended_ = last;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, other.bottom_, other.size_);
#else
    static_cast<void>(last);
#endif
#if defined(__x86_64__)
    gdfast_simulator_switch(&stack_pointer_, other.stack_pointer_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // The first thing that entry does: tells the sanitizer where the one it came from has its stack.
  static void arrive_from(Context& starter) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &starter.size_);
    starter.bottom_ = const_cast<void*>(bottom);
#else
    static_cast<void>(starter);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 512 * 1024;
#else
  static constexpr size_t kStack = 128 * 1024;
#endif

  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  // The lowest page stays out of bounds, so that an overflow ends the program at once.
  void allocate() {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const memory = mmap(nullptr, kStack + page(), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = memory;
    mprotect(memory_, page(), PROT_NONE);
    bottom_ = static_cast<unsigned char*>(memory_) + page();
    size_ = kStack;
  }

  void* memory_ = nullptr;
  void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  bool ended_ = false;
#endif
};

}  // namespace gdfast::cuda::simulator
