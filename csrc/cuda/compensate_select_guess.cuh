// Kernel 1 of the one-pass method: a range of keys that holds the k-th one, but for about one selection in 10^4 of independent entries.
//
// A block samples one run of tiles, whole 32-byte sectors spread over each tile; the keys go to the group's histogram of 32 bins per
// octave; the group's last block takes three edges from it: `low` and `high` four standard deviations of the sample's rank to either
// side, and `mid` at the rank itself. All are bin edges rounded away from the k-th key. A wrong guess costs a second pass, nothing else.
//
// Whole sectors are sampled, so entries that go with their neighbours (rows of an embedding, columns of one unit) tell less than as many
// independent ones, and guesses are wrong more often: if all eight of a sector were alike, the four deviations would be 1.4, and about one
// guess in six wrong.
#pragma once

#include "encode.cuh"
#include "histogram.cuh"
#include "ticket.cuh"
#include "tile.cuh"

namespace compressed_ddp::cuda {

constexpr int kGuessShift = 18; // 8 bits of exponent and 5 of mantissa: kGroupHistogramBins
static_assert((kNanKey >> kGuessShift) + 1 == kGroupHistogramBins);
constexpr float kMarginSigmas = 4;
constexpr float kMarginEntries = 4;
constexpr uint32_t kMaxRange = 1u << 24; // of high - low: two octaves, so that refine needs at most kGroupHistogramBins bins
constexpr int kHistogramBits = 11;
static_assert(1 << kHistogramBits == kHistogramBins && (kMaxRange >> kHistogramBits) <= kGroupHistogramBins);

// The width of the filter's bins: the smallest power of two with which kHistogramBins of them cover [low, high).
__device__ __forceinline__ uint32_t shift_for(uint32_t low, uint32_t high) {
  const int bits = 32 - __clz(static_cast<int>(high - low - 1));
  return bits > kHistogramBits ? bits - kHistogramBits : 0;
}

__device__ inline void finish_guess(const LargeGroup& group, GroupState& state, uint32_t* histogram) {
  const float expected = static_cast<float>(group.k) * static_cast<float>(state.sampled) / static_cast<float>(group.numel);
  const float margin = kMarginSigmas * sqrtf(expected) + kMarginEntries;
  const int64_t ranks[3] = {static_cast<int64_t>(expected + margin), static_cast<int64_t>(expected),
                            expected > margin ? static_cast<int64_t>(expected - margin) : -1};
  RankInHistogram found[3];
  find_ranks(histogram, kGroupHistogramBins, ranks, true, found);
  if (threadIdx.x != 0) return;
  state.sampled = 0;
  if (ranks[0] >= found[0].total) { // so many zeros that the k-th key may be one: candidates would be all that is not
    state.low = state.mid = state.high = kInfinityKey;
    state.shift = 0;
    return;
  }
  state.low = max(found[0].bin << kGuessShift, 1u);
  state.mid = max(found[1].bin << kGuessShift, state.low);
  const uint32_t high = ranks[2] < 0 ? state.low + kMaxRange : (found[2].bin + 1) << kGuessShift;
  state.high = min(min(high, state.low + kMaxRange), kInfinityKey);
  state.shift = state.high > state.low ? shift_for(state.low, state.high) : 0;
}

template <typename gradient_t>
__global__ void __launch_bounds__(kThreads) guess_kernel(DevicePlan plan, SelectArguments a) {
  if (blockIdx.x == plan.num_runs) return clear_bits(plan, a);
  const Run run = plan.runs[blockIdx.x];
  GroupState& state = plan.states[run.group];
  uint32_t* histogram = plan.histograms + int64_t{run.group} * kGroupHistogramBins;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < run.num_tiles) {
    const Tile tile = plan.tiles[run.first_tile + warp];
    const TileSource<gradient_t> source(a, tile);
    const int slots = max(1, tile.numel / kSectorNumel);
    uint32_t sampled = 0;
    for (int s = lane / kSectorNumel; s < tile.sectors; s += 32 / kSectorNumel) { // four sectors at a time
      // One sector of each stratum, moved by a hash of the place, so that periodic data is not hit in step.
      const int begin = static_cast<int>(int64_t{slots} * s / tile.sectors),
                end = static_cast<int>(int64_t{slots} * (s + 1) / tile.sectors);
      const auto hash = static_cast<uint32_t>((static_cast<uint64_t>(tile.offset) + s + 1) * 0x9e3779b97f4a7c15ull >> 33);
      const int slot = begin + static_cast<int>(hash % static_cast<uint32_t>(max(1, end - begin)));
      const int i = slot * kSectorNumel + lane % kSectorNumel;
      if (i >= tile.numel) continue;
      ++sampled;
      const uint32_t key = key_of(source.acc(i, false));
      if (key != 0) add_relaxed(&histogram[key >> kGuessShift], 1u); // zeros are the entries that are missing from the total
    }
    sampled = __reduce_add_sync(0xffffffffu, sampled);
    if (lane == 0) add_relaxed(&state.sampled, sampled);
  }
  if (last_block(&state.ticket, static_cast<uint32_t>(plan.large_groups[run.group].num_runs)))
    finish_guess(plan.large_groups[run.group], state, histogram);
}

} // namespace compressed_ddp::cuda
