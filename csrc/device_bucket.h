// One bucket on a CUDA device: the plan of its layout, its buffers, and its stages as launches on the engine's stream. The
// counterpart of what Bucket does on the CPU. Stages enqueue and return; what waits for the device says so.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cuda/compensate_select.h"
#include "cuda/decode_apply.h"
#include "cuda/restore.h"
#include "device_stream.h"

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

class DeviceBucket {
 public:
  // `residuals`: per segment, nullptr for dense ones; empty = no error feedback.
  // Waits: tables are copied.
  DeviceBucket(const Layout& layout, GradientType type, c10::Device device, int64_t world_size, std::vector<float*> residuals,
               cudaStream_t stream);

  const at::Tensor& payload() const { return payload_; }
  at::Tensor& gathered() { return gathered_; }

  // Waits when `unused` is not what it was before.
  void compensate_select_and_encode(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank, int64_t step,
                                    cudaStream_t stream);
  bool knows_unused(const std::vector<uint8_t>& unused) const { return unused == uploaded_unused_; }
  void decode_apply(const at::Tensor& gradient, int64_t step, DeviceReport& report, cudaStream_t stream);
  // Puts what was sent last back into the residual, once: the device knows whether it is still out, since replays of a CUDA graph send
  // and restore without the host. `condition`: on the device, see RestoreArguments.
  void restore(const uint32_t* condition, cudaStream_t stream);
  void forget_sent(cudaStream_t stream);                                 // it is spent, or has come back
  void copy_statistics(cuda::SelectStatistics* to, cudaStream_t stream); // of the last step, to pinned memory

 private:
  void upload_unused(const std::vector<uint8_t>& unused, cudaStream_t stream);

  Layout layout_;
  GradientType type_;
  int64_t world_size_;
  cuda::Plan plan_;
  at::Tensor tables_;            // of the plan, then one residual pointer and one `unused` byte per segment
  at::Tensor workspace_;         // of the plan, then the statistics and `sent`
  cuda::DevicePlan device_plan_; // pointers into both
  at::Tensor payload_;
  at::Tensor gathered_;
  float* const* residuals_ = nullptr; // on the device
  uint8_t* unused_ = nullptr;         // on the device
  std::vector<uint8_t> uploaded_unused_;
  cuda::SelectStatistics* statistics_ = nullptr; // on the device
  uint32_t* sent_ = nullptr;                     // on the device: payload_ holds entries that are missing from the residual
};

} // namespace compressed_ddp
