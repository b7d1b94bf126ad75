// restore_ on CUDA: adds this rank's own payload back to the residual. The contract is that of cpu/restore.h.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace compressed_ddp::cuda {

struct RestoreArguments { // all pointers in device memory
  const uint8_t* payload; // written by this process for this layout
  float* const* residuals;
  const uint32_t* condition;          // nothing happens if it points to 0 (DecodeStatus::step_is_bad); nullptr = always
  const uint32_t* sent = nullptr;     // nothing happens if it points to 0 (SelectArguments::sent)
  const uint32_t* returned = nullptr; // bits of entries that have come back already (return_dropped.h); nullptr = none
};

void load_restore(ValueFormat value_format); // as load_decode_apply

// Enqueues one launch on `stream`.
void restore(const DevicePlan& plan, const RestoreArguments& arguments, cudaStream_t stream);

} // namespace compressed_ddp::cuda
