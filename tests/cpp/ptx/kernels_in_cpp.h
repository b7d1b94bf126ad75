// Kernels written in C++, for the tests of the scheduler: each function tells the scheduler first and then does it, as the interpreter
// will. The line of the call is the place in the program that reports name.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <source_location>
#include <string>
#include <vector>

#include "counters.h"
#include "memory.h"
#include "simt.h"

namespace simt::testing {

struct Place : Location {
  Place(std::source_location here = std::source_location::current()) // NOLINT: meant to be a default argument
      : Location{"kernel.cu", here.line(), here.line()} {}
};

// ---- what a kernel does

inline Space space_of(const void* p) {
  const Thread& thread = self();
  const auto* byte = static_cast<const std::byte*>(p);
  return byte >= thread.shared && byte < thread.shared + thread.shared_bytes ? Space::kShared : Space::kGlobal;
}

template <class T>
T load(const T* p, Place at = {}) {
  plain_access(p, sizeof(T), false, space_of(p), at);
  return *p;
}
template <class T>
void store(T* p, std::type_identity_t<T> value, Place at = {}) {
  plain_access(p, sizeof(T), true, space_of(p), at);
  *p = value;
}
template <class T>
T atomic_load(const T* p, Order order = Order::kRelaxed, Place at = {}) {
  atomic_access(p, sizeof(T), true, false, order, space_of(p), at);
  return *p;
}
template <class T>
void atomic_store(T* p, std::type_identity_t<T> value, Order order = Order::kRelaxed, Place at = {}) {
  atomic_access(p, sizeof(T), false, true, order, space_of(p), at);
  *p = value;
}
template <class T>
T atomic_add(T* p, std::type_identity_t<T> value, Order order = Order::kRelaxed, Place at = {}) {
  atomic_access(p, sizeof(T), true, true, order, space_of(p), at);
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
inline void fence_all(Place at = {}) { fence(false, at); }
inline void fence_block(Place at = {}) { fence(true, at); }
inline void sync_block(Place at = {}) { barrier(0, 0, at); }
inline void sync_warp(uint32_t mask = ~0u, Place at = {}) { collective(Collective::kSyncWarp, mask, 0, 0, at); }
inline uint32_t ballot(bool vote, uint32_t mask = ~0u, Place at = {}) {
  return static_cast<uint32_t>(collective(Collective::kBallot, mask, vote, 0, at));
}
inline uint64_t shuffle(uint64_t value, uint32_t source_lane, uint32_t mask = ~0u, Place at = {}) {
  return collective(Collective::kShuffle, mask, value, source_lane, at);
}
inline void sleep(Place at = {}) { yield(at); }

inline uint32_t thread_index() { return self().linear_in_block; }
inline uint64_t block_index() { return self().block_linear; }
inline uint64_t grid_thread_index() { return self().block_linear * self().block_dim.count() + self().linear_in_block; }
template <class T>
T* shared() {
  return reinterpret_cast<T*>(self().shared);
}

// ---- device memory

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t numel, bool initialized = true) : data_(static_cast<T*>(allocate(numel * sizeof(T), initialized))), numel_(numel) {
    if (initialized) std::fill(data_, data_ + numel, T{});
  }
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  T* operator+(size_t i) const { return data_ + i; }
  std::vector<T> values() const { return {data_, data_ + numel_}; }

 private:
  T* data_;
  size_t numel_;
};

// ---- launches

struct Shape {
  Dim3 grid, block;
  size_t shared_bytes = 0;
};

inline void run(Shape shape, const std::function<void()>& body, const LaunchOptions& options = {}) {
  launch("kernel", shape.grid, shape.block, shape.shared_bytes, body, options);
}

inline std::optional<Failure> failure_of(Shape shape, const std::function<void()>& body, const LaunchOptions& options = {}) {
  try {
    run(shape, body, options);
  } catch (const Failure& failure) {
    return failure;
  }
  return std::nullopt;
}

inline std::string message_of(const std::optional<Failure>& failure) { return failure ? failure->what() : "no failure"; }

inline LaunchOptions fuzzed(uint64_t seed) {
  LaunchOptions options;
  options.seed = seed;
  options.fuzz = true;
  options.block_order = BlockOrder::kRandom;
  return options;
}

// The launch fails so, in every order that is tried.
inline ::testing::AssertionResult fails_with(FailureKind kind, Shape shape, const std::function<void()>& body) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const auto failure = failure_of(shape, body, seed == 0 ? LaunchOptions{} : fuzzed(seed));
    if (!failure) return ::testing::AssertionFailure() << "seed " << seed << ": no failure";
    if (failure->kind != kind) return ::testing::AssertionFailure() << "seed " << seed << ": " << failure->what();
  }
  return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult is_right(Shape shape, const std::function<void()>& body) {
  for (uint64_t seed = 0; seed < 6; ++seed)
    if (const auto failure = failure_of(shape, body, seed == 0 ? LaunchOptions{} : fuzzed(seed)))
      return ::testing::AssertionFailure() << "seed " << seed << ": " << failure->what();
  return ::testing::AssertionSuccess();
}

} // namespace simt::testing
