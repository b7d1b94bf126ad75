#include "restore.h"

#include "elias_fano.cuh"
#include "launch.h"
#include "segment_of.cuh"

namespace compressed_ddp::cuda {
namespace {

// A block per stride of the directory.
template <ValueFormat format>
__global__ void __launch_bounds__(kThreads) restore_kernel(DevicePlan plan, RestoreArguments a) {
  if ((a.condition != nullptr && *a.condition == 0) || (a.sent != nullptr && *a.sent == 0)) return;
  const PayloadView payload = payload_view(plan, a.payload);
  for_each_entry(plan, payload, blockIdx.x, [&](int64_t entry, int64_t index) {
    if (a.returned != nullptr && (a.returned[entry / 32] >> (entry % 32) & 1u) != 0) return;
    const float value = decoded_value<format>(plan, payload, entry, {0, plan.num_groups});
    if (value == 0 || (__float_as_uint(value) & 0x7fffffffu) >= kInfinityKey) return;
    const int segment = segment_of(plan, index);
    float* residual = a.residuals[segment];
    if (residual == nullptr) return;
    residual += index - plan.segment_offsets[segment];
    *residual = __fadd_rn(*residual, value);
  });
}

} // namespace

void load_restore(ValueFormat value_format) {
  cudaFuncAttributes attributes;
  with_value_format(value_format,
                    [&](auto format) { check(cudaFuncGetAttributes(&attributes, restore_kernel<format.value>), "loading restore"); });
}

void restore(const DevicePlan& plan, const RestoreArguments& arguments, cudaStream_t stream) {
  if (plan.selected_numel == 0) return;
  const auto blocks = static_cast<unsigned>(plan.sections.directory_numel);
  with_value_format(plan.value_format,
                    [&](auto format) { restore_kernel<format.value><<<blocks, kThreads, 0, stream>>>(plan, arguments); });
  check(cudaGetLastError(), "restore");
}

} // namespace compressed_ddp::cuda
