// Histograms over keys: where the entry of a given rank lies.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "plan.h"

namespace compressed_ddp::cuda {

struct RankInHistogram {
  uint32_t bin;   // holds the entry of that rank; only meaningful if rank < total
  uint32_t rank;  // of that entry within the bin
  uint32_t total; // entries in all bins
};

// Counts from the last bin down. `histogram` [num_bins] may lie in memory or be shared; num_bins is a multiple of kThreads or at
// most it. Bins are set to zero when `clear`. Call by all threads, with a barrier between two calls; returns the same to all.
template <int kRanks>
__device__ void find_ranks(uint32_t* histogram, int num_bins, const int64_t (&ranks)[kRanks], bool clear,
                           RankInHistogram (&found)[kRanks]) {
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ RankInHistogram shared[kRanks];
  const int per_thread = (num_bins + kThreads - 1) / kThreads;
  const int last = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread; // this thread's bins: last, last - 1, ..
  uint32_t sum = 0;
  for (int b = 0; b < per_thread; ++b)
    if (last - b >= 0) sum += histogram[last - b];
  uint32_t before, total;
  Scan(storage).ExclusiveSum(sum, before, total);
  if (threadIdx.x < kRanks) shared[threadIdx.x] = {0, 0, total};
  __syncthreads();
  for (int i = 0; i < kRanks; ++i) {
    if (ranks[i] < before || ranks[i] >= static_cast<int64_t>(before) + sum) continue;
    auto rank = static_cast<uint32_t>(ranks[i] - before);
    int bin = last;
    for (; rank >= histogram[bin]; --bin) rank -= histogram[bin];
    shared[i] = {static_cast<uint32_t>(bin), rank, total};
  }
  if (clear)
    for (int b = 0; b < per_thread; ++b)
      if (last - b >= 0 && histogram[last - b] != 0) histogram[last - b] = 0;
  __syncthreads();
  for (int i = 0; i < kRanks; ++i) found[i] = shared[i];
}

// The block's sums, each in an order fixed by the block's shape; right in thread 0. Call by all threads, with a barrier between two
// calls. All sums share the one barrier inside.
template <typename number_t, int kSums>
struct Sums {
  number_t of[kSums];
};
template <typename number_t, int kSums>
__device__ __forceinline__ Sums<number_t, kSums> block_sums(const Sums<number_t, kSums>& values) {
  using Reduce = cub::BlockReduce<Sums<number_t, kSums>, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  return Reduce(storage).Reduce(values, [](Sums<number_t, kSums> a, const Sums<number_t, kSums>& b) {
    for (int s = 0; s < kSums; ++s) a.of[s] += b.of[s];
    return a;
  });
}

} // namespace compressed_ddp::cuda
