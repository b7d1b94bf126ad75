// How the device tells the host what it has found out, without the host's waiting.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/decode_apply.h"

namespace compressed_ddp {

// Page-locked host memory, to which a stream copies without the host's waiting.
class PinnedBytes {
 public:
  PinnedBytes(c10::Device device, size_t bytes);
  ~PinnedBytes();
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;

  template <typename T>
  T* at() const {
    return static_cast<T*>(bytes_);
  }
  size_t size() const { return size_; }

 private:
  c10::Device device_;
  void* bytes_ = nullptr;
  size_t size_;
};

// What the device tells the host without being waited for: copied to pinned memory behind every decode. Made inside a scope of
// `stream`, as its memory belongs to that stream.
class DeviceReport {
 public:
  DeviceReport(c10::Device device, cudaStream_t stream);

  cuda::DecodeStatus* status() const;               // on the device
  const uint32_t* step_is_bad() const;              // of it, on the device
  bool read_step_is_bad(cudaStream_t stream) const; // waits
  void copy_to_host(cudaStream_t stream);
  void clear_step(cudaStream_t stream); // step_is_bad = 0
  // 1 + the rank of a payload that was not what it should be, as far as the host knows yet, once; 0 = none. Never waits: the collective
  // behind the damaged payload may be one that nobody joins.
  uint32_t take_bad_rank(cudaStream_t stream);
  void clear(cudaStream_t stream); // all of it, and what copies on their way to the host are about to say

 private:
  void begin_generation(cudaStream_t stream); // bad_rank = 0; copies of earlier generations count no longer

  at::Tensor device_;
  PinnedBytes host_;
  uint32_t generation_ = 0; // four equal bytes, so that a memset writes it
};

} // namespace compressed_ddp
