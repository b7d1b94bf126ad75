// The stages of the data path for one range of a bucket on one device: what the exchanges are written over. stages_cpu.h runs them on the
// calling thread, stages_device.h enqueues them on the engine's stream.
#pragma once

#include <functional>
#include <memory>

#include "bucket_range.h"
#include "cpu/decode.h"
#include "cpu/float_types.h"

namespace compressed_ddp {

struct StageSums { // CPU only; on a device they are read when somebody asks (Stages of stages_device.h)
  double gradient_sq = 0, residual_sq = 0, sent_sq = 0;
  StageSums& operator+=(const StageSums& other) {
    gradient_sq += other.gradient_sq;
    residual_sq += other.residual_sq;
    sent_sq += other.sent_sq;
    return *this;
  }
};

struct Sender { // what a header says of who wrote it
  int64_t rank, step;
};

// The entries (parameters) whose part of the gradient nobody uses: zeros travel, and the residual stays as it is.
struct Unused {
  std::vector<uint8_t> of_entries; // may be shorter: entries behind it are used
  // Or known where the stages run: fp32 per entry, 0 = unused; what of_entries says counts for nothing then.
  const float* presence = nullptr;
};

struct Received { // payloads of one layout, one after another
  const uint8_t* payloads;
  int64_t count;
  Senders senders;
  int64_t step;
};

class Stages {
 public:
  explicit Stages(BucketRange range) : range_(std::move(range)), payload_bytes_(compressed_ddp::payload_bytes(range_.layout)) {}
  virtual ~Stages() = default;
  Stages(const Stages&) = delete;
  Stages& operator=(const Stages&) = delete;

  const BucketRange& range() const { return range_; }
  const Layout& layout() const { return range_.layout; }
  int64_t payload_bytes() const { return payload_bytes_; }
  bool has_residuals() const { return !range_.residuals.empty(); }

  // Stages 1 and 2. gradient: [numel] of `type`, this range of it. payload: [payload_bytes], complete afterwards; its entries are missing
  // from the residual until restore or forget_sent.
  virtual StageSums compensate_select_and_encode(const void* gradient, GradientType type, const Unused& unused, Sender sender,
                                                 uint8_t* payload) = 0;
  // Whether the next step with this `unused` is enqueued without a wait.
  virtual bool knows_unused(const std::vector<uint8_t>&) const { return true; }
  // Stage 4 in two halves. check throws, and nothing has been written, when a payload is not what it should be (on a device: never,
  // decode_apply writes NaN and reports). decode_apply writes `bucket` [numel] of `type`; returns whether it is non-finite somewhere (on a
  // device: false, the report knows).
  virtual void check(const Received& received) = 0;
  virtual bool decode_apply(const Received& received, void* bucket, GradientType type) = 0;

  // Entries of the payload that `bucket`, the result, does not hold go back to the residual (cpu/return_dropped.h). Returns by how much
  // the squares of the residual have grown (on a device: 0).
  virtual double return_dropped(const uint8_t* payload, const void* bucket, GradientType type) = 0;
  // What the rounding of this range's averages lost goes to the residual, while something sent is still out (cpu/return_dropped.h).
  // payload: of the averages; type: of the result. condition: as in restore. Returns the same.
  virtual double add_lost(const uint8_t* payload, const float* lost, float factor, GradientType type, const uint32_t* condition) = 0;

  // What was sent last and has not come back yet goes back to the residual, once. condition: on a device, nothing happens if it points to
  // 0 then; nullptr = always.
  virtual void restore(const uint8_t* payload, const uint32_t* condition) = 0;
  virtual void forget_sent() = 0; // it is spent

  virtual void clear(float* data, int64_t numel) = 0; // zeros

 protected:
  BucketRange range_;

 private:
  int64_t payload_bytes_;
};

// Makes the stages of a range, on the device of the bucket. may_drop: return_dropped is going to be called.
using MakeStages = std::function<std::unique_ptr<Stages>(BucketRange, bool may_drop)>;

} // namespace compressed_ddp
