// Kernels with one mistake each, of the kinds that the real ones could have; planted_bugs_test.cpp says what has to notice it.
#include "planted_bugs.h"

namespace compressed_ddp::testing {
namespace {

constexpr int kThreads = 128;

// Adds up `numel` values; the last block writes the sum of the blocks' sums.
__global__ void sum_kernel(const uint32_t* values, int numel, uint32_t* partial, uint32_t* ticket, uint32_t* sum, PlantedBug bug) {
  __shared__ uint32_t warp_sums[kThreads / 32];
  __shared__ bool last;
  if (threadIdx.x < kThreads / 32) warp_sums[threadIdx.x] = 0; // so that reading too early is a race, not a first read
  __syncthreads();
  uint32_t mine = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < numel; i += gridDim.x * kThreads) mine += values[i];
  const uint32_t mask = bug == PlantedBug::kWrongMask && threadIdx.x < 32 ? 0x7fffffffu : 0xffffffffu;
  mine = __reduce_add_sync(mask, mine);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = mine;
  if (bug != PlantedBug::kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t block_sum = 0;
    for (const uint32_t warp_sum : warp_sums) block_sum += warp_sum;
    partial[blockIdx.x] = block_sum;
    if (bug != PlantedBug::kNoFenceBeforeTicket) __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    if (bug != PlantedBug::kNoFenceAfterTicket && last) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  uint32_t total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  *sum = total;
}

// Each lane hands its value to the next one through shared memory.
__global__ void rotate_kernel(uint32_t* values, PlantedBug bug) {
  __shared__ uint32_t shared[32];
  shared[threadIdx.x] = 0;
  __syncwarp();
  shared[threadIdx.x] = values[threadIdx.x];
  if (bug != PlantedBug::kNoSyncWarp) __syncwarp();
  values[threadIdx.x] = shared[(threadIdx.x + 1) % 32];
}

// Each block appends its candidates to a slot of `capacity` entries of its own.
__global__ void slot_kernel(const uint32_t* values, uint32_t low, uint32_t* slots, uint32_t* counts, int capacity, PlantedBug bug) {
  __shared__ uint32_t count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const uint32_t value = values[blockIdx.x * kThreads + threadIdx.x];
  if (value >= low) {
    const uint32_t at = atomicAdd(&count, 1u);
    if (at < static_cast<uint32_t>(capacity) || bug == PlantedBug::kSlotOverflow) slots[blockIdx.x * capacity + at] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// A chain over blocks: each adds its number to what the block before it published.
__global__ void chain_kernel(uint32_t* ticket, uint32_t* published, PlantedBug bug) {
  if (threadIdx.x != 0) return;
  const uint32_t block = bug == PlantedBug::kLookBackByBlockIndex ? blockIdx.x : atomicAdd(ticket, 1u);
  uint32_t before = 0;
  while (block > 0 && before == 0) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(before) : "l"(published + block - 1) : "memory");
    if (before == 0) __nanosleep(32);
  }
  atomicExch(&published[block], before + 1);
}

// The index of every value that is above `threshold`, and of the first `ties` that equal it, in order; one warp.
__global__ void ties_kernel(const uint32_t* values, uint32_t threshold, uint32_t ties, uint32_t* out, PlantedBug bug) {
  const uint32_t below = (1u << threadIdx.x) - 1;
  const bool above = values[threadIdx.x] > threshold, equal = values[threadIdx.x] == threshold;
  const uint32_t above_before = __popc(__ballot_sync(0xffffffffu, above) & below);
  const uint32_t equal_before = __popc(__ballot_sync(0xffffffffu, equal) & below);
  const uint32_t allowed = bug == PlantedBug::kLostTie && ties > 0 ? ties - 1 : ties;
  if (above || (equal && equal_before < allowed)) out[above_before + min(equal_before, allowed)] = threadIdx.x;
}

} // namespace

void run_sum(const uint32_t* values, int numel, uint32_t* partial, uint32_t* ticket, uint32_t* sum, int blocks, PlantedBug bug) {
  sum_kernel<<<blocks, kThreads>>>(values, numel, partial, ticket, sum, bug);
}
void run_rotate(uint32_t* values, PlantedBug bug) { rotate_kernel<<<1, 32>>>(values, bug); }
void run_slots(const uint32_t* values, uint32_t low, uint32_t* slots, uint32_t* counts, int capacity, int blocks, PlantedBug bug) {
  slot_kernel<<<blocks, kThreads>>>(values, low, slots, counts, capacity, bug);
}
void run_chain(uint32_t* ticket, uint32_t* published, int blocks, PlantedBug bug) { chain_kernel<<<blocks, 32>>>(ticket, published, bug); }
void run_ties(const uint32_t* values, uint32_t threshold, uint32_t ties, uint32_t* out, PlantedBug bug) {
  ties_kernel<<<1, 32>>>(values, threshold, ties, out, bug);
}

} // namespace compressed_ddp::testing
