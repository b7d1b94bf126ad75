// What a received header must say, and how a kernel leaves word that it does not.
#pragma once

#include "decode_apply.h"

namespace compressed_ddp::cuda {

// expected: of the first payload; this one is of a rank that lies that far behind.
__device__ inline bool header_is_right(const PayloadHeader& got, const PayloadHeader& expected, uint32_t ranks_behind) {
  return got.magic == expected.magic && got.version == expected.version && (got.flags & ~kFlagNonFinite) == 0 &&
         got.value_format == expected.value_format && got.rank == expected.rank + ranks_behind && got.world_size == expected.world_size &&
         got.layout_hash == expected.layout_hash && got.step == expected.step && got.numel == expected.numel &&
         got.selected_numel == expected.selected_numel && got.dense_numel == expected.dense_numel &&
         got.payload_bytes == expected.payload_bytes;
}

// Lowest rank wins, whatever the order of blocks; 0 means none.
__device__ __forceinline__ void report_bad_rank(DecodeStatus* status, uint32_t rank) {
  const uint32_t mine = rank + 1;
  const uint32_t seen = atomicCAS(&status->bad_rank, 0u, mine);
  if (seen > mine) atomicMin(&status->bad_rank, mine);
  atomicOr(&status->step_is_bad, 1u);
}

} // namespace compressed_ddp::cuda
