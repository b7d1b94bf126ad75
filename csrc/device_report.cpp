#include "device_report.h"

#include <c10/core/DeviceGuard.h>

#include <cstddef>
#include <cstring>

#include "cuda/launch.h"
#include "exchange.h"

namespace compressed_ddp {

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
    : device_(bytes_on(device, sizeof(cuda::DecodeStatus))), host_(device, sizeof(cuda::DecodeStatus)) {
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

} // namespace compressed_ddp
