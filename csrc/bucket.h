// One bucket: which parameters lie in it, how it is cut into ranges, and the exchange that it travels by (exchange.h).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "exchange.h"
#include "exchange_auto.h"
#include "residuals.h"
#if COMPRESSED_DDP_CUDA
#include "stages_device.h"
#endif

namespace compressed_ddp {

enum class Scope : int64_t { kTensor = 0, kBucket = 1, kChunk = 2 };

inline constexpr int64_t kChunkNumel = 4096; // of scope "chunk"; a chunk lies in one segment, whose last one may be shorter

// What identifies a bucket: its parts in order, the gradient's type, and whether the CUDA stages run it. Equal keys share one Bucket.
struct BucketKey {
  std::vector<EntryPtr> entries;
  int64_t presence_numel = 0; // dense fp32 entries behind the last parameter (all_reduce_gradients), 0 for DDP
  GradientType type;
  bool on_device = false; // no part of what the ranks compare
  bool is(const std::vector<EntryPtr>& other_entries, int64_t other_presence_numel, GradientType other_type, bool other_on_device) const {
    return entries == other_entries && presence_numel == other_presence_numel && type == other_type && on_device == other_on_device;
  }
};

// What one step did with a bucket; written by whoever finishes it, read when nothing is in flight.
struct BucketStep {
  int64_t step = -1;
  bool dense = false;
  SentBytes bytes_sent;
  double dense_bytes = 0;
  double gradient_bytes = 0;
  double payload_bytes = 0;
  double gradient_sq = 0;
  double residual_sq = 0;
  double sent_sq = 0;
};

class Bucket {
 public:
  Bucket(BucketKey key, Scope scope, ValueFormat value_format, int64_t min_compress_numel);

  const BucketKey& key() const { return key_; }
  // A tensor with a name of its own (all_reduce_) is used or skipped by itself; the buckets of a model are used together, by one
  // optimizer step, or not at all.
  bool is_independent() const { return !key_.entries.empty() && !key_.entries.front()->parameter.has_value(); }
  std::string name() const; // for messages: the first parameter's name or shape

  // How it travels. Layouts and buffers are made anew only when one of these changes.
  struct Plan {
    ExchangeKind kind;
    int64_t rank, world_size;
    int64_t ranks_per_node; // hierarchical
    double density;
    bool error_feedback;
    bool operator==(const Plan&) const = default;
  };
  bool is_prepared(const Plan& plan) const { return exchange_ != nullptr && plan == plan_; }
  // Allocates: for a plan that it is not prepared for.
  void prepare(const Plan& plan, ResidualStore& residuals, const StageMaker& maker);
  Exchange& exchange() { return *exchange_; }

  // exchange().begin. unused: per entry.
  void begin(const at::Tensor& gradient, const std::vector<uint8_t>& unused, int64_t step);
  void note_sums(); // what the exchange says of this step so far
  // Dense: what this rank holds back of its parameters travels with the gradient. The residuals are gone from the store until restore;
  // forget_sent frees them.
  struct Compensated {
    int64_t begin;  // in the bucket
    at::Tensor sum; // of gradient and residual, fp32
  };
  std::vector<Compensated> take_residuals(const at::Tensor& gradient, const std::vector<uint8_t>& unused, ResidualStore& residuals);
  bool has_taken() const { return !taken_.empty(); }
  // What was sent last comes back, once; or is spent: it reached every rank and the step counts. condition: as in Stages::restore.
  void restore(const uint32_t* condition = nullptr);
  void forget_sent();

#if COMPRESSED_DDP_CUDA
  bool knows_unused(const std::vector<uint8_t>& unused) const; // it is that of the last step
  int64_t num_statistics() const;
  void copy_statistics(cuda::SelectStatistics* to) const;         // [num_statistics], enqueued
  void take_statistics(const cuda::SelectStatistics* statistics); // into `last`
  std::shared_ptr<DeviceReport> report;
  at::Tensor dense_norm; // of the gradient in a dense step; on the device
  bool captured = false; // a CUDA graph holds pointers into its buffers
#endif

  // Numbers and exemptions of the parts, without k: what has to be the same on every rank at every density.
  uint64_t structure_hash() const { return structure_hash_; }
  // The structure, and which parameters these are: two buckets of one structure are compared separately.
  uint64_t identity_hash() const { return identity_hash_; }
  int64_t numel() const { return whole_.numel; }
  int64_t selected_numel(double density) const;               // sum of k when it travels as one range
  BucketSize size(double density, int64_t dense_bytes) const; // likewise

  bool failed = false; // its exchange failed or the result was non-finite; guarded by the engine's progress mutex
  BucketStep last;
  // Kept until they are dropped at a defined place, so that neither is destroyed on a worker thread of the process group. `result`
  // only when it is a Python object.
  std::vector<WorkPtr> works;
  c10::IValue result;

 private:
  struct Part { // one segment of the layout of the whole bucket, or of a shard of it
    size_t entry;
    int64_t entry_offset;
    int64_t begin; // in the bucket, or in the shard
    int64_t numel;
    bool dense;
  };
  struct Parts {
    std::vector<Part> parts;
    int64_t numel = 0;
    void add(size_t entry, int64_t entry_offset, int64_t numel, bool dense, Scope scope);
  };

  BucketRange make_range(const Parts& of, int64_t begin, int64_t end, double density) const;
  std::vector<BucketRange> cut(const Parts& of, int64_t count, double density) const;
  int64_t payload_bytes_of(const Parts& of, ExchangeKind kind, int64_t members, double density) const;
  void point_at_residuals(const Parts& of, BucketRange& range, ResidualStore& residuals, c10::Device device) const;
  // The parts of one of `count` shards; also where they lie in the bucket, if `dealt` is given.
  Parts shard_of(const Shard& shard, Dealt* dealt) const;
  std::unique_ptr<Exchange> make_exchange(const Parts& of, ExchangeKind kind, const Members& members, ExchangeTypes types, const Plan& plan,
                                          ResidualStore& residuals, const StageMaker& maker) const;
  std::unique_ptr<Exchange> make_hierarchical(const Plan& plan, ResidualStore& residuals, const StageMaker& maker) const;

  BucketKey key_;
  Scope scope_;
  ValueFormat value_format_;
  std::vector<uint8_t> dense_; // per segment of all entries, one after another
  Parts whole_;
  uint64_t structure_hash_ = 0;
  uint64_t identity_hash_ = 0;
  Plan plan_{};
  std::unique_ptr<Exchange> exchange_;
  std::vector<std::pair<EntryPtr, at::Tensor>> taken_; // residuals
};

} // namespace compressed_ddp
