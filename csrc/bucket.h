// One bucket on its way: compensate_select_ -> encode -> exchange -> decode_apply_, with the buffers that it needs each step.
// The engine decides what runs; here is how.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <memory>
#include <string>
#include <vector>

#include "cpu/compensate_select.h"
#include "cpu/decode.h"
#if COMPRESSED_DDP_CUDA
#include "device_bucket.h"
#endif
#include "layout.h"
#include "residuals.h"

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
  double bytes_sent = 0;
  double dense_bytes = 0;
  double gradient_bytes = 0;
  double payload_bytes = 0;
  double gradient_sq = 0;
  double residual_sq = 0;
  double sent_sq = 0;
};

// Of the stages on the CPU; shared by all buckets of an engine, whose selections never overlap in time.
struct BucketScratch {
  CompensateSelect::Scratch candidates;
  Entries selected;
};

class Bucket {
 public:
  Bucket(BucketKey key, Scope scope, ValueFormat value_format, int64_t min_compress_numel);

  const BucketKey& key() const { return key_; }
  // A tensor with a name of its own (all_reduce_) is used or skipped by itself; the buckets of a model are used together, by one
  // optimizer step, or not at all.
  bool is_independent() const { return !key_.entries.empty() && !key_.entries.front()->parameter.has_value(); }
  std::string name() const; // for messages: the first parameter's name or shape

  // Layout for this density and buffers for this world size; allocates only when one of them changed.
  void prepare(double density, int64_t world_size, ResidualStore* residuals, BucketScratch& scratch);

#if COMPRESSED_DDP_CUDA
  // The same stages on a device (device_bucket.h), enqueued on `stream`. restore_on_device: only if `condition` says so, nullptr = always.
  // What was sent is out no longer after it. Whether it was until then, the device knows, not `sent_`.
  bool knows_unused(const std::vector<uint8_t>& unused) const; // it is that of the last step
  bool is_prepared_on_device(double density, int64_t world_size, const ResidualStore* residuals) const;
  void prepare_on_device(double density, int64_t world_size, ResidualStore* residuals, c10::Device device, cudaStream_t stream);
  void compensate_select_and_encode_on_device(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank, int64_t step,
                                              cudaStream_t stream);
  void restore_on_device(const uint32_t* condition, cudaStream_t stream);
  void take_statistics(const cuda::SelectStatistics& sums); // into `last`
  DeviceBucket* on_device() const { return device_.get(); }
  std::shared_ptr<DeviceReport> report;
  at::Tensor dense_norm; // of the gradient in a dense step; on the device
  bool captured = false; // a CUDA graph holds pointers into its buffers
#endif

  // Stages 1 and 2. gradient: flat CPU tensor [layout numel]. unused: per entry. Afterwards payload() is complete.
  void compensate_select_and_encode(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank, int64_t step);
  const at::Tensor& payload() const { return payload_; }
  at::Tensor& gathered() { return gathered_; } // flat: [world_size * payload_bytes]

  // Stage 4. Throws (the bucket untouched) when a payload is not what it should be. Returns whether the result, the same on every rank, is
  // non-finite somewhere.
  bool decode_apply(at::Tensor& gradient, int64_t step);

  // Puts what was sent last back into the residual, once.
  void restore();
  // What was sent last is spent: it reached every rank and the step counts.
  void forget_sent() { sent_ = false; }

  // Numbers and exemptions of the parts, without k: what has to be the same on every rank at every density.
  uint64_t structure_hash() const { return structure_hash_; }
  // The structure, and which parameters these are: two buckets of one structure are compared separately.
  uint64_t identity_hash() const { return identity_hash_; }
  int64_t numel() const;
  int64_t selected_numel(double density) const; // sum of k

  bool failed = false; // its exchange failed or the result was non-finite; guarded by the engine's progress mutex
  BucketStep last;
  // Kept until they are dropped at a defined place, so that neither is destroyed on a worker thread of the process group. `result`
  // only when it is a Python object.
  c10::intrusive_ptr<c10d::Work> work;
  c10::IValue result;

 private:
  Layout make_layout(double density) const;
  void point_at_residuals(ResidualStore* residuals, c10::Device device);
  void note_sent(const std::vector<uint8_t>& unused);

  struct Part { // one segment of the layout
    size_t entry;
    int64_t offset; // in the entry
    int64_t numel;
    bool dense;
  };

  BucketKey key_;
  Scope scope_;
  ValueFormat value_format_;
  std::vector<Part> parts_;
  uint64_t structure_hash_ = 0;
  uint64_t identity_hash_ = 0;
  double density_ = 0;
  int64_t world_size_ = 0;
  bool error_feedback_ = false;
  Layout layout_;
  std::unique_ptr<CompensateSelect> compensate_select_;
  std::vector<float*> residuals_; // per segment
  std::vector<uint8_t> unused_;   // per segment, of the last step
  at::Tensor payload_;
  at::Tensor gathered_;
  Entries decoded_;
  BucketScratch* scratch_ = nullptr;
#if COMPRESSED_DDP_CUDA
  std::unique_ptr<DeviceBucket> device_;
#endif
  bool sent_ = false; // payload_ holds entries that are missing from the residual
};

} // namespace compressed_ddp
