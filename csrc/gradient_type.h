// The core's name for a gradient's dtype.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "cpu/float_types.h"

namespace compressed_ddp {

// Throws ValueError for any dtype but float32, float16 and bfloat16.
inline GradientType gradient_type(const at::Tensor& gradient) {
  switch (gradient.scalar_type()) {
    case at::kFloat:
      return GradientType::kFloat32;
    case at::kHalf:
      return GradientType::kFloat16;
    case at::kBFloat16:
      return GradientType::kBFloat16;
    default:
      TORCH_CHECK_VALUE(false, "compressed_ddp: expected gradients of dtype float32, float16 or bfloat16, got ", gradient.scalar_type(),
                        "; leave such a model to DDP's own all-reduce");
  }
}

// The other way round.
inline at::ScalarType scalar_type(GradientType type) {
  return type == GradientType::kFloat32 ? at::kFloat : type == GradientType::kFloat16 ? at::kHalf : at::kBFloat16;
}

} // namespace compressed_ddp
