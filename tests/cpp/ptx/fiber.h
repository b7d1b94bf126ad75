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
  // Runs the fiber, and those that it hands over to, until the entry of one of them has returned. Not from inside a fiber.
  void resume();
  // From inside the fiber: another one goes on, and this one when it is resumed or handed over to.
  void hand_over(Fiber& next);

  // It has a stack: has run, and is not at its end. Only an unstarted or ended fiber may be destroyed.
  bool started() const { return stack_ != nullptr; }

 private:
  // libstdc++ and libc++abi keep the exceptions being handled per OS thread; a fiber that hands over inside a catch block needs its own.
  struct ExceptionState {
    void* caught = nullptr;
    unsigned int uncaught = 0;
  };

  // Who called resume(), and waits in there.
  struct Resumer {
    void* stack_pointer = nullptr;
    ExceptionState exceptions;
    void* fake_stack = nullptr; // AddressSanitizer's, and where the stack lies
    const void* stack = nullptr;
    size_t stack_bytes = 0;
  };

  static void run(void* fiber);
  static void exchange_exceptions(ExceptionState& leaving, const ExceptionState& next);
  void start();  // gives it a stack
  void arrive(); // the first thing after each switch to it

  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  std::byte* stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  Resumer* resumer_ = nullptr;
  ExceptionState exceptions_;
  void* fake_stack_ = nullptr; // AddressSanitizer's
};

} // namespace simt
