// Every launch is checked: a refused launch is an exception with the kernel's name, never a silent nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace compressed_ddp::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("compressed_ddp: ") + what + ": " + cudaGetErrorString(error));
}

} // namespace compressed_ddp::cuda
