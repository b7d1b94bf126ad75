#include "shard_stages.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace compressed_ddp {

ShardStages::ShardStages(const Dealt& dealt, const Node& node, GradientType type)
    : node_(node), type_(type), numel_(dealt.numel), num_entries_(dealt.num_entries), numels_(dealt.numels) {
  constexpr int64_t kMessageNumel = 8; // 16 bytes in every type: then the mean of several reads them so
  const int64_t entry_bytes = element_bytes(type);
  const int64_t largest = *std::max_element(numels_.begin(), numels_.end());
  slot_bytes_ = (kSlotAlignment + largest * entry_bytes + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
  std::vector<int64_t> message_begins;
  int64_t begin = 0;
  for (const int64_t numel : numels_) {
    message_begins.push_back(begin);
    presence_from_.push_back(begin + numel);
    message_numels_.push_back((numel + num_entries_ + kMessageNumel - 1) / kMessageNumel * kMessageNumel);
    begin += message_numels_.back();
  }
  for (const Dealt::Run& run : dealt.runs) {
    to_owners_.push_back({run.bucket_begin, message_begins[static_cast<size_t>(run.shard)] + run.shard_begin, run.numel});
    to_bucket_.push_back({run.bucket_begin, (run.shard * slot_bytes_ + kSlotAlignment) / entry_bytes + run.shard_begin, run.numel});
  }
  const int64_t numbers[] = {static_cast<int64_t>(type), num_entries_, node.shard.count};
  hash_ = hash_bytes(numels_.data(), numels_.size() * sizeof(int64_t), hash_bytes(numbers, sizeof numbers));
}

PayloadHeader ShardStages::header(int64_t step, int64_t shard) const {
  return {kWireVersion, 0, static_cast<uint16_t>(node_.first_rank + shard), static_cast<uint16_t>(step), layout_check(hash_)};
}

std::vector<uint8_t> ShardStages::unused_entries(const std::vector<uint8_t>& unused) const {
  std::vector<uint8_t> all = unused;
  all.resize(static_cast<size_t>(num_entries_), 0);
  return all;
}

void ShardStagesCpu::pack(const void* bucket, const std::vector<uint8_t>& unused, void* shards) {
  const std::vector<uint8_t> all = unused_entries(unused);
  pack_shards({to_owners_, presence_from_, all, bucket, type_, shards});
}

void ShardStagesCpu::mean(const void* received, float* mean) { mean_of_shards(received, type_, count(), own_message_numel(), mean); }

void ShardStagesCpu::seal(uint8_t* slot, int64_t step, uint8_t flags) {
  PayloadHeader mine = header(step, node_.shard.index);
  mine.flags = flags;
  std::memcpy(slot, &mine, sizeof mine);
}

UnpackArguments ShardStagesCpu::unpack_arguments(const uint8_t* slots, int64_t step, void* bucket) const {
  return {to_bucket_, slots, slot_bytes_, count(), header(step, 0), bucket, numel_, type_};
}

void ShardStagesCpu::check(const uint8_t* slots, int64_t step) {
  const std::string problem = check_slots(unpack_arguments(slots, step, nullptr));
  if (!problem.empty()) throw std::runtime_error(problem);
}

bool ShardStagesCpu::unpack(const uint8_t* slots, int64_t step, void* bucket) {
  return unpack_shards(unpack_arguments(slots, step, bucket));
}

} // namespace compressed_ddp
