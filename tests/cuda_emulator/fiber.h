// A fiber: a function on a stack of its own that can be left and entered again. On x86-64 a switch is a dozen
// instructions; elsewhere it is ucontext's.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qk::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gets ready to run entry() from its beginning. entry never returns: it ends with leave(true).
  void start(void (*entry)());
  // From the scheduler into the fiber, until that calls leave.
  void enter();
  // From the fiber back to the scheduler. ended: never to be entered again before another start.
  void leave(bool ended = false);
  // The first thing entry does.
  void arrived();

 private:
  static constexpr size_t kStack = 128 * 1024;
  char* stack_;
#if defined(__x86_64__)
  void* inside_ = nullptr;
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
  void* fake_inside_ = nullptr;  // AddressSanitizer's second stacks
  void* fake_outside_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace qk::emulator
