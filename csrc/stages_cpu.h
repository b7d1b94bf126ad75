// The stages on the CPU (cpu/*.h) under torch's threads.
#pragma once

#include "cpu/compensate_select.h"
#include "stages.h"

namespace compressed_ddp {

// Of selections that never overlap in time: those that the hook makes, of all buckets of an engine.
struct SelectScratch {
  CompensateSelect::Scratch candidates;
  Entries selected;
};

class StagesCpu final : public Stages {
 public:
  // scratch: nullptr = one of its own, for selections on threads of the process group.
  StagesCpu(BucketRange range, bool may_drop, SelectScratch* scratch);

  StageSums compensate_select_and_encode(const void* gradient, GradientType type, const Unused& unused, Sender sender,
                                         uint8_t* payload) override;
  void check(const Received& received) override;
  bool decode_apply(const Received& received, void* bucket, GradientType type) override;
  double return_dropped(const uint8_t* payload, const void* bucket, GradientType type) override;
  double add_lost(const uint8_t* payload, const float* lost, float factor, GradientType type, const uint32_t* condition) override;
  void restore(const uint8_t* payload, const uint32_t* condition) override;
  void forget_sent() override { sent_ = false; }
  void clear(float* data, int64_t numel) override;

 private:
  Entries entries_of(const uint8_t* payload) const;

  CompensateSelect compensate_select_;
  std::unique_ptr<SelectScratch> own_scratch_;
  SelectScratch* scratch_;
  std::vector<uint32_t> returned_; // bits, of the last payload; empty without may_drop
  bool sent_ = false;              // the last payload holds entries that are missing from the residual
};

} // namespace compressed_ddp
