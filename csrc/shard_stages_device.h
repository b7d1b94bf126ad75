// shard_stages.h on a CUDA device: launches on the engine's stream.
#pragma once

#include <ATen/core/Tensor.h>

#include "device_report.h"
#include "exchange.h"

namespace compressed_ddp {

class ShardStagesDevice final : public ShardStages {
 public:
  // Waits: tables are copied.
  ShardStagesDevice(const Dealt& dealt, const Node& node, GradientType type, c10::Device device, cudaStream_t stream,
                    std::shared_ptr<DeviceReport> report);

  void pack(const void* bucket, const std::vector<uint8_t>& unused, void* shards) override; // waits when `unused` has changed
  void mean(const void* received, float* mean) override;
  void seal(uint8_t* slot, int64_t step, uint8_t flags) override;
  void check(const uint8_t*, int64_t) override {}
  bool unpack(const uint8_t* slots, int64_t step, void* bucket) override;
  bool knows_unused(const std::vector<uint8_t>& unused) const override { return unused_entries(unused) == uploaded_unused_; }

 private:
  cudaStream_t stream_;
  std::shared_ptr<DeviceReport> report_;
  int64_t largest_piece_numel_ = 0;
  at::Tensor tables_; // all below, on the device
  const ShardPiece *to_owners_at_ = nullptr, *to_bucket_at_ = nullptr;
  const int64_t* presence_from_at_ = nullptr;
  uint8_t* unused_at_ = nullptr;
  std::vector<uint8_t> uploaded_unused_;
};

} // namespace compressed_ddp
