#include "device_bucket.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <cstddef>
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

PinnedBytes::PinnedBytes(c10::Device device, size_t bytes) : device_(device), size_(bytes) {
  const c10::DeviceGuard guard(device_);
  cuda::check(cudaHostAlloc(&bytes_, bytes, cudaHostAllocDefault), "allocating pinned memory");
  std::memset(bytes_, 0, bytes);
}
PinnedBytes::~PinnedBytes() {
  try {
    const c10::DeviceGuard guard(device_); // else the runtime makes a context on the device that is current here
    cudaFreeHost(bytes_);
  } catch (const std::exception&) { // the process ends, and CUDA has ended before
  }
}

DeviceReport::DeviceReport(c10::Device device, cudaStream_t stream)
    : device_(device_bytes(device, sizeof(cuda::DecodeStatus))), host_(device, sizeof(cuda::DecodeStatus)) {
  clear(stream);
}

cuda::DecodeStatus* DeviceReport::status() const { return reinterpret_cast<cuda::DecodeStatus*>(device_.data_ptr<uint8_t>()); }
const uint32_t* DeviceReport::step_is_bad() const { return &status()->step_is_bad; }

bool DeviceReport::read_step_is_bad(cudaStream_t stream) const {
  uint32_t bad = 0;
  cuda::check(cudaMemcpyAsync(&bad, step_is_bad(), sizeof bad, cudaMemcpyDeviceToHost, stream), "reading the report");
  cuda::check(cudaStreamSynchronize(stream), "reading the report");
  return bad != 0;
}
void DeviceReport::copy_to_host(cudaStream_t stream) {
  cuda::check(cudaMemcpyAsync(host_.at<void>(), status(), sizeof(cuda::DecodeStatus), cudaMemcpyDeviceToHost, stream),
              "copying the report");
}
void DeviceReport::clear_step(cudaStream_t stream) {
  cuda::check(cudaMemsetAsync(&status()->step_is_bad, 0, sizeof(uint32_t), stream), "clearing the report");
}
uint32_t DeviceReport::take_bad_rank(cudaStream_t stream) {
  static_assert(offsetof(cuda::DecodeStatus, bad_rank) == 0 && offsetof(cuda::DecodeStatus, generation) == 4);
  // One load for both: a copy may arrive at any moment.
  const uint64_t both = *host_.at<const volatile uint64_t>();
  uint32_t words[2]; // bad_rank, generation
  std::memcpy(words, &both, sizeof both);
  if (words[0] == 0 || words[1] != generation_) return 0;
  begin_generation(stream);
  return words[0];
}
void DeviceReport::clear(cudaStream_t stream) {
  begin_generation(stream);
  clear_step(stream);
}
void DeviceReport::begin_generation(cudaStream_t stream) {
  const uint32_t byte = (generation_ + 1) & 0xff;
  generation_ = byte * 0x01010101u;
  cuda::check(cudaMemsetAsync(&status()->bad_rank, 0, sizeof(uint32_t), stream), "clearing the report");
  cuda::check(cudaMemsetAsync(&status()->generation, static_cast<int>(byte), sizeof(uint32_t), stream), "clearing the report");
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
  // Now, so that no launch can be refused between two kernels of one selection.
  cuda::load_compensate_select(type, layout.value_format);
  cuda::load_decode_apply(type, layout.value_format);
  cuda::load_restore(layout.value_format);
  workspace_ = device_bytes(device, plan_.workspace_bytes() + static_cast<int64_t>(sizeof(cuda::SelectStatistics) + sizeof(uint32_t)));
  cuda::clear_workspace(plan_, workspace_.data_ptr<uint8_t>(), stream);
  device_plan_ = cuda::device_plan(plan_, tables_.data_ptr<uint8_t>(), workspace_.data_ptr<uint8_t>());
  payload_ = device_bytes(device, payload_bytes(layout));
  gathered_ = device_bytes(device, world_size * payload_bytes(layout));
  if (!residuals.empty()) residuals_ = reinterpret_cast<float* const*>(tables_.data_ptr<uint8_t>() + pointers_at);
  unused_ = tables_.data_ptr<uint8_t>() + unused_at;
  uploaded_unused_.assign(static_cast<size_t>(segments), 0);
  statistics_ = reinterpret_cast<cuda::SelectStatistics*>(workspace_.data_ptr<uint8_t>() + plan_.workspace_bytes());
  sent_ = reinterpret_cast<uint32_t*>(statistics_ + 1);
  forget_sent(stream);
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
                                        statistics_,
                                        sent_};
  try {
    cuda::compensate_select_and_encode(device_plan_, arguments, cuda::Method::kOnePass, stream);
  } catch (...) {
    cudaMemsetAsync(workspace_.data_ptr<uint8_t>(), 0, static_cast<size_t>(plan_.workspace_cleared_bytes()), stream);
    throw;
  }
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
  cuda::restore(device_plan_, {payload_.data_ptr<uint8_t>(), residuals_, condition, sent_}, stream);
}

void DeviceBucket::forget_sent(cudaStream_t stream) {
  cuda::check(cudaMemsetAsync(sent_, 0, sizeof *sent_, stream), "forgetting what was sent");
}

void DeviceBucket::copy_statistics(cuda::SelectStatistics* to, cudaStream_t stream) {
  cuda::check(cudaMemcpyAsync(to, statistics_, sizeof *to, cudaMemcpyDeviceToHost, stream), "reading the statistics");
}

} // namespace compressed_ddp
