// The stages on a CUDA device (cuda/*.h): the plan of one layout, its scratch, and launches on the engine's stream. They enqueue and
// return; what waits for the device says so.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "cuda/compensate_select.h"
#include "device_report.h"
#include "exchange.h"

namespace compressed_ddp {

class StagesDevice final : public Stages {
 public:
  // types: of the gradients that the stages meet, so that no kernel is loaded in the middle of a step. Waits: tables are copied.
  StagesDevice(BucketRange range, bool may_drop, std::vector<GradientType> types, c10::Device device, cudaStream_t stream,
               std::shared_ptr<DeviceReport> report);

  // Waits when `unused` is not what it was before.
  StageSums compensate_select_and_encode(const void* gradient, GradientType type, const Unused& unused, Sender sender,
                                         uint8_t* payload) override;
  void check(const Received&) override {}
  bool decode_apply(const Received& received, void* bucket, GradientType type) override;
  double return_dropped(const uint8_t* payload, const void* bucket, GradientType type) override;
  double add_lost(const uint8_t* payload, const float* lost, float factor, GradientType type, const uint32_t* condition) override;
  void clear(float* data, int64_t numel) override;
  // Once: the device knows whether something is still out, since replays of a CUDA graph send and restore without the host.
  void restore(const uint8_t* payload, const uint32_t* condition) override;
  void forget_sent() override;

  bool knows_unused(const std::vector<uint8_t>& unused) const override { return range_.unused_segments(unused) == uploaded_unused_; }
  void copy_statistics(cuda::SelectStatistics* to) const; // of the last step, to pinned memory

 private:
  void upload_unused(const std::vector<uint8_t>& of_segments);

  cudaStream_t stream_;
  std::shared_ptr<DeviceReport> report_;
  cuda::Plan plan_;
  at::Tensor tables_;                 // of the plan, then one residual pointer and one `unused` byte per segment
  at::Tensor workspace_;              // of the plan, then the statistics, `sent`, and the bits of return_dropped
  cuda::DevicePlan device_plan_;      // pointers into both
  float* const* residuals_ = nullptr; // on the device
  const int32_t* entries_ = nullptr;  // on the device: of each segment
  uint8_t* unused_ = nullptr;         // on the device
  std::vector<uint8_t> uploaded_unused_;
  cuda::SelectStatistics* statistics_ = nullptr; // on the device
  uint32_t* sent_ = nullptr;                     // on the device: the last payload holds entries that are missing from the residual
  uint32_t* returned_ = nullptr;                 // on the device: bits of those that have come back; nullptr without may_drop
};

// As NanIfFlagged, enqueued on `stream`.
void nan_if_flagged_on_device(const uint8_t* payloads, int64_t stride, int64_t count, void* bucket, int64_t numel, GradientType type,
                              DeviceReport& report, cudaStream_t stream);

} // namespace compressed_ddp
