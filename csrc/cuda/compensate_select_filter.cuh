// The pass that finds candidates: keys >= low, with their places, tile by tile. One block per tile.
//
// First pass (kAgain = false): acc = gradient + residual; candidates go to the tile's slot in index order; the residual becomes acc, but
// for keys >= mid, which will probably be selected, what sending leaves there: 0 with fp32 values, the rest of rounding with bf16, all of
// it with signs, until encode_lost (emit corrects the few that are not selected). A tile with more candidates than its slot holds, or with
// a non-finite acc, is deferred: nothing of it is written until emit.
// Second pass (kAgain = true), after the histogram pass: the same from the stored sums.
//
// The group's last block finds the bin that holds the k-th key, or asks for the histogram pass if the guess was wrong.
#pragma once

#include "compensate_select_histogram.cuh"

namespace compressed_ddp::cuda {

__device__ inline void finish_filter(const LargeGroup& group, GroupState& state, uint32_t* histogram) {
  const uint32_t above = state.above;
  const int64_t ranks[1] = {group.k - 1 - int64_t{above}};
  RankInHistogram found[1];
  find_ranks(histogram, kHistogramBins, ranks, true, found);
  if (threadIdx.x != 0) return;
  state.above = 0;
  state.again = above >= group.k || group.k - above > found[0].total;
  state.base = state.low + (found[0].bin << state.shift);
  state.remaining = found[0].rank + 1;
}

// Blocks per multiprocessor: as many as go without spills (tests/cuda_static): four of 64 registers, on sm_80 three.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kFilterBlocks = 3;
#else
constexpr int kFilterBlocks = 4;
#endif

template <typename gradient_t, bool kAgain>
__global__ void __launch_bounds__(kThreads, kFilterBlocks) filter_kernel(DevicePlan plan, SelectArguments a) {
  __shared__ BlockOrder order;
  const int t = blockIdx.x;
  GroupState& state = plan.states[plan.tiles[t].group];
  if (kAgain && state.again == 0) return;
  const Tile tile = plan.tiles[t];
  const LargeGroup& group = plan.large_groups[tile.group];
  const TileSource<gradient_t> source(a, tile);
  const uint32_t low = state.low, mid = state.mid, high = state.high, shift = state.shift;
  const bool deferred = kAgain && (plan.tile_states[t] & kDeferred) != 0;

  float acc[kRows][4], gradient_sq = 0, acc_sq = 0;
  uint32_t candidates = 0;
  Sums<float, 2> squares{};
  bool odd = false;
  source.load_tile(kAgain && !deferred, acc, gradient_sq);
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) {
      const uint32_t key = key_of(acc[r][j]);
      candidates |= static_cast<uint32_t>(key >= low) << (4 * r + j);
      odd |= !finite(key);
      if (finite(key)) acc_sq = __fadd_rn(acc_sq, __fmul_rn(acc[r][j], acc[r][j]));
    }
  }
  if constexpr (!kAgain) {
    odd = __syncthreads_or(odd);
    squares = block_sums<float, 2>({gradient_sq, acc_sq});
  } else {
    odd = false; // deferred already
  }
  order_block(candidates, 0, order);
  const bool read_all = deferred || odd || order.total > static_cast<uint32_t>(min(group.slot_numel, tile.numel));
  if (threadIdx.x == 0) {
    plan.tile_states[t] = !read_all ? order.total : kReadAll | (kAgain && !deferred ? 0 : kDeferred);
    if constexpr (!kAgain) {
      plan.sums[3 * t] = squares.of[0];
      plan.sums[3 * t + 1] = squares.of[1];
      if (odd) atomicOr(&plan.step->non_finite, 1u);
    }
  }

  uint32_t* histogram = plan.histograms + int64_t{tile.group} * kGroupHistogramBins;
  uint32_t above = 0;
  for (int r = 0; r < kRows; ++r) {
    int at = tile.slot + order.before[r][threadIdx.x / 32] + before_thread(candidates, r);
    float kept[4];
    for (int j = 0; j < 4; ++j) {
      const uint32_t key = key_of(acc[r][j]);
      const int i = r * kRowNumel + 4 * static_cast<int>(threadIdx.x) + j;
      kept[j] = key >= mid ? left_behind(plan, acc[r][j]) : acc[r][j];
      if ((candidates >> (4 * r + j) & 1u) == 0) continue;
      if (!read_all) {
        plan.slot_values[at] = acc[r][j];
        plan.slot_indices[at++] = static_cast<uint16_t>(i);
        if (kAgain && key >= mid && source.residual != nullptr) source.residual[i] = kept[j];
      }
      if (key >= high)
        ++above;
      else
        add_relaxed(&histogram[(key - low) >> shift], 1u);
    }
    if (!kAgain && !read_all) source.store_row(r, kept);
  }
  above = __reduce_add_sync(0xffffffffu, above);
  if (threadIdx.x % 32 == 0 && above != 0) add_relaxed(&state.above, above);
  if (last_block(&state.ticket, static_cast<uint32_t>(group.num_tiles))) finish_filter(group, state, histogram);
}

} // namespace compressed_ddp::cuda
