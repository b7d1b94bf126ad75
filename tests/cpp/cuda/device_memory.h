// Device memory of the tests. With the stand-in runtime (tests/cpp/ptx) this is the interpreter's memory, where every access is
// checked; on a GPU it is the GPU's. The tests see no difference.
#pragma once

#include <cuda_runtime_api.h>

#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace compressed_ddp::testing {

inline void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// An allocation of its own, so that an access one entry beyond is one outside of known memory. `front` entries lie before the data:
// 16-byte accesses are impossible if that shifts it.
template <typename T>
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t size, size_t front = 0) : size_(size), front_(front) {
    require(cudaMalloc(&base_, (size + front) * sizeof(T) + (size + front == 0)), "cudaMalloc");
  }
  explicit DeviceMemory(std::span<const T> values, size_t front = 0) : DeviceMemory(values.size(), front) { upload(values); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  DeviceMemory(DeviceMemory&& other) noexcept : base_(other.base_), size_(other.size_), front_(other.front_) { other.base_ = nullptr; }
  ~DeviceMemory() { cudaFree(base_); }

  T* data() const { return static_cast<T*>(base_) + front_; }
  size_t size() const { return size_; }
  void upload(std::span<const T> values) {
    if (!values.empty()) require(cudaMemcpy(data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice), "upload");
  }
  void fill_bytes(int byte) { require(cudaMemset(data(), byte, size_ * sizeof(T)), "cudaMemset"); }
  std::vector<T> download() const {
    std::vector<T> values(size_);
    if (size_ > 0) require(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return values;
  }

 private:
  void* base_ = nullptr;
  size_t size_, front_;
};

template <typename T>
DeviceMemory(std::vector<T>, size_t) -> DeviceMemory<T>;

} // namespace compressed_ddp::testing
