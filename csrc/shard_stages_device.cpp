#include "shard_stages_device.h"

#include <algorithm>
#include <cstring>

#include "cuda/launch.h"
#include "cuda/shards.h"

namespace compressed_ddp {

ShardStagesDevice::ShardStagesDevice(const Dealt& dealt, const Node& node, GradientType type, c10::Device device, cudaStream_t stream,
                                     std::shared_ptr<DeviceReport> report)
    : ShardStages(dealt, node, type), stream_(stream), report_(std::move(report)) {
  for (const ShardPiece& piece : to_owners_) largest_piece_numel_ = std::max(largest_piece_numel_, piece.numel);
  const size_t piece_bytes = to_owners_.size() * sizeof(ShardPiece), presence_bytes = presence_from_.size() * sizeof(int64_t);
  std::vector<uint8_t> tables(2 * piece_bytes + presence_bytes + static_cast<size_t>(num_entries_));
  std::memcpy(tables.data(), to_owners_.data(), piece_bytes);
  std::memcpy(tables.data() + piece_bytes, to_bucket_.data(), piece_bytes);
  std::memcpy(tables.data() + 2 * piece_bytes, presence_from_.data(), presence_bytes);
  tables_ = bytes_on(device, static_cast<int64_t>(tables.size()));
  auto* at = tables_.data_ptr<uint8_t>();
  to_owners_at_ = reinterpret_cast<const ShardPiece*>(at);
  to_bucket_at_ = reinterpret_cast<const ShardPiece*>(at + piece_bytes);
  presence_from_at_ = reinterpret_cast<const int64_t*>(at + 2 * piece_bytes);
  unused_at_ = at + 2 * piece_bytes + presence_bytes;
  uploaded_unused_.assign(static_cast<size_t>(num_entries_), 0);
  cuda::load_shards(type);
  cuda::check(cudaMemcpyAsync(at, tables.data(), tables.size(), cudaMemcpyHostToDevice, stream_), "copying to the device");
  cuda::check(cudaStreamSynchronize(stream_), "preparing a bucket"); // `tables` is pageable memory of this call
}

void ShardStagesDevice::pack(const void* bucket, const std::vector<uint8_t>& unused, void* shards) {
  const std::vector<uint8_t> all = unused_entries(unused);
  if (all != uploaded_unused_) { // hardly ever
    cuda::check(cudaMemcpyAsync(unused_at_, all.data(), all.size(), cudaMemcpyHostToDevice, stream_), "copying to the device");
    cuda::check(cudaStreamSynchronize(stream_), "uploading which parameters are unused");
    uploaded_unused_ = all;
  }
  cuda::pack_shards({to_owners_at_, static_cast<int64_t>(to_owners_.size()), largest_piece_numel_, presence_from_at_, count(), unused_at_,
                     num_entries_, bucket, type_, shards},
                    stream_);
}

void ShardStagesDevice::mean(const void* received, float* mean) {
  cuda::mean_of_shards(received, type_, count(), own_message_numel(), mean, stream_);
}

void ShardStagesDevice::seal(uint8_t* slot, int64_t step, uint8_t) {
  cuda::seal_slot(slot, header(step, node_.shard.index), report_->status(), stream_);
}

bool ShardStagesDevice::unpack(const uint8_t* slots, int64_t step, void* bucket) {
  cuda::unpack_shards({to_bucket_at_, static_cast<int64_t>(to_bucket_.size()), largest_piece_numel_, slots, slot_bytes_, count(),
                       header(step, 0), bucket, type_, report_->status()},
                      stream_);
  report_->copy_to_host(stream_);
  return false;
}

} // namespace compressed_ddp
