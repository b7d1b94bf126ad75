// "The last block does the rest": exactly one block of those that share a ticket learns that all others are done, and sees what
// they wrote.
#pragma once

#include <cstdint>

#include "plan.h"

namespace compressed_ddp::cuda {

// Call by all threads. The barrier orders the block's writes before thread 0, whose fence releases them to whoever takes the last
// ticket; the second fence acquires what the others released, and the second barrier hands it to the block. The counter wraps to
// 0, ready for the next launch.
__device__ __forceinline__ bool last_block(uint32_t* ticket, uint32_t num_blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(ticket, num_blocks - 1) == num_blocks - 1;
    if (last) __threadfence();
  }
  __syncthreads();
  return last;
}

} // namespace compressed_ddp::cuda
