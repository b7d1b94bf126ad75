// The stream on which the CUDA stages of an engine run, and how it meets the caller's. docs/streams.md has the picture.
//
// Device-generic torch (c10::Stream, c10::Event) on one side, the runtime's stream handle on the other: no part of torch that only
// a CUDA build has is linked, so one binary serves a CPU-only torch too. The tests without a GPU put another implementation of this
// header in place of device_stream.cpp.
#pragma once

#include <ATen/core/ivalue.h>
#include <cuda_runtime_api.h>

#include <memory>

namespace compressed_ddp {

// Whether buckets on this device are reduced by the CUDA stages.
bool has_cuda_stages(c10::Device device);

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

   private:
    struct Saved;
    std::unique_ptr<Saved> saved_;
  };

  // Inside a scope: completes the future behind what this stream holds by now; waiting for it makes the waiter's stream wait.
  void complete(c10::ivalue::Future& future, c10::IValue result, const at::Tensor& buffer);
  // Inside a scope, before a collective reads and after it wrote device memory.
  void before_collective();

  // The host waits until all is done.
  void synchronize();
  bool is_capturing() const; // into a CUDA graph

 private:
  struct Streams;
  std::unique_ptr<Streams> streams_;
};

} // namespace compressed_ddp
