// Stages 1 and 2 on CUDA: compensate_select_ and encode, from the gradient to the finished payload, in one sequence of launches.
// Torch-free; the contract of the results is that of cpu/compensate_select.h and cpu/encode.h, bit for bit.
//
// Two ways to the same result, both exact for any data:
//
//   one pass   guess      a threshold range per group from a sample of this step           see below
//   (E)        filter     compensate; candidates to their tile's slot                      gradient and residual, once
//              histogram, filter again     only where the guess was wrong: exits at once otherwise
//              refine     the exact k-th key, from the candidates                           candidates
//              emit       selected candidates in index order to the payload; dense part, header
//              encode_lost    sign values only: what their scales take out of the residual  sent entries
//
//   two passes histogram  compensate; count keys per eighth of an octave                   gradient and residual, once
//   (D)        filter     candidates above the k-th entry's bin to their tile's slot       residual, once more
//              refine, emit, encode_lost
//
// The sample of a group of N entries with k to send has 2.2 (N k)^(1/3), at least 4096 and at most 2^20 (plan.cpp; a sector of 8
// at least of every tile): most of a group of 5000, at most 1/64 of one of 2^18 or more at densities up to 0.09.
//
// Everything is ordered by the stream: no host synchronisation, no allocation, the same launches in every step, so that a CUDA graph
// can hold them. Blocks of one kernel meet only in tickets ("the last block does the rest") and, in emit, in a look-back over runs.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/float_types.h"
#include "../wire_format.h"
#include "plan.h"

namespace compressed_ddp::cuda {

enum class Method : uint8_t { kOnePass, kTwoPasses };

// Sums over the compressed segments and, for the gradient, the dense ones; fp32 partial sums, added in double in a fixed order.
struct SelectStatistics {
  double gradient_sq;
  double acc_sq; // compressed segments only, as is sent_sq
  double sent_sq;
};

struct SelectArguments { // all pointers in device memory
  const void* gradient;  // [numel], flat bucket
  GradientType type;
  float* const*
      residuals; // per segment, 4-byte aligned; nullptr = no error feedback. 16-byte accesses need equal alignment with the gradient
  const uint8_t* unused;        // per segment, as in CompensateSelectArguments; or nullptr
  uint8_t* payload;             // [payload_bytes(layout)], 8-byte aligned
  PayloadHeader header;         // make_header(.., non_finite = false): the flag is set on the device
  SelectStatistics* statistics; // written
  uint32_t* sent = nullptr;     // set to 1 by the last kernel: the payload holds entries that are missing from the residual
};

// Loads the kernels of both methods, which CUDA does at their first launch otherwise: a selection that stops halfway has taken
// entries out of the residual that no payload holds.
void load_compensate_select(GradientType type, ValueFormat value_format);
cudaError_t try_compensate_select(); // whether the current device can run them, asked of one

// Enqueues the launches on `stream`. The plan's workspace must not be used by another stream at the same time.
void compensate_select_and_encode(const DevicePlan& plan, const SelectArguments& arguments, Method method, cudaStream_t stream);

// Clears the part of the workspace that must be zero before the first selection, and after a selection that did not run to its end.
void clear_workspace(const Plan& plan, void* workspace, cudaStream_t stream);

} // namespace compressed_ddp::cuda
