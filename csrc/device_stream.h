// The stream on which the CUDA stages of an engine run, and how it meets the caller's. docs/streams.md has the picture.
//
// Device-generic torch (c10::Stream, c10::Event) on one side, the runtime's stream handle on the other: no part of torch that only
// a CUDA build has is linked, so one binary serves a CPU-only torch too. The tests without a GPU run device_stream.cpp as it is, on
// streams of the stand-in runtime; what they put in place of device_cuda.cpp is said below.
#pragma once

#include <ATen/core/ivalue.h>
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>

namespace compressed_ddp {

// ---- device_cuda.cpp

// Whether buckets on this device are reduced by the CUDA stages: a CUDA device that can run the kernels of this build.
bool has_cuda_stages(c10::Device device);
// Whose streams order the work on tensors of this device; none has streams for us otherwise.
std::optional<c10::Device> device_of_streams(c10::Device device);

// ---- device_stream.cpp

// The caller's current stream is being captured into a CUDA graph.
bool is_capturing(c10::Device device);

class DeviceStream {
 public:
  explicit DeviceStream(c10::Device device); // a stream of high priority from torch's pool
  ~DeviceStream();
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  cudaStream_t handle() const;

  // While it lives, this stream is torch's current one; what the caller's stream holds by now comes first.
  class Scope {
   public:
    explicit Scope(DeviceStream& stream);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

    void join(); // what the caller's stream gets from now on comes behind what this stream holds

   private:
    struct Saved;
    std::unique_ptr<Saved> saved_;
  };

  // The allocator does not hand out the memory of `buffer` again before this stream is done with what it holds then: an owner that
  // has seen an error waits for nothing.
  void hold(const at::Tensor& buffer);

  // device_cuda.cpp, inside a scope: completes the future behind what this stream holds by now; waiting for it makes the waiter's
  // stream wait.
  void complete(c10::ivalue::Future& future, c10::IValue result, const at::Tensor& buffer);
  // device_cuda.cpp, inside a scope: torch's operators and collectives, which follow the current stream by themselves.
  void run(const std::function<void()>& of_torch);

  // The host waits until all is done.
  void synchronize();

 private:
  struct Streams;
  std::unique_ptr<Streams> streams_;
};

} // namespace compressed_ddp
