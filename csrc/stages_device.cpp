#include "stages_device.h"

#include <cstring>

#include "cuda/decode_apply.h"
#include "cuda/launch.h"
#include "cuda/restore.h"
#include "cuda/return_dropped.h"
#include "cuda/shards.h"

namespace compressed_ddp {
namespace {

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "copying to the device");
}

int64_t returned_words(const Layout& layout) { return (layout.selected_numel + 31) / 32; }

} // namespace

StagesDevice::StagesDevice(BucketRange range, bool may_drop, std::vector<GradientType> types, c10::Device device, cudaStream_t stream,
                           std::shared_ptr<DeviceReport> report)
    : Stages(std::move(range)), stream_(stream), report_(std::move(report)), plan_(layout()) {
  const auto segments = static_cast<int64_t>(layout().segments.size());
  const int64_t pointers_at = plan_.table_bytes();
  const int64_t entries_at = pointers_at + aligned(segments * static_cast<int64_t>(sizeof(float*)));
  const int64_t unused_at = entries_at + aligned(segments * static_cast<int64_t>(sizeof(int32_t)));
  std::vector<uint8_t> tables(static_cast<size_t>(unused_at + segments));
  plan_.write_tables(tables.data());
  if (has_residuals()) std::memcpy(tables.data() + pointers_at, range_.residuals.data(), range_.residuals.size() * sizeof(float*));
  const std::vector<int32_t> entries(range_.entries.begin(), range_.entries.end());
  std::memcpy(tables.data() + entries_at, entries.data(), entries.size() * sizeof(int32_t));
  tables_ = bytes_on(device, std::max<int64_t>(1, static_cast<int64_t>(tables.size())));
  upload(tables_.data_ptr<uint8_t>(), tables.data(), tables.size(), stream_);
  // Now, so that no launch can be refused between two kernels of one selection.
  for (const GradientType type : types) {
    cuda::load_compensate_select(type, layout().value_format);
    cuda::load_decode_apply(type, layout().value_format);
    if (may_drop) cuda::load_return_dropped(type, layout().value_format);
  }
  cuda::load_restore(layout().value_format);
  const int64_t statistics_at = plan_.workspace_bytes();
  const auto sent_at = statistics_at + static_cast<int64_t>(sizeof(cuda::SelectStatistics));
  const int64_t returned_bytes = may_drop ? 4 * returned_words(layout()) : 0;
  workspace_ = bytes_on(device, sent_at + 4 + returned_bytes);
  auto* workspace = workspace_.data_ptr<uint8_t>();
  cuda::clear_workspace(plan_, workspace, stream_);
  device_plan_ = cuda::device_plan(plan_, tables_.data_ptr<uint8_t>(), workspace);
  if (has_residuals()) residuals_ = reinterpret_cast<float* const*>(tables_.data_ptr<uint8_t>() + pointers_at);
  entries_ = reinterpret_cast<const int32_t*>(tables_.data_ptr<uint8_t>() + entries_at);
  unused_ = tables_.data_ptr<uint8_t>() + unused_at;
  uploaded_unused_.assign(static_cast<size_t>(segments), 0);
  statistics_ = reinterpret_cast<cuda::SelectStatistics*>(workspace + statistics_at);
  sent_ = reinterpret_cast<uint32_t*>(workspace + sent_at);
  if (may_drop) returned_ = sent_ + 1;
  forget_sent();
  cuda::check(cudaStreamSynchronize(stream_), "preparing a bucket"); // `tables` is pageable memory of this call
}

void StagesDevice::upload_unused(const std::vector<uint8_t>& of_segments) {
  if (of_segments == uploaded_unused_) return; // nearly always
  upload(unused_, of_segments.data(), of_segments.size(), stream_);
  cuda::check(cudaStreamSynchronize(stream_), "uploading which parameters are unused");
  uploaded_unused_ = of_segments;
}

StageSums StagesDevice::compensate_select_and_encode(const void* gradient, GradientType type, const Unused& unused, Sender sender,
                                                     uint8_t* payload) {
  if (unused.presence == nullptr)
    upload_unused(range_.unused_segments(unused.of_entries));
  else
    cuda::mark_unused(unused.presence, entries_, static_cast<int64_t>(range_.entries.size()), unused_, stream_);
  const PayloadHeader header = make_header(layout(), sender.rank, sender.step, false);
  if (returned_ != nullptr)
    cuda::check(cudaMemsetAsync(returned_, 0, static_cast<size_t>(4 * returned_words(layout())), stream_), "clearing what came back");
  try {
    cuda::compensate_select_and_encode(device_plan_, {gradient, type, residuals_, unused_, payload, header, statistics_, sent_},
                                       cuda::Method::kOnePass, stream_);
  } catch (...) {
    cudaMemsetAsync(workspace_.data_ptr<uint8_t>(), 0, static_cast<size_t>(plan_.workspace_cleared_bytes()), stream_);
    throw;
  }
  return {};
}

bool StagesDevice::decode_apply(const Received& received, void* bucket, GradientType type) {
  const PayloadHeader expected = make_header(layout(), received.senders.first_rank, received.step, false);
  cuda::decode_apply(device_plan_,
                     {received.payloads, static_cast<int32_t>(received.count), bucket, type, expected, report_->status(),
                      static_cast<uint32_t>(received.senders.rank_stride)},
                     stream_);
  report_->copy_to_host(stream_);
  return false;
}

void nan_if_flagged_on_device(const uint8_t* payloads, int64_t stride, int64_t count, void* bucket, int64_t numel, GradientType type,
                              DeviceReport& report, cudaStream_t stream) {
  cuda::nan_if_flagged({payloads, stride, static_cast<int32_t>(count), bucket, numel, type, report.status()}, stream);
  report.copy_to_host(stream);
}

double StagesDevice::return_dropped(const uint8_t* payload, const void* bucket, GradientType type) {
  cuda::return_dropped(device_plan_, {payload, bucket, type, residuals_, sent_, returned_}, stream_);
  return 0;
}

double StagesDevice::add_lost(const uint8_t* payload, const float* lost, float factor, GradientType type, const uint32_t* condition) {
  cuda::add_lost(device_plan_, {payload, lost, factor, type, residuals_, condition, sent_}, stream_);
  return 0;
}

void StagesDevice::clear(float* data, int64_t numel) {
  cuda::check(cudaMemsetAsync(data, 0, static_cast<size_t>(numel) * sizeof(float), stream_), "clearing what rounding lost");
}

void StagesDevice::restore(const uint8_t* payload, const uint32_t* condition) {
  if (residuals_ == nullptr) return;
  cuda::restore(device_plan_, {payload, residuals_, condition, sent_, returned_}, stream_);
}

void StagesDevice::forget_sent() { cuda::check(cudaMemsetAsync(sent_, 0, sizeof *sent_, stream_), "forgetting what was sent"); }

void StagesDevice::copy_statistics(cuda::SelectStatistics* to) const {
  cuda::check(cudaMemcpyAsync(to, statistics_, sizeof *to, cudaMemcpyDeviceToHost, stream_), "reading the statistics");
}

} // namespace compressed_ddp
