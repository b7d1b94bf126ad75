#include "restore.h"

#include "../cpu/float_types.h"
#include "../wire_format.h"
#include "launch.h"

namespace compressed_ddp::cuda {
namespace {

// One thread per entry; its segment by binary search in the table, which stays in the caches.
__global__ void __launch_bounds__(kThreads) restore_kernel(DevicePlan plan, RestoreArguments a) {
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= plan.selected_numel || (a.condition != nullptr && *a.condition == 0) || (a.sent != nullptr && *a.sent == 0)) return;
  const auto* words = reinterpret_cast<const uint32_t*>(a.payload + sizeof(PayloadHeader));
  const int64_t index = static_cast<int32_t>(words[entry]);
  const float value = __uint_as_float(words[plan.selected_numel + entry]);
  if (index < 0 || index >= plan.numel || (__float_as_uint(value) & 0x7fffffffu) >= kInfinityKey) return;
  int begin = 0, end = plan.num_segments; // the last segment whose offset is at most index
  while (end - begin > 1) {
    const int middle = (begin + end) / 2;
    (plan.segment_offsets[middle] <= index ? begin : end) = middle;
  }
  float* residual = a.residuals[begin];
  if (residual == nullptr || (a.unused != nullptr && a.unused[begin] != 0)) return; // dense segments have no residual
  residual += index - plan.segment_offsets[begin];
  *residual = __fadd_rn(*residual, value);
}

} // namespace

void load_restore() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, restore_kernel), "loading restore");
}

void restore(const DevicePlan& plan, const RestoreArguments& arguments, cudaStream_t stream) {
  if (plan.selected_numel == 0) return;
  const auto blocks = static_cast<unsigned>((plan.selected_numel + kThreads - 1) / kThreads);
  restore_kernel<<<blocks, kThreads, 0, stream>>>(plan, arguments);
  check(cudaGetLastError(), "restore");
}

} // namespace compressed_ddp::cuda
