// Executes the kernels of a PTX text on the scheduler of simt.h: each CUDA thread interprets its instructions, one after the other.
//
// Device pointers are host pointers. Everything in the text must be known, also what no launch would reach: one instruction or
// modifier that is not stops from_ptx with its text and line. Known, but without effect: device printf, cache and prefetch hints.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt::ptx {

class Program {
 public:
  // `name` is for messages. Throws Failure(kUnsupported).
  static Program from_ptx(const std::string& text, const std::string& name);
  Program(Program&&) noexcept;
  Program& operator=(Program&&) noexcept;
  ~Program(); // frees the program's global variables

  bool has_kernel(const std::string& kernel) const;
  std::vector<std::string> kernels() const;
  std::vector<size_t> parameter_bytes(const std::string& kernel) const;
  // A .global or .const variable; throws std::out_of_range if there is none of that name.
  void* variable(const std::string& name) const;
  size_t variable_bytes(const std::string& name) const;

  // Returns when the launch is done. `arguments` as cudaLaunchKernel takes them: one pointer to each parameter's value.
  // Throws Failure for what the kernel does wrong, std::invalid_argument for an unknown kernel or more threads than .maxntid.
  void launch(const std::string& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, void* const* arguments,
              const LaunchOptions& options = default_options()) const;

 private:
  struct State;
  explicit Program(std::unique_ptr<State> state);
  uint32_t kernel_index(const std::string& kernel) const;
  std::unique_ptr<State> state_;
};

} // namespace simt::ptx
