#include "stand_in_runtime.h"

#include <driver_types.h>

#include <vector_types.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "device_queue.h"
#include "interpreter.h"
#include "memory.h"

namespace simt {
namespace {

// What nvcc's generated code hands to __cudaRegisterFatBinary.
struct FatBinaryWrapper {
  int magic;
  int version;
  const char* data;
  void* filename;
};

struct Kernel {
  ptx::Program* program;
  std::string name;
};

struct Event {
  CompletionPtr completion; // of the last record
  bool captured = false;    // that was in a capture
};

// Work in the order in which it was enqueued, which is one of those that its streams and events allow.
using Graph = std::vector<std::function<void()>>;
struct Capture {
  std::set<DeviceQueue::StreamId> streams; // the first one, and those that have waited for one of them
  Graph work;
};

struct Device {
  std::recursive_mutex mutex; // process groups call from threads of their own
  std::vector<std::unique_ptr<ptx::Program>> programs;
  std::map<const void*, Kernel> kernels; // by the address of the host stub
  DeviceQueue queue;
  std::map<cudaEvent_t, Event> events;
  uintptr_t next_event = 1;
  std::optional<DeviceFailure> failure;
  cudaError_t last_error = cudaSuccess;
  uint64_t calls = 0;
  StandInOptions options{default_options().fuzz, default_options().seed};
  std::optional<Capture> capture;
  std::vector<Graph> graphs;
  uint64_t refused_launch = 0; // counts down

  bool captures(DeviceQueue::StreamId stream) const { return capture && capture->streams.contains(stream); }
  CompletionPtr enqueue(DeviceQueue::StreamId stream, std::function<void()> work) {
    if (!captures(stream)) return queue.enqueue(stream, std::move(work));
    capture->work.push_back(std::move(work));
    return nullptr;
  }
};

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local Configuration configuration; // of the launch that this thread is about to make

Device& device() {
  static auto* instance = new Device; // never destroyed: fat binaries unregister at exit
  return *instance;
}

DeviceQueue::StreamId id_of(cudaStream_t stream) {
  const auto id = reinterpret_cast<uintptr_t>(stream);
  return id <= 2 ? 0 : id - 2; // 1 and 2 are cudaStreamLegacy and cudaStreamPerThread
}
cudaStream_t handle_of(DeviceQueue::StreamId id) { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(id + 2)); }

// For mutate_ptx.py: SIMT_PTX_DUMP=FOLDER writes each program's PTX to FOLDER/INDEX.ptx; SIMT_PTX_REPLACE=INDEX:FILE runs the text of FILE
// in place of one of them.
std::string dumped_or_replaced(std::string ptx, size_t index) {
  if (const char* folder = std::getenv("SIMT_PTX_DUMP")) std::ofstream(std::string(folder) + "/" + std::to_string(index) + ".ptx") << ptx;
  const char* replacement = std::getenv("SIMT_PTX_REPLACE");
  if (replacement == nullptr || std::to_string(index) + ":" != std::string(replacement).substr(0, std::to_string(index).size() + 1))
    return ptx;
  std::ifstream file(std::strchr(replacement, ':') + 1);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Every call goes through here: one at a time; a broken device answers nothing else; failures of kernels break it.
template <typename Function>
cudaError_t call(Function&& function) {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  ++d.calls;
  if (d.failure) return d.last_error = cudaErrorLaunchFailure;
  cudaError_t error = cudaSuccess;
  try {
    d.queue.set_order(d.options.fuzz, d.options.seed++);
    error = function(d);
  } catch (const Failure& failure) {
    d.failure = DeviceFailure{failure.kind, failure.what()};
    std::fprintf(stderr, "stand-in CUDA runtime: %s: %s\n", name_of(failure.kind), failure.what());
    error = cudaErrorLaunchFailure;
  }
  if (error != cudaSuccess) d.last_error = error;
  return error;
}

cudaError_t launch_kernel(Device& d, const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  const auto found = d.kernels.find(stub);
  if (found == d.kernels.end()) return cudaErrorInvalidDeviceFunction;
  if (d.refused_launch > 0 && --d.refused_launch == 0) return cudaErrorLaunchOutOfResources;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  const Kernel& kernel = found->second;
  // Arguments are read now, as a GPU does, not when the kernel runs.
  auto values = std::make_shared<std::vector<std::vector<std::byte>>>();
  const std::vector<size_t> sizes = kernel.program->parameter_bytes(kernel.name);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto* bytes = static_cast<const std::byte*>(arguments[i]);
    values->emplace_back(bytes, bytes + sizes[i]);
  }
  d.enqueue(id_of(stream), [&kernel, values, grid, block, shared_bytes] {
    std::vector<void*> pointers;
    for (auto& value : *values) pointers.push_back(value.data());
    kernel.program->launch(kernel.name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, pointers.data());
  });
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  if (is_allocated(to, bytes)) mark_initialized(to, bytes);
  return cudaSuccess;
}

} // namespace

StandInOptions& stand_in_options() { return device().options; }
std::optional<DeviceFailure> device_failure() { return device().failure; }
uint64_t runtime_calls() { return device().calls; }
void refuse_launch(uint64_t which) { device().refused_launch = which; }
void reset_device() {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  d.queue.clear();
  d.failure.reset();
  d.last_error = cudaSuccess;
}

} // namespace simt

using simt::call;
using simt::Device;
using simt::device;
using simt::id_of;

extern "C" {

// ---- what nvcc's generated code calls

void** __cudaRegisterFatBinary(void* wrapper) {
  const char* data = static_cast<simt::FatBinaryWrapper*>(wrapper)->data;
  uint64_t size = 0;
  std::memcpy(&size, data + 8, sizeof size);
  size += 16; // the header in front
  const auto* ptx = static_cast<const char*>(memmem(data, size, ".version ", 9));
  if (ptx == nullptr) {
    std::fprintf(stderr, "stand-in CUDA runtime: no readable PTX in this program; compile with code=compute_XX and --no-compress\n");
    std::abort();
  }
  Device& d = device();
  d.programs.push_back(std::make_unique<simt::ptx::Program>(simt::ptx::Program::from_ptx(
      simt::dumped_or_replaced(std::string(ptx, strnlen(ptx, size - static_cast<size_t>(ptx - data))), d.programs.size()), "fat binary")));
  return reinterpret_cast<void**>(d.programs.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** program, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  device().kernels[stub] = {reinterpret_cast<simt::ptx::Program*>(program), name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {} // device code finds its variables in the module
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  simt::configuration = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const auto& configuration = simt::configuration;
  *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  return call([&](Device& d) { return simt::launch_kernel(d, stub, grid, block, arguments, shared_bytes, stream); });
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  return call([&](Device& d) {
    *attributes = {};
    return d.kernels.contains(stub) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
  });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  return call([&](Device& d) {
    d.enqueue(id_of(stream), [=] { function(argument); });
    return cudaSuccess;
  });
}

// ---- memory

cudaError_t cudaMalloc(void** p, size_t bytes) {
  return call([&](Device& d) {
    if (d.capture) return cudaErrorStreamCaptureUnsupported;
    *p = simt::allocate(bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaFree(void* p) {
  return call([&](Device& d) {
    if (d.capture) return cudaErrorStreamCaptureUnsupported;
    d.queue.wait_all();
    simt::release(p);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return call([&](Device& d) {
    d.enqueue(id_of(stream), [=] { simt::copy(to, from, bytes); });
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return call([&](Device& d) {
    d.queue.wait(d.queue.enqueue(0, [=] { simt::copy(to, from, bytes); }));
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t stream) {
  return call([&](Device& d) {
    d.enqueue(id_of(stream), [=] {
      std::memset(p, byte, bytes);
      if (simt::is_allocated(p, bytes)) simt::mark_initialized(p, bytes);
    });
    return cudaSuccess;
  });
}
cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return cudaMemsetAsync(p, byte, bytes, nullptr); }

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  return call([&](Device& d) {
    if (d.capture) return cudaErrorStreamCaptureUnsupported;
    *p = std::malloc(bytes);
    return *p != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}
cudaError_t cudaFreeHost(void* p) {
  return call([&](Device& d) {
    if (d.capture) return cudaErrorStreamCaptureUnsupported;
    d.queue.wait_all();
    std::free(p);
    return cudaSuccess;
  });
}

// ---- streams and events

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return call([&](Device& d) {
    *stream = simt::handle_of(d.queue.create_stream((flags & cudaStreamNonBlocking) == 0));
    return cudaSuccess;
  });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call([&](Device& d) {
    d.queue.destroy_stream(id_of(stream));
    return cudaSuccess;
  });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call([&](Device& d) {
    if (d.captures(id_of(stream))) return cudaErrorStreamCaptureUnsupported;
    d.queue.wait_stream(id_of(stream));
    return cudaSuccess;
  });
}
cudaError_t cudaDeviceSynchronize() {
  return call([&](Device& d) {
    d.queue.wait_all();
    return cudaSuccess;
  });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call([&](Device& d) {
    const auto found = d.events.find(event);
    if (found == d.events.end()) return cudaErrorInvalidResourceHandle;
    if (found->second.captured && d.capture) d.capture->streams.insert(id_of(stream));
    if (found->second.completion != nullptr) d.queue.enqueue(id_of(stream), [] {}, {found->second.completion});
    return cudaSuccess;
  });
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return call([&](Device& d) {
    if (d.capture) return cudaErrorIllegalState;
    d.capture = simt::Capture{{id_of(stream)}, {}};
    return cudaSuccess;
  });
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  return call([&](Device& d) {
    if (!d.capture) return cudaErrorIllegalState;
    d.graphs.push_back(std::move(d.capture->work));
    d.capture.reset();
    *graph = reinterpret_cast<cudaGraph_t>(d.graphs.size());
    return cudaSuccess;
  });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return call([&](Device& d) {
    *status = d.captures(id_of(stream)) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return call([&](Device& d) {
    const auto index = reinterpret_cast<uintptr_t>(executable);
    if (index == 0 || index > d.graphs.size()) return cudaErrorInvalidValue;
    for (const auto& work : d.graphs[index - 1]) d.enqueue(id_of(stream), work);
    return cudaSuccess;
  });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return call([&](Device& d) {
    *event = reinterpret_cast<cudaEvent_t>(d.next_event++);
    d.events[*event] = {};
    return cudaSuccess;
  });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call([&](Device& d) { return d.events.erase(event) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle; });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call([&](Device& d) {
    const auto found = d.events.find(event);
    if (found == d.events.end()) return cudaErrorInvalidResourceHandle;
    found->second.captured = d.captures(id_of(stream));
    found->second.completion = found->second.captured ? nullptr : d.queue.enqueue(id_of(stream), [] {});
    return cudaSuccess;
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call([&](Device& d) {
    const auto found = d.events.find(event);
    if (found == d.events.end()) return cudaErrorInvalidResourceHandle;
    if (found->second.completion != nullptr) d.queue.wait(found->second.completion);
    return cudaSuccess;
  });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call([&](Device& d) {
    const auto found = d.events.find(event);
    if (found == d.events.end()) return cudaErrorInvalidResourceHandle;
    return found->second.completion == nullptr || found->second.completion->done ? cudaSuccess : cudaErrorNotReady;
  });
}

// ---- errors and the device

cudaError_t cudaGetLastError() {
  Device& d = device();
  const std::lock_guard lock(d.mutex);
  const cudaError_t error = d.last_error;
  d.last_error = d.failure ? cudaErrorLaunchFailure : cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return device().last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure && device().failure) return device().failure->message.c_str();
  static thread_local char text[64];
  std::snprintf(text, sizeof text, "CUDA error %d", static_cast<int>(error));
  return text;
}
cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

} // extern "C"
