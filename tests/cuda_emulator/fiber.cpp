#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what the caller of a function may rely on, changes stacks, and returns on the other one.
extern "C" void qk_switch(void** from, void* to);
asm(R"(
  .text
  .globl qk_switch
  .hidden qk_switch
  .type qk_switch, @function
qk_switch:
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
  .size qk_switch, .-qk_switch
)");
#endif

namespace qk::emulator {
namespace {

void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}

void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, size);
#endif
}

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  stack_ = static_cast<char*>(memory);
}

Fiber::~Fiber() { munmap(stack_, kStack); }

void Fiber::start(void (*entry)()) {
  fake_inside_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStack);  // of frames that an error left behind
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + kStack);
  *--top = 0;  // where entry would return to; aligns the stack as a call does
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) {
    *--top = 0;
  }
  inside_ = top;
#else
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = kStack;
  inside_.uc_link = nullptr;
  makecontext(&inside_, entry, 0);
#endif
}

void Fiber::enter() {
  before_switch(&fake_outside_, stack_, kStack);
#if defined(__x86_64__)
  qk_switch(&outside_, inside_);
#else
  swapcontext(&outside_, &inside_);
#endif
  after_switch(fake_outside_, nullptr, nullptr);
}

void Fiber::leave(bool ended) {
  before_switch(ended ? nullptr : &fake_inside_, outside_stack_, outside_size_);
#if defined(__x86_64__)
  qk_switch(&inside_, outside_);
#else
  swapcontext(&inside_, &outside_);
#endif
  arrived();
}

void Fiber::arrived() { after_switch(fake_inside_, &outside_stack_, &outside_size_); }

}  // namespace qk::emulator
