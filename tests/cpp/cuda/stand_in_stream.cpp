// device_stream.h for the test module: CPU tensors take the CUDA path, their stages run on a stream of the stand-in runtime.
#include "device_stream.h"

#include "cuda/launch.h"
#include "simt.h"
#include "stand_in_runtime.h"

namespace compressed_ddp {
namespace {

// Tensors are memory of torch, which the interpreter's memory map does not know. Races and sectors there cannot be told; the
// GoogleTests, whose memory is the interpreter's, look for those.
const bool kConfigured = [] {
  simt::default_options().foreign_memory = true;
  simt::default_options().count_sectors = false;
  return true;
}();

} // namespace

bool has_cuda_stages(c10::Device device) { return device.is_cpu() && kConfigured; }

struct DeviceStream::Streams {
  cudaStream_t stream = nullptr;
};
struct DeviceStream::Scope::Saved {};

DeviceStream::DeviceStream(c10::Device) : streams_(new Streams) {
  cuda::check(cudaStreamCreateWithFlags(&streams_->stream, cudaStreamNonBlocking), "creating a stream");
}
DeviceStream::~DeviceStream() { cudaStreamDestroy(streams_->stream); }
cudaStream_t DeviceStream::handle() const { return streams_->stream; }

// CPU tensors have no stream: what the caller did to them is done.
DeviceStream::Scope::Scope(DeviceStream&) {}
DeviceStream::Scope::~Scope() = default;

// Here the host touches what the stream wrote, as it does with Gloo: so it waits, and only here. Work that is queued until then has
// not run when a forgotten wait reads its result.
void DeviceStream::before_collective() { synchronize(); }
void DeviceStream::complete(c10::ivalue::Future& future, c10::IValue result, const at::Tensor&) {
  synchronize();
  future.markCompleted(std::move(result));
}
void DeviceStream::synchronize() { cuda::check(cudaStreamSynchronize(streams_->stream), "waiting for the stages"); }
bool DeviceStream::is_capturing() const { return false; }

} // namespace compressed_ddp

// For the test that the stages really ran here: how often the stand-in was called in this process.
extern "C" __attribute__((visibility("default"))) uint64_t compressed_ddp_stand_in_calls() { return simt::runtime_calls(); }
