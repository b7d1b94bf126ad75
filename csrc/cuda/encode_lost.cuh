// Value format sign: the scales are known only when all of a group is selected, so that what its entries lose (and until now have kept
// whole) is taken out of the residual by a pass of its own over the sent entries.
#pragma once

#include "encode.cuh"
#include "segment_of.cuh"

namespace compressed_ddp::cuda {

// A block per stride of the directory. An entry of a segment that is unused on this rank was zero, and is sent as its group's scale like
// any other: that, too, comes out of the residual.
static __global__ void __launch_bounds__(kThreads) encode_lost_kernel(DevicePlan plan, SelectArguments a) {
  const PayloadView payload = payload_view(plan, a.payload);
  for_each_entry(plan, payload, blockIdx.x, [&](int64_t entry, int64_t index) {
    const int segment = segment_of(plan, index);
    float* residual = a.residuals[segment] + (index - plan.segment_offsets[segment]);
    *residual = __fsub_rn(*residual, decoded_value<ValueFormat::kSign>(plan, payload, entry, {0, plan.num_groups}));
  });
}

} // namespace compressed_ddp::cuda
