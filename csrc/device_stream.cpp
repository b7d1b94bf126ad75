#include "device_stream.h"

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace compressed_ddp {
namespace {

using Guard = c10::impl::VirtualGuardImpl;

void wait_for(const c10::Stream& waiter, const c10::Stream& other) {
  c10::Event event(waiter.device_type());
  event.record(other);
  event.block(waiter);
}

} // namespace

bool has_cuda_stages(c10::Device device) { return device.is_cuda(); }

struct DeviceStream::Streams {
  c10::Stream stream;
};

DeviceStream::DeviceStream(c10::Device device)
    : streams_(new Streams{Guard(device.type()).getStreamFromGlobalPool(device, /*isHighPriority=*/true)}) {}
DeviceStream::~DeviceStream() = default;

cudaStream_t DeviceStream::handle() const { return static_cast<cudaStream_t>(streams_->stream.native_handle()); }

struct DeviceStream::Scope::Saved {
  Guard guard;
  c10::Device device;
  c10::Stream stream; // that was current on the engine's device
};

DeviceStream::Scope::Scope(DeviceStream& stream) {
  const c10::Stream ours = stream.streams_->stream;
  Guard guard(ours.device_type());
  const c10::Device before = guard.exchangeDevice(ours.device());
  saved_.reset(new Saved{guard, before, guard.exchangeStream(ours)});
  wait_for(ours, saved_->stream);
}

DeviceStream::Scope::~Scope() {
  saved_->guard.exchangeStream(saved_->stream);
  saved_->guard.exchangeDevice(saved_->device);
}

void DeviceStream::complete(c10::ivalue::Future& future, c10::IValue result, const at::Tensor& buffer) {
  // A device-aware future records an event on the current stream here, and blocks the stream of whoever waits.
  future.markCompleted(std::move(result), std::vector{buffer.storage().getWeakStorageImpl()});
}

void DeviceStream::before_collective() {} // ProcessGroups order their work behind the current stream

void DeviceStream::synchronize() { streams_->stream.synchronize(); }

bool DeviceStream::is_capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(handle(), &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

} // namespace compressed_ddp
