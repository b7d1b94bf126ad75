#include "bucket.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/decode_apply.h"
#include "cpu/encode.h"
#include "cpu/restore.h"
#include "parallel_for.h"
#include "wire_format.h"

namespace compressed_ddp {
namespace {

uint8_t unused_of(size_t entry, const std::vector<uint8_t>& unused) { return entry < unused.size() ? unused[entry] : 0; }

} // namespace

Bucket::Bucket(BucketKey key, Scope scope, ValueFormat value_format, int64_t min_compress_numel)
    : key_(std::move(key)), scope_(scope), value_format_(value_format) {
  for (size_t e = 0; e < key_.entries.size(); ++e) {
    const Entry& entry = *key_.entries[e];
    int64_t offset = 0;
    for (const int64_t numel : entry.segment_numels) {
      const bool dense = entry.exempt || entry.is_vector || numel < min_compress_numel || numel == 0;
      const int64_t part_numel = scope_ == Scope::kChunk && !dense ? kChunkNumel : std::max<int64_t>(numel, 1);
      for (int64_t at = 0; at < numel || at == 0; at += part_numel)
        parts_.push_back({e, offset + at, std::min(part_numel, numel - at), dense});
      offset += numel;
    }
  }
  if (key_.presence_numel > 0) parts_.push_back({key_.entries.size(), 0, key_.presence_numel, true});

  structure_hash_ = hash_bytes(&key_.type, sizeof key_.type);
  for (const Part& part : parts_) {
    const int64_t numbers[] = {static_cast<int64_t>(part.entry), part.numel, part.dense};
    structure_hash_ = hash_bytes(numbers, sizeof numbers, structure_hash_);
  }
  identity_hash_ = structure_hash_;
  for (const EntryPtr& entry : key_.entries) { // neither changes when names become known later, or a state is loaded
    if (entry->parameter.has_value())
      identity_hash_ = hash_bytes(&entry->ordinal, sizeof entry->ordinal, identity_hash_);
    else
      identity_hash_ = hash_bytes(entry->name.c_str(), entry->name.size() + 1, identity_hash_);
  }
}

std::string Bucket::name() const {
  if (key_.entries.empty()) return "(empty)";
  const Entry& first = *key_.entries.front();
  if (!first.name.empty()) return first.name;
  std::string text = "a parameter of shape [";
  for (size_t i = 0; i < first.sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(first.sizes[i]);
  return text + "]";
}

int64_t Bucket::numel() const {
  int64_t numel = 0;
  for (const Part& part : parts_) numel += part.numel;
  return numel;
}

Layout Bucket::make_layout(double density) const {
  std::vector<int64_t> numels, groups, group_numels;
  for (const Part& part : parts_) {
    numels.push_back(part.numel);
    if (part.dense) {
      groups.push_back(kDenseGroup);
      continue;
    }
    if (scope_ != Scope::kBucket || group_numels.empty()) group_numels.push_back(0);
    group_numels.back() += part.numel;
    groups.push_back(static_cast<int64_t>(group_numels.size()) - 1);
  }
  std::vector<int64_t> k;
  for (const int64_t numel : group_numels) k.push_back(selection_k(density, numel));
  return Layout::make(numels, groups, k, value_format_);
}

int64_t Bucket::selected_numel(double density) const { return make_layout(density).selected_numel; }

void Bucket::point_at_residuals(ResidualStore* residuals, c10::Device device) {
  residuals_.assign(parts_.size(), nullptr);
  for (size_t s = 0; s < parts_.size(); ++s) {
    if (parts_[s].dense || residuals == nullptr) continue;
    Entry& entry = *key_.entries[parts_[s].entry];
    residuals->ensure_residual(entry, device);
    residuals_[s] = entry.residual.data_ptr<float>() + parts_[s].offset;
  }
}

void Bucket::note_sent(const std::vector<uint8_t>& unused) {
  for (size_t s = 0; s < parts_.size(); ++s) unused_[s] = unused_of(parts_[s].entry, unused);
  for (const Part& part : parts_)
    if (!part.dense) key_.entries[part.entry]->was_compressed = true;
}

void Bucket::prepare(double density, int64_t world_size, ResidualStore* residuals, BucketScratch& scratch) {
  const bool error_feedback = residuals != nullptr;
  if (density == density_ && world_size == world_size_ && error_feedback == error_feedback_) return;
  if (density != density_) {
    density_ = 0; // half-built until the end, should an allocation fail
    layout_ = make_layout(density);
    compensate_select_ = std::make_unique<CompensateSelect>(layout_);
    compensate_select_->use_scratch(scratch.candidates);
  }
  point_at_residuals(residuals, at::kCPU);
  unused_.assign(parts_.size(), 0);
  payload_ = at::empty({payload_bytes(layout_)}, at::dtype(at::kByte));
  gathered_ = at::empty({world_size * payload_bytes(layout_)}, at::dtype(at::kByte));
  scratch_ = &scratch;
  density_ = density;
  world_size_ = world_size;
  error_feedback_ = error_feedback;
}

void Bucket::compensate_select_and_encode(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank, int64_t step) {
  note_sent(unused);
  auto* payload = payload_.data_ptr<uint8_t>();
  Entries& entries = scratch_->selected;
  const auto selected_numel = static_cast<size_t>(layout_.selected_numel);
  if (entries.indices.size() < selected_numel) {
    entries.indices.resize(selected_numel);
    entries.values.resize(selected_numel);
  }
  float* const* residuals = error_feedback_ ? residuals_.data() : nullptr;
  const CompensateSelectStatistics selected = compensate_select(
      *compensate_select_, {gradient.const_data_ptr(), key_.type, residuals, unused_.data(), entries.indices.data(), entries.values.data()},
      torch_parallel_for);
  const EncodeStatistics dense = encode_dense(layout_, gradient.const_data_ptr(), key_.type, unused_.data(), payload);
  const bool non_finite = selected.non_finite + dense.non_finite > 0;
  float* const* not_yet_kept = value_format_ == ValueFormat::kBFloat16 ? nullptr : residuals;
  const double lost_sq =
      encode_selected(layout_, {entries.values.data(), entries.indices.data(), not_yet_kept, non_finite, payload}, torch_parallel_for);
  sent_ = error_feedback_;
  encode_header(layout_, rank, static_cast<uint32_t>(world_size_), step, non_finite, payload);
  last.gradient_sq = selected.gradient_sq + dense.gradient_sq;
  last.residual_sq = selected.residual_sq + lost_sq;
  last.sent_sq = selected.sent_sq - lost_sq;
}

bool Bucket::decode_apply(at::Tensor& gradient, int64_t step) {
  const auto* gathered = gathered_.const_data_ptr<uint8_t>();
  const std::string problem = decode(layout_, gathered, world_size_, step, decoded_, torch_parallel_for);
  if (!problem.empty()) throw std::runtime_error(problem);
  const DecodeApplyArguments arguments{gathered, decoded_, world_size_, gradient.mutable_data_ptr(), key_.type};
  return compressed_ddp::decode_apply(layout_, arguments, torch_parallel_for);
}

void Bucket::restore() {
#if COMPRESSED_DDP_CUDA
  if (device_ != nullptr) return; // restore_on_device
#endif
  if (!sent_) return;
  const auto* payload = payload_.const_data_ptr<uint8_t>();
  Entries own;
  const std::string problem = decode_own(layout_, payload, own, torch_parallel_for);
  TORCH_INTERNAL_ASSERT(problem.empty(), problem);
  compressed_ddp::restore(layout_, own, residuals_.data());
  sent_ = false;
}

#if COMPRESSED_DDP_CUDA
bool Bucket::knows_unused(const std::vector<uint8_t>& unused) const {
  std::vector<uint8_t> of_segments;
  for (const Part& part : parts_) of_segments.push_back(unused_of(part.entry, unused));
  return device_->knows_unused(of_segments);
}

bool Bucket::is_prepared_on_device(double density, int64_t world_size, const ResidualStore* residuals) const {
  return device_ != nullptr && density == density_ && world_size == world_size_ && (residuals != nullptr) == error_feedback_;
}

void Bucket::prepare_on_device(double density, int64_t world_size, ResidualStore* residuals, c10::Device device, cudaStream_t stream) {
  if (is_prepared_on_device(density, world_size, residuals)) return;
  device_.reset();
  layout_ = make_layout(density);
  point_at_residuals(residuals, device);
  unused_.assign(parts_.size(), 0);
  device_ = std::make_unique<DeviceBucket>(layout_, key_.type, device, world_size,
                                           residuals == nullptr ? std::vector<float*>{} : residuals_, stream);
  density_ = density;
  world_size_ = world_size;
  error_feedback_ = residuals != nullptr;
}

void Bucket::compensate_select_and_encode_on_device(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank,
                                                    int64_t step, cudaStream_t stream) {
  note_sent(unused);
  device_->compensate_select_and_encode(gradient, unused_, rank, step, stream);
}

void Bucket::restore_on_device(const uint32_t* condition, cudaStream_t stream) {
  if (!error_feedback_) return;
  device_->restore(condition, stream);
  device_->forget_sent(stream);
}

void Bucket::take_statistics(const cuda::SelectStatistics& sums) {
  last.gradient_sq = sums.gradient_sq;
  last.sent_sq = sums.sent_sq;
  last.residual_sq = std::max(0.0, sums.acc_sq - sums.sent_sq);
}
#endif

} // namespace compressed_ddp
