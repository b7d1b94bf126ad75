// What exchange="hierarchical" does to whole gradients inside a node, on one device: cpu/shards.h and cuda/shards.h behind one interface,
// as stages.h is for payloads. The base class knows where everything lies.
#pragma once

#include <memory>
#include <vector>

#include "cpu/shards.h"
#include "shard.h"

namespace compressed_ddp {

// How a bucket is dealt out among the ranks of a node.
struct Dealt {
  std::vector<int64_t> numels; // per shard
  struct Run {                 // entries that lie together
    int64_t shard, shard_begin, bucket_begin, numel;
  };
  std::vector<Run> runs;   // they cover the bucket
  int64_t num_entries = 0; // parameters, of which each has a presence
  int64_t numel = 0;       // of the bucket
};

struct Node {
  int64_t first_rank; // of the job; the others are the ranks behind it
  Shard shard;        // that this rank owns, of as many as the node has ranks
};

class ShardStages {
 public:
  ShardStages(const Dealt& dealt, const Node& node, GradientType type);
  virtual ~ShardStages() = default;
  ShardStages(const ShardStages&) = delete;
  ShardStages& operator=(const ShardStages&) = delete;

  // Entries in one all-to-all: to every owner, and from every rank to this one.
  const std::vector<int64_t>& message_numels() const { return message_numels_; }
  int64_t own_message_numel() const { return message_numels_[own()]; }
  int64_t own_numel() const { return numels_[own()]; }
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t count() const { return node_.shard.count; }

  // shards: [sum of message_numels] of the gradient's type, written. unused: per entry, may be shorter.
  virtual void pack(const void* bucket, const std::vector<uint8_t>& unused, void* shards) = 0;
  // received: [count, own_message_numel]. mean: fp32 [own_message_numel], written: the shard, then the presence of each entry.
  virtual void mean(const void* received, float* mean) = 0;
  // The header of this rank's slot. flags: on the CPU; on a device what the report knows counts as well.
  virtual void seal(uint8_t* slot, int64_t step, uint8_t flags) = 0;
  // Throws, and nothing has been written, when a slot is not what it should be (on a device: never, unpack writes NaN and reports).
  virtual void check(const uint8_t* slots, int64_t step) = 0;
  // Returns whether some slot is flagged as non-finite: the bucket is NaN then (on a device: false, the report knows).
  virtual bool unpack(const uint8_t* slots, int64_t step, void* bucket) = 0;
  virtual bool knows_unused(const std::vector<uint8_t>&) const { return true; }

 protected:
  size_t own() const { return static_cast<size_t>(node_.shard.index); }
  PayloadHeader header(int64_t step, int64_t shard) const;
  std::vector<uint8_t> unused_entries(const std::vector<uint8_t>& unused) const; // of all entries

  Node node_;
  GradientType type_;
  int64_t numel_;
  int64_t num_entries_;
  std::vector<int64_t> numels_, message_numels_;
  std::vector<int64_t> presence_from_;            // per shard, in a buffer of messages
  std::vector<ShardPiece> to_owners_, to_bucket_; // of messages, of slots
  int64_t slot_bytes_ = 0;
  uint64_t hash_ = 0;
};

class ShardStagesCpu final : public ShardStages {
 public:
  using ShardStages::ShardStages;
  void pack(const void* bucket, const std::vector<uint8_t>& unused, void* shards) override;
  void mean(const void* received, float* mean) override;
  void seal(uint8_t* slot, int64_t step, uint8_t flags) override;
  void check(const uint8_t* slots, int64_t step) override;
  bool unpack(const uint8_t* slots, int64_t step, void* bucket) override;

 private:
  UnpackArguments unpack_arguments(const uint8_t* slots, int64_t step, void* bucket) const;
};

} // namespace compressed_ddp
