// What all launches share. Every one is checked: a refused launch is an exception with the kernel's name, never a silent nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../layout.h"

namespace compressed_ddp::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("compressed_ddp: ") + what + ": " + cudaGetErrorString(error));
}

// Calls function with the value format as a constant (its member `value`), for kernels that are compiled for each.
template <typename Function>
void with_value_format(ValueFormat value_format, Function&& function) {
  switch (value_format) {
    case ValueFormat::kFloat32:
      return function(std::integral_constant<ValueFormat, ValueFormat::kFloat32>{});
    case ValueFormat::kBFloat16:
      return function(std::integral_constant<ValueFormat, ValueFormat::kBFloat16>{});
    case ValueFormat::kSign:
      return function(std::integral_constant<ValueFormat, ValueFormat::kSign>{});
  }
}

} // namespace compressed_ddp::cuda
