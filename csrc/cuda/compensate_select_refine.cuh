// The exact k-th key of each large group, from the candidates of its tiles.
#pragma once

#include "compensate_select_filter.cuh"

namespace compressed_ddp::cuda {

// Calls function(valid, i, value) for the candidates of a tile in index order, 32 at a time, by all lanes of a warp; `valid` is
// false for the lanes beyond the last. From the slot, or from the tile itself (`read_all`: every entry is a candidate).
template <typename gradient_t, typename Function>
__device__ __forceinline__ void for_each_candidate(const DevicePlan& plan, const Tile& tile, const TileSource<gradient_t>& source,
                                                   uint32_t tile_state, bool read_all, Function&& function) {
  const int lane = threadIdx.x % 32;
  const int count = read_all ? tile.numel : static_cast<int>(tile_state);
  const bool stored = (tile_state & kDeferred) == 0;
#pragma unroll 1 // unrolled, emit would spill registers on sm_100 and sm_120
  for (int first = 0; first < count; first += 32) {
    const int c = first + lane;
    const bool valid = c < count;
    int i = c;
    float value = 0;
    if (valid) {
      if (read_all) {
        value = source.acc(c, stored);
      } else {
        value = plan.slot_values[tile.slot + c];
        i = plan.slot_indices[tile.slot + c];
      }
    }
    function(valid, i, value);
  }
}

__device__ inline void finish_refine(GroupState& state, uint32_t* histogram) {
  const int64_t ranks[1] = {int64_t{state.remaining} - 1};
  RankInHistogram found[1];
  find_ranks(histogram, 1 << state.shift, ranks, true, found);
  if (threadIdx.x != 0) return;
  state.threshold = state.base + found[0].bin;
  state.ties = static_cast<int>(found[0].rank) + 1;
}

template <typename gradient_t>
__global__ void __launch_bounds__(kThreads) refine_kernel(DevicePlan plan, SelectArguments a) {
  const Run run = plan.runs[blockIdx.x];
  GroupState& state = plan.states[run.group];
  if (state.low == kNanKey) return; // threshold 0 is known
  uint32_t* histogram = plan.histograms + int64_t{run.group} * kGroupHistogramBins;
  const int warp = threadIdx.x / 32;
  if (warp < run.num_tiles) {
    const int t = run.first_tile + warp;
    const Tile tile = plan.tiles[t];
    const uint32_t tile_state = plan.tile_states[t], base = state.base, width = 1u << state.shift;
    const TileSource<gradient_t> source(a, tile);
    for_each_candidate(plan, tile, source, tile_state, (tile_state & kReadAll) != 0, [&](bool valid, int, float value) {
      const uint32_t offset = key_of(value) - base; // wraps to a large number below the base
      if (valid && offset < width) add_relaxed(&histogram[offset], 1u);
    });
  }
  if (last_block(&state.ticket, static_cast<uint32_t>(plan.large_groups[run.group].num_runs))) finish_refine(state, histogram);
}

} // namespace compressed_ddp::cuda
