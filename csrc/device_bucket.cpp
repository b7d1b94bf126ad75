#include "device_bucket.h"

#include <ATen/ops/empty.h>

#include <cstring>

#include "cuda/launch.h"

namespace compressed_ddp {
namespace {

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

at::Tensor device_bytes(c10::Device device, int64_t bytes) {
  return at::empty({std::max<int64_t>(bytes, 1)}, at::TensorOptions().dtype(at::kByte).device(device));
}

void upload(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "copying to the device");
}

} // namespace

// ---- report

DeviceReport::DeviceReport(c10::Device device, cudaStream_t stream) : device_(device_bytes(device, sizeof(cuda::DecodeStatus))) {
  cuda::check(cudaHostAlloc(reinterpret_cast<void**>(&host_), sizeof *host_, cudaHostAllocDefault), "allocating pinned memory");
  *host_ = {};
  cuda::check(cudaMemsetAsync(status(), 0, sizeof(cuda::DecodeStatus), stream), "clearing the report");
}
DeviceReport::~DeviceReport() { cudaFreeHost(host_); }

cuda::DecodeStatus* DeviceReport::status() const { return reinterpret_cast<cuda::DecodeStatus*>(device_.data_ptr<uint8_t>()); }
const uint32_t* DeviceReport::step_is_bad() const { return &status()->step_is_bad; }

bool DeviceReport::read_step_is_bad(cudaStream_t stream) const {
  uint32_t bad = 0;
  cuda::check(cudaMemcpyAsync(&bad, step_is_bad(), sizeof bad, cudaMemcpyDeviceToHost, stream), "reading the report");
  cuda::check(cudaStreamSynchronize(stream), "reading the report");
  return bad != 0;
}
void DeviceReport::copy_to_host(cudaStream_t stream) {
  cuda::check(cudaMemcpyAsync(host_, status(), sizeof *host_, cudaMemcpyDeviceToHost, stream), "copying the report");
}
void DeviceReport::clear_step(cudaStream_t stream) {
  cuda::check(cudaMemsetAsync(&status()->step_is_bad, 0, sizeof(uint32_t), stream), "clearing the report");
}
uint32_t DeviceReport::take_bad_rank(cudaStream_t stream) {
  const uint32_t bad_rank = *const_cast<const volatile uint32_t*>(&host_->bad_rank);
  if (bad_rank == 0) return 0;
  cuda::check(cudaStreamSynchronize(stream), "waiting for a failed exchange"); // no copy may bring it back
  host_->bad_rank = 0;
  cuda::check(cudaMemsetAsync(&status()->bad_rank, 0, sizeof(uint32_t), stream), "clearing the report");
  return bad_rank;
}

// ---- bucket

DeviceBucket::DeviceBucket(const Layout& layout, GradientType type, c10::Device device, int64_t world_size, std::vector<float*> residuals,
                           cudaStream_t stream)
    : layout_(layout), type_(type), world_size_(world_size), plan_(layout) {
  const auto segments = static_cast<int64_t>(layout.segments.size());
  const int64_t pointers_at = plan_.table_bytes();
  const int64_t unused_at = pointers_at + aligned(segments * static_cast<int64_t>(sizeof(float*)));
  std::vector<uint8_t> tables(static_cast<size_t>(unused_at + segments));
  plan_.write_tables(tables.data());
  if (!residuals.empty()) std::memcpy(tables.data() + pointers_at, residuals.data(), residuals.size() * sizeof(float*));
  tables_ = device_bytes(device, static_cast<int64_t>(tables.size()));
  upload(tables_.data_ptr<uint8_t>(), tables.data(), tables.size(), stream);
  workspace_ = device_bytes(device, plan_.workspace_bytes() + static_cast<int64_t>(sizeof(cuda::SelectStatistics)));
  cuda::clear_workspace(plan_, workspace_.data_ptr<uint8_t>(), stream);
  device_plan_ = cuda::device_plan(plan_, tables_.data_ptr<uint8_t>(), workspace_.data_ptr<uint8_t>());
  payload_ = device_bytes(device, payload_bytes(layout));
  gathered_ = device_bytes(device, world_size * payload_bytes(layout));
  if (!residuals.empty()) residuals_ = reinterpret_cast<float* const*>(tables_.data_ptr<uint8_t>() + pointers_at);
  unused_ = tables_.data_ptr<uint8_t>() + unused_at;
  uploaded_unused_.assign(static_cast<size_t>(segments), 0);
  statistics_ = reinterpret_cast<cuda::SelectStatistics*>(workspace_.data_ptr<uint8_t>() + plan_.workspace_bytes());
  cuda::check(cudaStreamSynchronize(stream), "preparing a bucket"); // `tables` is pageable memory of this call
}

void DeviceBucket::upload_unused(const std::vector<uint8_t>& unused, cudaStream_t stream) {
  if (unused == uploaded_unused_) return; // nearly always
  upload(unused_, unused.data(), unused.size(), stream);
  cuda::check(cudaStreamSynchronize(stream), "uploading which parameters are unused");
  uploaded_unused_ = unused;
}

void DeviceBucket::compensate_select_and_encode(const at::Tensor& gradient, const std::vector<uint8_t>& unused, uint32_t rank, int64_t step,
                                                cudaStream_t stream) {
  upload_unused(unused, stream);
  const cuda::SelectArguments arguments{gradient.const_data_ptr(),
                                        type_,
                                        residuals_,
                                        unused_,
                                        payload_.data_ptr<uint8_t>(),
                                        make_header(layout_, rank, static_cast<uint32_t>(world_size_), step, false),
                                        statistics_};
  cuda::compensate_select_and_encode(device_plan_, arguments, cuda::Method::kOnePass, stream);
}

void DeviceBucket::decode_apply(const at::Tensor& gradient, int64_t step, DeviceReport& report, cudaStream_t stream) {
  const cuda::DecodeArguments arguments{gathered_.data_ptr<uint8_t>(),
                                        static_cast<int32_t>(world_size_),
                                        gradient.mutable_data_ptr(),
                                        type_,
                                        make_header(layout_, 0, static_cast<uint32_t>(world_size_), step, false),
                                        report.status()};
  cuda::decode_apply(device_plan_, arguments, stream);
  report.copy_to_host(stream);
}

void DeviceBucket::restore(const uint32_t* condition, cudaStream_t stream) {
  if (residuals_ == nullptr) return;
  cuda::restore(device_plan_, {payload_.data_ptr<uint8_t>(), residuals_, condition}, stream);
}

cuda::SelectStatistics DeviceBucket::statistics(cudaStream_t stream) {
  cuda::SelectStatistics sums{};
  cuda::check(cudaMemcpyAsync(&sums, statistics_, sizeof sums, cudaMemcpyDeviceToHost, stream), "reading the statistics");
  cuda::check(cudaStreamSynchronize(stream), "reading the statistics");
  return sums;
}

} // namespace compressed_ddp
