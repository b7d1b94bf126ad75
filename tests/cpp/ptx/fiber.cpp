#include "fiber.h"

#include <cxxabi.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "address_sanitizer.h"

#ifdef SIMT_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// simt_switch_stack(&save, to): pushes what a call must preserve, stores the stack pointer in `save`, takes `to` and pops.
// ucontext does the same with two system calls, for the signal mask, which nobody here changes.
// simt_first_frame is where a new stack "returns" to; it has no caller, which the unwinder is told.
extern "C" {
void simt_switch_stack(void** save, void* to);
void simt_first_frame();
}

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
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
.size simt_switch_stack, .-simt_switch_stack

.p2align 4
.globl simt_first_frame
.hidden simt_first_frame
.type simt_first_frame, @function
simt_first_frame:
  .cfi_startproc
  .cfi_undefined rip
  movq %r12, %rdi
  callq *%r13
  ud2
  .cfi_endproc
.size simt_first_frame, .-simt_first_frame
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, %function
simt_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch_stack, .-simt_switch_stack

.p2align 4
.globl simt_first_frame
.hidden simt_first_frame
.type simt_first_frame, %function
simt_first_frame:
  .cfi_startproc
  .cfi_undefined x30
  mov x0, x19
  blr x20
  brk #1
  .cfi_endproc
.size simt_first_frame, .-simt_first_frame
)");
#else
#error "fiber.cpp knows x86-64 and AArch64 only"
#endif

namespace simt {
namespace {

#ifdef SIMT_ADDRESS_SANITIZER
constexpr size_t kStackBytes = 512 << 10; // redzones between all locals
#else
constexpr size_t kStackBytes = 128 << 10; // only what is touched takes memory
#endif

// Stacks, reused last in first out, so that threads which never wait run on one warm stack one after the other.
class StackPool {
 public:
  std::byte* take() {
    if (free_.empty()) grow();
    std::byte* stack = free_.back();
    free_.pop_back();
#ifdef SIMT_ADDRESS_SANITIZER
    // The last user's outermost frame never returned, so its redzones still are poisoned.
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
    return stack;
  }
  void give_back(std::byte* stack) { free_.push_back(stack); }

 private:
  // A guard page below each stack, so that an overflow is a crash at the place of the overflow.
  void grow() {
    constexpr size_t kStacks = 64;
    const auto guard_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t stride = kStackBytes + guard_bytes;
    void* memory = mmap(nullptr, stride * kStacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = kStacks; i-- > 0;) {
      std::byte* guard = static_cast<std::byte*>(memory) + i * stride;
      if (mprotect(guard, guard_bytes, PROT_NONE) != 0) throw std::bad_alloc(); // too many mappings (vm.max_map_count)
      free_.push_back(guard + guard_bytes);
    }
  }

  std::vector<std::byte*> free_;
};

StackPool& stacks() {
  static StackPool* pool = new StackPool; // never destroyed: a static object's destructor may still run a launch
  return *pool;
}

void* first_stack_pointer(std::byte* stack, void (*function)(void*), void* argument) {
  // Stacks lie whole pages apart. If all began at the same place in their pages, their tops would share one set of the cache.
  const size_t colour = (reinterpret_cast<uintptr_t>(stack) / kStackBytes * 7 % 32) * 128;
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes - colour);
#if defined(__x86_64__)
  // r15 r14 r13 r12 rbx rbp, the return address, and two words that leave the stack pointer at a multiple of 16.
  uintptr_t* frame = top - 9;
  std::memset(frame, 0, 9 * sizeof *frame);
  frame[2] = reinterpret_cast<uintptr_t>(function);
  frame[3] = reinterpret_cast<uintptr_t>(argument);
  frame[6] = reinterpret_cast<uintptr_t>(&simt_first_frame);
#else
  uintptr_t* frame = top - 20;
  std::memset(frame, 0, 20 * sizeof *frame);
  frame[0] = reinterpret_cast<uintptr_t>(argument);
  frame[1] = reinterpret_cast<uintptr_t>(function);
  frame[11] = reinterpret_cast<uintptr_t>(&simt_first_frame);
#endif
  return frame;
}

} // namespace

Fiber::~Fiber() {
  if (started()) std::abort(); // its objects would never be destroyed
}

void Fiber::prepare(Entry entry, void* argument) {
  if (started()) std::abort();
  entry_ = entry;
  argument_ = argument;
}

void Fiber::exchange_exceptions(ExceptionState& leaving, const ExceptionState& next) {
  static_assert(sizeof(ExceptionState) == 2 * sizeof(void*));
  void* const globals = abi::__cxa_get_globals();
  std::memcpy(&leaving, globals, sizeof leaving);
  std::memcpy(globals, &next, sizeof next);
}

void Fiber::start() {
  stack_ = stacks().take();
  stack_pointer_ = first_stack_pointer(stack_, &Fiber::run, this);
  exceptions_ = {};
}

void Fiber::resume() {
  if (!started()) start();
  Resumer resumer;
  resumer_ = &resumer;
  exchange_exceptions(resumer.exceptions, exceptions_);
#ifdef SIMT_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&resumer.fake_stack, stack_, kStackBytes);
#endif
  simt_switch_stack(&resumer.stack_pointer, stack_pointer_);
#ifdef SIMT_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(resumer.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::hand_over(Fiber& next) {
  if (!next.started()) next.start();
  next.resumer_ = resumer_;
  exchange_exceptions(exceptions_, next.exceptions_);
#ifdef SIMT_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, kStackBytes);
#endif
  simt_switch_stack(&stack_pointer_, next.stack_pointer_);
  arrive();
}

void Fiber::run(void* fiber) {
  auto* self = static_cast<Fiber*>(fiber);
  self->arrive();
  self->entry_(self->argument_);
  // Nobody takes the stack before this fiber has left it.
  stacks().give_back(std::exchange(self->stack_, nullptr));
  Resumer& resumer = *self->resumer_;
  exchange_exceptions(self->exceptions_, resumer.exceptions);
#ifdef SIMT_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(nullptr, resumer.stack, resumer.stack_bytes);
#endif
  simt_switch_stack(&self->stack_pointer_, resumer.stack_pointer);
}

void Fiber::arrive() {
#ifdef SIMT_ADDRESS_SANITIZER
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  __sanitizer_finish_switch_fiber(std::exchange(fake_stack_, nullptr), &stack, &stack_bytes);
  if (resumer_->stack != nullptr) return; // from another fiber
  resumer_->stack = stack;
  resumer_->stack_bytes = stack_bytes;
#endif
}

} // namespace simt
