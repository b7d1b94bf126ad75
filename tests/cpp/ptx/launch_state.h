// What the threads of one launch share: the functions, and the constants of each with this kernel's shared variables placed.
#pragma once

#include <memory>
#include <vector>

#include "code.h"

namespace simt::ptx {

struct SharedVariable {
  uint64_t bytes = 0, alignment = 1;
  bool is_dynamic = false;
};

class LaunchState {
 public:
  // Places the shared variables that the kernel and what it calls use.
  LaunchState(const std::vector<Code>& functions, const std::vector<SharedVariable>& shared_variables, uint32_t kernel,
              size_t dynamic_shared_bytes, uint64_t instruction_budget);

  size_t shared_bytes() const { return static_shared_bytes_ + dynamic_shared_bytes_; }
  const Code& kernel() const { return functions_[kernel_]; }

  // Runs the calling CUDA thread from its first instruction to its last; `arguments` as cudaLaunchKernel gets them.
  void run_thread(void* const* arguments) const;

  // Begins a call: `site` says where its results go, nullptr for the kernel itself.
  void enter(PtxThread& thread, uint32_t function, const CallSite* site) const;
  static void leave(PtxThread& thread); // ends the running call

 private:
  void place_shared_variables(const std::vector<SharedVariable>& variables, const std::vector<uint32_t>& reachable);
  uint64_t special(const Thread& thread, Special special) const;
  std::byte* borrow_private_memory() const;

  const std::vector<Code>& functions_;
  uint32_t kernel_;
  size_t dynamic_shared_bytes_, static_shared_bytes_ = 0;
  uint64_t instruction_budget_;
  size_t private_bytes_ = 0; // of each thread
  std::vector<std::vector<uint64_t>> constants_;
  // Threads hand it on to those that begin after they have left. The launch owns it, as a failed launch abandons its threads.
  mutable std::vector<std::unique_ptr<std::byte[]>> private_memory_;
  mutable std::vector<std::byte*> free_private_memory_;
};

} // namespace simt::ptx
