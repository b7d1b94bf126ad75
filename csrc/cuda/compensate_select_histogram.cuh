// The exact way to a range of keys: count all of them, per eighth of an octave. First kernel of the two-pass method, and what the
// one-pass method does after a wrong guess (kAgain: only groups that ask for it; all others leave at once). In that launch, which
// nearly always has nothing to do, the groups of one tile are selected as well.
#pragma once

#include "compensate_select_guess.cuh"
#include "compensate_select_small.cuh"

namespace compressed_ddp::cuda {

constexpr int kCountShift = 20; // 8 bits of exponent and 3 of mantissa
static_assert((kNanKey >> kCountShift) + 1 == kHistogramBins);

// TileState: candidates in the slot, or one of these.
constexpr uint32_t kReadAll = 0x10000;  // the slot is not valid: whoever needs candidates reads the tile
constexpr uint32_t kDeferred = 0x20000; // and nothing of the tile is written yet: the residual holds its old values, acc is their sum

__device__ inline void finish_histogram(const LargeGroup& group, GroupState& state, uint32_t* histogram) {
  const int64_t ranks[1] = {group.k - 1};
  RankInHistogram found[1];
  find_ranks(histogram, kHistogramBins, ranks, true, found);
  if (threadIdx.x != 0) return;
  state.above = 0;
  if (group.k > found[0].total) { // zeros must travel: all that is not zero, and the first zeros
    state.threshold = 0;
    state.ties = static_cast<int>(group.k - found[0].total);
    state.low = state.mid = state.high = kNanKey;
    state.again = 0;
    return;
  }
  state.low = max(found[0].bin << kCountShift, 1u);
  state.mid = state.high = (found[0].bin + 1) << kCountShift;
  state.shift = shift_for(state.low, state.high);
  state.again = 1;
}

template <typename gradient_t, bool kAgain>
__global__ void __launch_bounds__(kThreads, kAgain ? 2 : 3) histogram_kernel(DevicePlan plan, SelectArguments a) {
  if constexpr (kAgain) {
    if (blockIdx.x >= plan.num_runs) {
      select_small<gradient_t>(plan, a, static_cast<int>(blockIdx.x) - plan.num_runs);
      return;
    }
  }
  if (!kAgain && blockIdx.x == plan.num_runs) return clear_bits(plan, a);
  __shared__ uint32_t counts[kHistogramBins];
  const Run run = plan.runs[blockIdx.x];
  GroupState& state = plan.states[run.group];
  if (kAgain && state.again == 0) return;
  for (int b = 0; b < kHistogramBins / kThreads; ++b) counts[b * kThreads + threadIdx.x] = 0;
  __syncthreads();
  for (int t = run.first_tile; t < run.first_tile + run.num_tiles; ++t) {
    const Tile tile = plan.tiles[t];
    const TileSource<gradient_t> source(a, tile);
    const uint32_t tile_state = kAgain ? plan.tile_states[t] : 0;
    if (kAgain && (tile_state & kReadAll) == 0 && source.residual != nullptr) { // put back what the filter took out
#pragma unroll 1
      for (int c = threadIdx.x; c < static_cast<int>(tile_state); c += kThreads) { // rarely run
        const float value = plan.slot_values[tile.slot + c];
        if (key_of(value) >= state.mid) source.residual[plan.slot_indices[tile.slot + c]] = value;
      }
      __syncthreads();
    }
    const bool stored = kAgain && (tile_state & kDeferred) == 0;
    float acc[kRows][4], gradient_sq = 0, acc_sq = 0;
    bool odd = false;
    source.load_tile(stored, acc, gradient_sq);
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) {
        const uint32_t key = key_of(acc[r][j]);
        if (key != 0) atomicAdd(&counts[key >> kCountShift], 1u);
        odd |= !finite(key);
        if (finite(key)) acc_sq = __fadd_rn(acc_sq, __fmul_rn(acc[r][j], acc[r][j]));
      }
    }
    if constexpr (!kAgain) {
      odd = __syncthreads_or(odd);
      if (!odd)
        for (int r = 0; r < kRows; ++r) source.store_row(r, acc[r]);
      const Sums<float, 2> sums = block_sums<float, 2>({gradient_sq, acc_sq});
      if (threadIdx.x == 0) {
        plan.tile_states[t] = odd ? kReadAll | kDeferred : 0;
        plan.sums[3 * t] = sums.of[0];
        plan.sums[3 * t + 1] = sums.of[1];
        if (odd) atomicOr(&plan.step->non_finite, 1u);
      }
    }
  }
  if constexpr (kAgain) __syncthreads(); // otherwise the barrier within the sums has followed the last count
  uint32_t* histogram = plan.histograms + int64_t{run.group} * kGroupHistogramBins;
  for (int i = 0; i < kHistogramBins / kThreads; ++i) {
    const int b = i * kThreads + static_cast<int>(threadIdx.x);
    if (counts[b] != 0) add_relaxed(&histogram[b], counts[b]);
  }
  if (last_block(&state.ticket, static_cast<uint32_t>(plan.large_groups[run.group].num_runs)))
    finish_histogram(plan.large_groups[run.group], state, histogram);
}

} // namespace compressed_ddp::cuda
