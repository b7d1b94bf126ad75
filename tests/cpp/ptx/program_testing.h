// For tests that run PTX: arrays in device memory, and launches with ordinary arguments.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "interpreter.h"
#include "memory.h"

namespace simt::ptx::testing {

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : data_(static_cast<T*>(allocate(std::max<size_t>(count, 1) * sizeof(T)))), count_(count) {}
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    std::copy(values.begin(), values.end(), data_);
    mark_initialized(data_, count_ * sizeof(T));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { release(data_); }

  T* data() const { return data_; }
  std::vector<T> values() const { return {data_, data_ + count_}; }
  T operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t count_;
};

struct Shape {
  Dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
};

// A device array stands for its pointer, anything else for itself.
template <typename T>
T argument(const T& value) {
  return value;
}
template <typename T>
T* argument(const DeviceArray<T>& array) {
  return array.data();
}

template <typename... Arguments>
void launch(const Program& program, const std::string& kernel, const Shape& shape, const LaunchOptions& options,
            const Arguments&... arguments) {
  auto values = std::make_tuple(argument(arguments)...);
  const std::vector<size_t> bytes = program.parameter_bytes(kernel);
  std::vector<size_t> given;
  std::vector<void*> pointers;
  std::apply(
      [&](auto&... value) {
        (given.push_back(sizeof value), ...);
        (pointers.push_back(&value), ...);
      },
      values);
  ASSERT_EQ(given, bytes) << "arguments of " << kernel;
  program.launch(kernel, shape.grid, shape.block, shape.dynamic_shared_bytes, pointers.data(), options);
}

// What went wrong, if anything.
template <typename Body>
std::optional<Failure> failure_of(const Body& body) {
  try {
    body();
  } catch (const Failure& failure) {
    return failure;
  }
  return std::nullopt;
}

} // namespace simt::ptx::testing
