// The test module: CPU tensors take the CUDA path. device_stream.cpp is the real one, on streams of the stand-in runtime, which torch
// knows as those of its PrivateUse1 device; here is what stands in place of device_cuda.cpp.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <set>

#include "cuda/launch.h"
#include "device_stream.h"
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

bool stages_are_on = true;
std::set<const void*> held; // memory that DeviceStream::hold was told of

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);

// Stream 0 is the caller's, on all threads; the others come from the "pool".
class StandInGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 0; } // no thread of autograd for it

  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    handle(0);
    return stream(add());
  }
  c10::Stream exchangeStream(c10::Stream to) const override { return stream(std::exchange(current, to.id())); }
  void* getStreamNativeHandle(const c10::Stream s) const override { return handle(s.id()); }
  void synchronizeStream(const c10::Stream& s) const override { cuda::check(cudaStreamSynchronize(handle(s.id())), "waiting"); }

  void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) cuda::check(cudaEventCreate(reinterpret_cast<cudaEvent_t*>(event)), "creating an event");
    cuda::check(cudaEventRecord(static_cast<cudaEvent_t>(*event), handle(s.id())), "recording an event");
  }
  void block(void* event, const c10::Stream& s) const override {
    cuda::check(cudaStreamWaitEvent(handle(s.id()), static_cast<cudaEvent_t>(event), 0), "waiting for an event");
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream&) const override { held.insert(data.get()); }

 private:
  static c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }
  static std::vector<cudaStream_t>& streams() {
    static std::vector<cudaStream_t> all;
    return all;
  }
  static c10::StreamId add() {
    cudaStream_t added = nullptr;
    cuda::check(cudaStreamCreateWithFlags(&added, cudaStreamNonBlocking), "creating a stream");
    streams().push_back(added);
    return static_cast<c10::StreamId>(streams().size()) - 1;
  }
  static cudaStream_t handle(c10::StreamId id) {
    if (streams().empty()) add();
    return streams().at(static_cast<size_t>(id));
  }

  static thread_local c10::StreamId current;
};
thread_local c10::StreamId StandInGuard::current = 0;
C10_REGISTER_GUARD_IMPL(PrivateUse1, StandInGuard);

cudaStream_t callers_stream() {
  return static_cast<cudaStream_t>(c10::impl::getDeviceGuardImpl(kDevice.type())->getDefaultStream(kDevice).native_handle());
}

bool captures(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda::check(cudaStreamIsCapturing(stream, &status), "asking for a capture");
  return status != cudaStreamCaptureStatusNone;
}

// Runs `function`, and forgets it only where nobody keeps it for replays.
void launch_on_host(cudaStream_t stream, std::function<void()> function) {
  auto* kept = new std::function<void()>(std::move(function)); // a graph may call it any number of times, so it stays
  cuda::check(cudaLaunchHostFunc(
                  stream, [](void* argument) { (*static_cast<std::function<void()>*>(argument))(); }, kept),
              "launching on the host");
}

cudaGraphExec_t graph = nullptr; // the last one captured

} // namespace

bool has_cuda_stages(c10::Device device) { return device.is_cpu() && kConfigured && stages_are_on; }
std::optional<c10::Device> device_of_streams(c10::Device device) { return device.is_cpu() ? std::optional(kDevice) : std::nullopt; }

// Here the host touches what the stream wrote, as it does with Gloo: so it waits, and only here and in complete(). Work that is queued
// until then has not run when a forgotten wait reads its result.
void DeviceStream::run(const std::function<void()>& of_torch) {
  if (captures(handle())) return launch_on_host(handle(), of_torch);
  synchronize();
  of_torch();
}
void DeviceStream::complete(c10::ivalue::Future& future, c10::IValue result, const at::Tensor&) {
  if (!captures(handle())) synchronize();
  future.markCompleted(std::move(result));
}

} // namespace compressed_ddp

// ---- for tests: ctypes

#define FOR_TESTS extern "C" __attribute__((visibility("default")))

// How often the stand-in was called in this process: that the stages really ran here.
FOR_TESTS uint64_t compressed_ddp_stand_in_calls() { return simt::runtime_calls(); }

// Whether CPU tensors take the CUDA path from now on.
FOR_TESTS void compressed_ddp_stand_in_switch(int on) { compressed_ddp::stages_are_on = on != 0; }

// The contents of this memory arrive on the caller's stream, late: until that has run, it holds NaN.
FOR_TESTS void compressed_ddp_stand_in_delay(void* memory, uint64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(memory);
  std::vector<uint8_t> contents(begin, begin + bytes);
  std::memset(memory, 0xff, bytes);
  compressed_ddp::launch_on_host(compressed_ddp::callers_stream(),
                                 [memory, contents] { std::memcpy(memory, contents.data(), contents.size()); });
}

FOR_TESTS int compressed_ddp_stand_in_is_held(const void* memory) { return compressed_ddp::held.contains(memory) ? 1 : 0; }

FOR_TESTS void compressed_ddp_stand_in_refuse_launch(uint64_t which) { simt::refuse_launch(which); }

// A CUDA graph of what comes between the first two, on the caller's stream; the third runs it once more.
FOR_TESTS void compressed_ddp_stand_in_begin_capture() {
  compressed_ddp::cuda::check(cudaStreamBeginCapture(compressed_ddp::callers_stream(), cudaStreamCaptureModeGlobal), "capturing");
}
FOR_TESTS void compressed_ddp_stand_in_end_capture() {
  cudaGraph_t captured = nullptr;
  compressed_ddp::cuda::check(cudaStreamEndCapture(compressed_ddp::callers_stream(), &captured), "capturing");
  compressed_ddp::cuda::check(cudaGraphInstantiate(&compressed_ddp::graph, captured, 0), "instantiating");
}
FOR_TESTS void compressed_ddp_stand_in_replay() {
  compressed_ddp::cuda::check(cudaGraphLaunch(compressed_ddp::graph, compressed_ddp::callers_stream()), "replaying");
  compressed_ddp::cuda::check(cudaStreamSynchronize(compressed_ddp::callers_stream()), "waiting");
}
