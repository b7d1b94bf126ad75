#include "device_stream.h"

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"

namespace compressed_ddp {
namespace {

using Guard = c10::impl::VirtualGuardImpl;

void wait_for(const c10::Stream& waiter, const c10::Stream& other) {
  c10::Event event(waiter.device_type());
  event.record(other);
  event.block(waiter);
}

bool captures(const c10::Stream& stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const auto handle = static_cast<cudaStream_t>(stream.native_handle());
  if (cudaStreamIsCapturing(handle, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  cudaGetLastError(); // the next launch must not find it
  return false;
}

c10::Stream stream_of(c10::Device device) {
  const std::optional<c10::Device> with_streams = device_of_streams(device);
  TORCH_INTERNAL_ASSERT(with_streams, device, " has no streams");
  return Guard(with_streams->type()).getStreamFromGlobalPool(*with_streams, /*isHighPriority=*/true);
}

} // namespace

bool is_capturing(c10::Device device) {
  const std::optional<c10::Device> with_streams = device_of_streams(device);
  return with_streams && captures(Guard(with_streams->type()).getStream(*with_streams));
}

struct DeviceStream::Streams {
  c10::Stream stream;
};

DeviceStream::DeviceStream(c10::Device device) : streams_(new Streams{stream_of(device)}) {}
DeviceStream::~DeviceStream() = default;

cudaStream_t DeviceStream::handle() const { return static_cast<cudaStream_t>(streams_->stream.native_handle()); }

struct DeviceStream::Scope::Saved {
  Guard guard;
  c10::Device device;
  c10::Stream stream; // that was current on the engine's device
  c10::Stream ours;
};

DeviceStream::Scope::Scope(DeviceStream& stream) {
  const c10::Stream ours = stream.streams_->stream;
  const Guard guard(ours.device_type());
  // All that may throw comes first: nobody would undo what was exchanged.
  saved_.reset(new Saved{guard, guard.getDevice(), guard.getStream(ours.device()), ours});
  wait_for(ours, saved_->stream);
  guard.exchangeDevice(ours.device());
  guard.exchangeStream(ours);
}

DeviceStream::Scope::~Scope() {
  saved_->guard.exchangeStream(saved_->stream);
  saved_->guard.exchangeDevice(saved_->device);
}

void DeviceStream::Scope::join() { wait_for(saved_->stream, saved_->ours); }

void DeviceStream::hold(const at::Tensor& buffer) {
  if (buffer.storage().data() == nullptr) return;
  Guard(streams_->stream.device_type()).recordDataPtrOnStream(buffer.storage().data_ptr(), streams_->stream);
}

void DeviceStream::synchronize() { streams_->stream.synchronize(); }

} // namespace compressed_ddp
