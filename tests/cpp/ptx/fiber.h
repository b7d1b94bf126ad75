// A function that can stop in the middle and go on later, on a stack of its own: one CUDA thread of a launch is one fiber.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  using Entry = void (*)(void*);

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // What the next resume() starts; the fiber must not be in the middle of something. `entry` may not let an exception out.
  void prepare(Entry entry, void* argument);
  // Runs the fiber until it suspends or its entry has returned. Not from inside a fiber.
  void resume();
  // From inside the fiber: back to the resume() that runs it.
  void suspend();

  // It has a stack: resumed at least once and not at its end. Only an unstarted or ended fiber may be destroyed.
  bool started() const { return stack_ != nullptr; }

 private:
  // libstdc++ and libc++abi keep the exceptions being handled per OS thread; a fiber that suspends inside a catch block needs its own.
  struct ExceptionState {
    void* caught = nullptr;
    unsigned int uncaught = 0;
  };

  static void run(void* fiber);
  void leave(bool for_good);

  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  std::byte* stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  void* resumer_stack_pointer_ = nullptr;
  bool ended_ = false;
  ExceptionState exceptions_;
  // AddressSanitizer's: the fake stacks of both sides, and where the resumer's stack lies.
  void* fake_stack_ = nullptr;
  const void* resumer_stack_ = nullptr;
  size_t resumer_stack_bytes_ = 0;
};

} // namespace simt
