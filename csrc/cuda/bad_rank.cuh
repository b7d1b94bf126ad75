// What a received header must say, and how a kernel leaves word that it does not.
#pragma once

#include "decode_apply.h"

namespace compressed_ddp::cuda {

// In one load.
__device__ __forceinline__ PayloadHeader load_header(const uint8_t* payload) {
  const uint64_t word = *reinterpret_cast<const uint64_t*>(payload);
  PayloadHeader header;
  memcpy(&header, &word, sizeof header);
  return header;
}

// expected: of the first payload; this one is of a rank that lies that far behind.
__device__ inline bool header_is_right(const PayloadHeader& got, const PayloadHeader& expected, uint32_t ranks_behind) {
  return got.version == expected.version && (got.flags & ~kFlagNonFinite) == 0 &&
         got.rank == static_cast<uint16_t>(expected.rank + ranks_behind) && got.step == expected.step && got.layout == expected.layout;
}

// Lowest rank wins, whatever the order of blocks; 0 means none.
__device__ __forceinline__ void report_bad_rank(DecodeStatus* status, uint32_t rank) {
  const uint32_t mine = rank + 1;
  const uint32_t seen = atomicCAS(&status->bad_rank, 0u, mine);
  if (seen > mine) atomicMin(&status->bad_rank, mine);
  atomicOr(&status->step_is_bad, 1u);
}

} // namespace compressed_ddp::cuda
