#include "stages_cpu.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "cpu/decode_apply.h"
#include "cpu/encode.h"
#include "cpu/restore.h"
#include "cpu/return_dropped.h"
#include "parallel_for.h"

namespace compressed_ddp {

StagesCpu::StagesCpu(BucketRange range, bool may_drop, SelectScratch* scratch) : Stages(std::move(range)), compensate_select_(layout()) {
  if (scratch == nullptr) own_scratch_ = std::make_unique<SelectScratch>();
  scratch_ = scratch == nullptr ? own_scratch_.get() : scratch;
  compensate_select_.use_scratch(scratch_->candidates);
  if (may_drop) returned_.resize(static_cast<size_t>(layout().selected_numel + 31) / 32);
}

StageSums StagesCpu::compensate_select_and_encode(const void* gradient, GradientType type, const Unused& unused, Sender sender,
                                                  uint8_t* payload) {
  std::vector<uint8_t> of_segments = range_.unused_segments(unused.of_entries);
  if (unused.presence != nullptr)
    for (size_t s = 0; s < of_segments.size(); ++s) of_segments[s] = unused.presence[range_.entries[s]] == 0;
  const auto selected_numel = static_cast<size_t>(layout().selected_numel);
  Entries& entries = scratch_->selected;
  if (entries.values.size() < selected_numel) { // the one that comes last, should there be no memory for it
    entries.indices.resize(selected_numel);
    entries.values.resize(selected_numel);
  }
  std::fill(returned_.begin(), returned_.end(), 0u);
  float* const* residuals = has_residuals() ? range_.residuals.data() : nullptr;
  const CompensateSelectStatistics selected =
      compensate_select(compensate_select_, {gradient, type, residuals, of_segments.data(), entries.indices.data(), entries.values.data()},
                        torch_parallel_for);
  const EncodeStatistics dense = encode_dense(layout(), gradient, type, of_segments.data(), payload);
  const bool non_finite = selected.non_finite + dense.non_finite > 0;
  float* const* not_yet_kept = layout().value_format == ValueFormat::kBFloat16 ? nullptr : residuals;
  const double lost_sq =
      encode_selected(layout(), {entries.values.data(), entries.indices.data(), not_yet_kept, non_finite, payload}, torch_parallel_for);
  sent_ = has_residuals();
  encode_header(layout(), sender.rank, sender.step, non_finite, payload);
  return {selected.gradient_sq + dense.gradient_sq, selected.residual_sq + lost_sq, selected.sent_sq - lost_sq};
}

void StagesCpu::check(const Received& received) {
  const std::string problem =
      check_payloads(layout(), received.payloads, received.count, received.senders, received.step, torch_parallel_for);
  if (!problem.empty()) throw std::runtime_error(problem);
}

bool StagesCpu::decode_apply(const Received& received, void* bucket, GradientType type) {
  return compressed_ddp::decode_apply(layout(), {received.payloads, received.count, bucket, type}, torch_parallel_for);
}

Entries StagesCpu::entries_of(const uint8_t* payload) const {
  Entries own;
  const std::string problem = decode_own(layout(), payload, own, torch_parallel_for);
  TORCH_INTERNAL_ASSERT(problem.empty(), problem);
  return own;
}

double StagesCpu::return_dropped(const uint8_t* payload, const void* bucket, GradientType type) {
  if (!sent_) return 0;
  return compressed_ddp::return_dropped(layout(), entries_of(payload), bucket, type, range_.residuals.data(), returned_.data());
}

double StagesCpu::add_lost(const uint8_t* payload, const float* lost, float factor, GradientType type, const uint32_t*) {
  if (!sent_) return 0;
  return compressed_ddp::add_lost(layout(), entries_of(payload), lost, factor, type, range_.residuals.data());
}

void StagesCpu::clear(float* data, int64_t numel) { std::fill_n(data, numel, 0.0f); }

void StagesCpu::restore(const uint8_t* payload, const uint32_t*) {
  if (!sent_) return;
  compressed_ddp::restore(layout(), entries_of(payload), range_.residuals.data(), returned_.empty() ? nullptr : returned_.data());
  sent_ = false;
}

} // namespace compressed_ddp
