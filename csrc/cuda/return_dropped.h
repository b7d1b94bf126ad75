// What an exchange that selects a second time leaves out, on CUDA. The contract is that of cpu/return_dropped.h, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace compressed_ddp::cuda {

struct ReturnDroppedArguments { // all pointers in device memory
  const uint8_t* payload;       // written by this process for this layout
  const void* bucket;           // [numel], the result
  GradientType type;
  float* const* residuals;
  const uint32_t* sent; // nothing happens if it points to 0 (SelectArguments::sent)
  uint32_t* returned;   // [ceil(selected_numel / 32)], zero before
};

struct AddLostArguments { // all pointers in device memory
  const uint8_t* payload; // of the averages, written by this process for this layout, or zeros
  const float* lost;      // [numel]
  float factor;
  GradientType type; // of the result
  float* const* residuals;
  const uint32_t* condition; // nothing happens if it points to 0; nullptr = always
  const uint32_t* sent;      // nothing happens if it points to 0
};

void load_return_dropped(GradientType type, ValueFormat value_format); // as load_decode_apply; of both

// Each enqueues one launch on `stream`.
void return_dropped(const DevicePlan& plan, const ReturnDroppedArguments& arguments, cudaStream_t stream);
void add_lost(const DevicePlan& plan, const AddLostArguments& arguments, cudaStream_t stream);

} // namespace compressed_ddp::cuda
