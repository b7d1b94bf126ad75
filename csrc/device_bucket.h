// One bucket on a CUDA device: the plan of its layout, its buffers, and its stages as launches on the engine's stream. The
// counterpart of what Bucket does on the CPU; everything here enqueues and returns.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cuda/compensate_select.h"
#include "cuda/decode_apply.h"
#include "cuda/restore.h"
#include "device_stream.h"

namespace compressed_ddp {

// What the device tells the host without being waited for: copied to pinned memory behind every decode.
class DeviceReport {
 public:
  DeviceReport(c10::Device device, cudaStream_t stream);
  ~DeviceReport();
  DeviceReport(const DeviceReport&) = delete;
  DeviceReport& operator=(const DeviceReport&) = delete;

  cuda::DecodeStatus* status() const;               // on the device
  const uint32_t* step_is_bad() const;              // of it, on the device
  bool read_step_is_bad(cudaStream_t stream) const; // waits
  void copy_to_host(cudaStream_t stream);
  void clear_step(cudaStream_t stream); // step_is_bad = 0
  uint32_t take_bad_rank(
      cudaStream_t stream); // 1 + the rank of a payload that was not what it should be, as far as the host knows yet; clears it

 private:
  at::Tensor device_;
  cuda::DecodeStatus* host_ = nullptr; // pinned
};

class DeviceBucket {
 public:
  // `residuals`: per segment, nullptr for dense ones; empty = no error feedback.
  DeviceBucket(const Layout& layout, GradientType type, c10::Device device, int64_t world_size, std::vector<float*> residuals,
               cudaStream_t stream);

  const at::Tensor& payload() const { return payload_; }
  at::Tensor& gathered() { return gathered_; }

  void compensate_select_and_encode(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank, int64_t step,
                                    cudaStream_t stream);
  void decode_apply(const at::Tensor& gradient, int64_t step, DeviceReport& report, cudaStream_t stream);
  // `condition`: on the device, see RestoreArguments.
  void restore(const uint32_t* condition, cudaStream_t stream);
  cuda::SelectStatistics statistics(cudaStream_t stream); // of the last step; waits for it

 private:
  void upload_unused(const std::vector<uint8_t>& unused, cudaStream_t stream);

  Layout layout_;
  GradientType type_;
  int64_t world_size_;
  cuda::Plan plan_;
  at::Tensor tables_;            // of the plan, then one residual pointer and one `unused` byte per segment
  at::Tensor workspace_;         // of the plan, then the statistics
  cuda::DevicePlan device_plan_; // pointers into both
  at::Tensor payload_;
  at::Tensor gathered_;
  float* const* residuals_ = nullptr; // on the device
  uint8_t* unused_ = nullptr;         // on the device
  std::vector<uint8_t> uploaded_unused_;
  cuda::SelectStatistics* statistics_ = nullptr;
};

} // namespace compressed_ddp
