// Stage 4 on CUDA: the payloads of all ranks, summed into the bucket in place. Torch-free; the result is that of cpu/decode_apply.h,
// bit for bit.
//
// A block owns a tile of the bucket in shared memory; every rank's entries of the tile are one run of its ascending indices, found by
// binary search, added in rank order 0 .. P-1; then one multiplication, one rounding, one store. No float atomics.
//
// Nothing in a payload is trusted: every header and every index is checked while it is read. What is found is left in DecodeStatus, and
// the bucket becomes NaN, on every rank alike. A later host call reads the status; nothing here waits for it.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/float_types.h"
#include "../wire_format.h"
#include "plan.h"

namespace compressed_ddp::cuda {

struct alignas(8) DecodeStatus { // zero before the first call; kernels only set
  uint32_t bad_rank;             // 1 + the lowest rank whose payload is not what this rank expects; 0 = none
  uint32_t generation;           // the host's: which of its clearings came last; no kernel touches it
  uint32_t
      step_is_bad; // that, or some rank flagged a non-finite entry, or a result is not finite: what was sent must come back (restore.h)
};

struct DecodeArguments {   // all pointers in device memory
  const uint8_t* gathered; // [count, payload_bytes(layout)], 8-byte aligned
  int32_t count;           // of payloads; the sum is multiplied by fp32(1 / count)
  void* bucket;            // [numel], written
  GradientType type;
  PayloadHeader expected; // make_header of the first payload's rank. Flags are not compared
  DecodeStatus* status;
  uint32_t rank_stride = 1; // from the rank of one payload to that of the next
};

// Loads the kernels, which CUDA does at their first launch otherwise; a device that cannot run them is an exception here.
void load_decode_apply(GradientType type, ValueFormat value_format);

// Enqueues two launches on `stream`.
void decode_apply(const DevicePlan& plan, const DecodeArguments& arguments, cudaStream_t stream);

struct NanIfFlaggedArguments { // all pointers in device memory
  const uint8_t* payloads;     // their headers begin every `stride` bytes
  int64_t stride;
  int32_t count;
  void* bucket; // [numel], written
  int64_t numel;
  GradientType type;
  DecodeStatus* status;
};

// NaN everywhere if some payload is flagged as non-finite or was bad: what decode_apply does at its end, for a bucket that several of
// them have written. Enqueues one launch on `stream`.
void nan_if_flagged(const NanIfFlaggedArguments& arguments, cudaStream_t stream);

} // namespace compressed_ddp::cuda
