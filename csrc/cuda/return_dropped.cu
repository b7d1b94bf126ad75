#include "return_dropped.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "elias_fano.cuh"
#include "launch.h"
#include "segment_of.cuh"

namespace compressed_ddp::cuda {
namespace {

__device__ __forceinline__ bool is_zero(float value) { return value == 0; }
__device__ __forceinline__ bool is_zero(Float16 value) { return (value.bits & 0x7fffu) == 0; }
__device__ __forceinline__ bool is_zero(BFloat16 value) { return (value.bits & 0x7fffu) == 0; }

// Where an entry's residual lies; nullptr in a dense segment.
__device__ __forceinline__ float* residual_of(const DevicePlan& plan, float* const* residuals, int64_t index) {
  const int segment = segment_of(plan, index);
  return residuals[segment] == nullptr ? nullptr : residuals[segment] + (index - plan.segment_offsets[segment]);
}

// A block per stride of the directory, as in restore. A word of `returned` belongs to 32 entries, which threads of two warps may hold.
template <typename gradient_t, ValueFormat format>
__global__ void __launch_bounds__(kThreads) return_dropped_kernel(DevicePlan plan, ReturnDroppedArguments a) {
  if (*a.sent == 0) return;
  const PayloadView payload = payload_view(plan, a.payload);
  for_each_entry(plan, payload, blockIdx.x, [&](int64_t entry, int64_t index) {
    if (!is_zero(static_cast<const gradient_t*>(a.bucket)[index])) return;
    float* residual = residual_of(plan, a.residuals, index);
    if (residual == nullptr) return;
    *residual = __fadd_rn(*residual, decoded_value<format>(plan, payload, entry, {0, plan.num_groups}));
    atomicOr(&a.returned[entry / 32], 1u << (entry % 32));
  });
}

template <ValueFormat format>
__global__ void __launch_bounds__(kThreads) add_lost_kernel(DevicePlan plan, AddLostArguments a, uint32_t largest_zero) {
  if ((a.condition != nullptr && *a.condition == 0) || *a.sent == 0) return;
  const PayloadView payload = payload_view(plan, a.payload);
  for_each_entry(plan, payload, blockIdx.x, [&](int64_t entry, int64_t index) {
    const float value = decoded_value<format>(plan, payload, entry, {0, plan.num_groups});
    if ((__float_as_uint(value) & 0x7fffffffu) <= largest_zero) return;
    float* residual = residual_of(plan, a.residuals, index);
    if (residual != nullptr) *residual = __fadd_rn(*residual, __fmul_rn(a.factor, a.lost[index]));
  });
}

template <typename Function>
void with_both(GradientType type, ValueFormat value_format, Function&& function) {
  with_gradient_type(type, [&](auto gradient) { with_value_format(value_format, [&](auto format) { function(gradient, format); }); });
}

} // namespace

void load_return_dropped(GradientType type, ValueFormat value_format) {
  cudaFuncAttributes attributes;
  with_both(type, value_format, [&](auto gradient, auto format) {
    check(cudaFuncGetAttributes(&attributes, return_dropped_kernel<decltype(gradient), format.value>), "loading return_dropped");
    check(cudaFuncGetAttributes(&attributes, add_lost_kernel<format.value>), "loading add_lost");
  });
}

void return_dropped(const DevicePlan& plan, const ReturnDroppedArguments& arguments, cudaStream_t stream) {
  if (plan.selected_numel == 0) return;
  const auto blocks = static_cast<unsigned>(plan.sections.directory_numel);
  with_both(arguments.type, plan.value_format, [&](auto gradient, auto format) {
    return_dropped_kernel<decltype(gradient), format.value><<<blocks, kThreads, 0, stream>>>(plan, arguments);
  });
  check(cudaGetLastError(), "return_dropped");
}

void add_lost(const DevicePlan& plan, const AddLostArguments& arguments, cudaStream_t stream) {
  if (plan.selected_numel == 0) return;
  const auto blocks = static_cast<unsigned>(plan.sections.directory_numel);
  with_value_format(plan.value_format, [&](auto format) {
    add_lost_kernel<format.value><<<blocks, kThreads, 0, stream>>>(plan, arguments, largest_zero_key(arguments.type));
  });
  check(cudaGetLastError(), "add_lost");
}

} // namespace compressed_ddp::cuda
