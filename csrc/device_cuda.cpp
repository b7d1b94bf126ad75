// What device_stream.h says of CUDA devices alone. The tests without a GPU have another file in place of this one.
#include <c10/core/DeviceGuard.h>

#include <map>
#include <mutex>

#include "cuda/compensate_select.h"
#include "cuda/launch.h"
#include "device_stream.h"

namespace compressed_ddp {
namespace {

constexpr int kOldestMajor = 8; // kernels use instructions of sm_80

// The kernels of this build run here. An error that is no answer (out of memory, a broken device) is thrown.
bool runs_kernels(c10::Device device) {
  const c10::DeviceGuard guard(device);
  int major = 0;
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()), "asking for the compute capability");
  if (major < kOldestMajor) return false;
  const cudaError_t error = cuda::try_compensate_select();
  if (error == cudaSuccess) return true;
  cudaGetLastError(); // the next launch must not find it
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction || error == cudaErrorInvalidPtx ||
      error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInsufficientDriver)
    return false;
  cuda::check(error, "loading the kernels");
  return false;
}

} // namespace

bool has_cuda_stages(c10::Device device) {
  if (!device.is_cuda()) return false;
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, bool> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device.index());
  return found != known.end() ? found->second : known.emplace(device.index(), runs_kernels(device)).first->second;
}

std::optional<c10::Device> device_of_streams(c10::Device device) { return device.is_cuda() ? std::optional(device) : std::nullopt; }

void DeviceStream::complete(c10::ivalue::Future& future, c10::IValue result, const at::Tensor& buffer) {
  // A device-aware future records an event on the current stream here, and blocks the stream of whoever waits.
  future.markCompleted(std::move(result), std::vector{buffer.storage().getWeakStorageImpl()});
}

void DeviceStream::run(const std::function<void()>& of_torch) { of_torch(); }

} // namespace compressed_ddp
