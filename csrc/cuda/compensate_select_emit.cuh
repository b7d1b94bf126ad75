// Selected candidates, in index order, to the payload; the residual of those whose fate the filter guessed wrong is put right. The
// last blocks write the dense part; the very last one the header.
//
// A block takes one run of tiles, a warp one tile of it. Where the run's entries begin follows from the runs before it, by a
// decoupled look-back (Merrill and Garland 2016): a run publishes its own counts, then adds up what its predecessors published until
// one of them knows its prefix. Runs are taken by ticket, so that every predecessor is running or done. Status and counts share
// one 64-bit word, so relaxed accesses are enough.
#pragma once

#include "compensate_select_refine.cuh"

namespace compressed_ddp::cuda {

struct Counts {
  uint32_t above; // candidates above the threshold
  uint32_t equal; // at it
};

constexpr uint64_t kAggregate = uint64_t{1} << 62; // the counts of this run
constexpr uint64_t kPrefix = uint64_t{2} << 62;    // of this run and all before it in its group
constexpr uint64_t kCountMask = (uint64_t{1} << 31) - 1;

__device__ __forceinline__ uint64_t pack(uint64_t status, Counts counts) { return status | uint64_t{counts.above} << 31 | counts.equal; }
__device__ __forceinline__ Counts counts_of(uint64_t word) {
  return {static_cast<uint32_t>(word >> 31 & kCountMask), static_cast<uint32_t>(word & kCountMask)};
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(p) : "memory");
  return word;
}
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t word) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
}

// By one thread. Returns the counts of all earlier runs of the group.
__device__ inline Counts look_back(uint64_t* words, int run, bool first_of_group, Counts mine) {
  if (first_of_group) {
    store_relaxed(&words[run], pack(kPrefix, mine));
    return {0, 0};
  }
  store_relaxed(&words[run], pack(kAggregate, mine));
  Counts before{0, 0};
  for (int r = run - 1;; --r) {
    uint64_t word;
    while ((word = load_relaxed(&words[r])) == 0) __nanosleep(64);
    const Counts counts = counts_of(word);
    before.above += counts.above;
    before.equal += counts.equal;
    if (word >> 62 == kPrefix >> 62) break;
  }
  store_relaxed(&words[run], pack(kPrefix, {before.above + mine.above, before.equal + mine.equal}));
  return before;
}

// The selected candidates of a tile, by one warp. `before`: of its group, that lie before the tile.
template <typename gradient_t, ValueFormat format>
__device__ __forceinline__ void emit_tile(const DevicePlan& plan, const SelectArguments& a, int t, const GroupState& state,
                                          int64_t entry_offset, Counts before, unsigned long long* significands) {
  const Tile tile = plan.tiles[t];
  const TileSource<gradient_t> source(a, tile);
  const uint32_t tile_state = plan.tile_states[t], threshold = state.threshold, mid = state.mid;
  const auto ties = static_cast<uint32_t>(state.ties);
  const bool deferred = (tile_state & kDeferred) != 0;
  const bool read_all = (tile_state & kReadAll) != 0 || threshold == 0;
  const uint32_t below = (1u << (threadIdx.x % 32)) - 1;
  float sent_sq = 0;
  for_each_candidate(plan, tile, source, tile_state, read_all, [&](bool valid, int i, float value) {
    const uint32_t key = key_of(value);
    const uint32_t above = __ballot_sync(0xffffffffu, valid && key > threshold);
    const uint32_t equal = __ballot_sync(0xffffffffu, valid && key == threshold);
    const uint32_t above_before = before.above + __popc(above & below), equal_before = before.equal + __popc(equal & below);
    const bool selected = valid && (key > threshold || (key == threshold && equal_before < ties));
    if (selected) {
      encode_entry<format>(plan, a, entry_offset + above_before + min(equal_before, ties), tile.offset + i, value);
      if (finite(key)) {
        sent_sq = __fadd_rn(sent_sq, captured_sq(plan, value));
        if constexpr (format == ValueFormat::kSign) add_significand(significands, value);
      }
    }
    if (valid && finite(key) && source.residual != nullptr) {
      const bool taken_out = !read_all && key >= mid; // by the filter
      if (deferred || selected != taken_out) source.residual[i] = selected ? left_behind(plan, value) : value;
    }
    before.above += __popc(above);
    before.equal += __popc(equal);
  });
  for (int step = 16; step > 0; step /= 2) sent_sq = __fadd_rn(sent_sq, __shfl_xor_sync(0xffffffffu, sent_sq, step));
  if (threadIdx.x % 32 == 0) plan.sums[3 * int64_t{t} + 2] = sent_sq;
}

template <typename gradient_t, ValueFormat format>
__device__ void emit_run(const DevicePlan& plan, const SelectArguments& a, int run_index) {
  __shared__ Counts tile_counts[kWarps];
  __shared__ Counts before_run;
  __shared__ unsigned long long significands[format == ValueFormat::kSign ? kExponents : 1];
  static_assert(kExponents == kThreads);
  if constexpr (format == ValueFormat::kSign) significands[threadIdx.x] = 0;
  const Run run = plan.runs[run_index];
  const GroupState& state = plan.states[run.group];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = run.first_tile + warp;
  const bool active = warp < run.num_tiles;

  Counts counts{0, 0};
  if (active) {
    const Tile tile = plan.tiles[t];
    const TileSource<gradient_t> source(a, tile);
    const uint32_t tile_state = plan.tile_states[t], threshold = state.threshold;
    for_each_candidate(plan, tile, source, tile_state, (tile_state & kReadAll) != 0 || threshold == 0, [&](bool valid, int, float value) {
      const uint32_t key = key_of(value);
      counts.above += valid && key > threshold;
      counts.equal += valid && key == threshold;
    });
  }
  counts.above = __reduce_add_sync(0xffffffffu, counts.above);
  counts.equal = __reduce_add_sync(0xffffffffu, counts.equal);
  if (lane == 0) tile_counts[warp] = counts;
  __syncthreads();
  if (threadIdx.x == 0) {
    Counts sum{0, 0};
    for (const Counts& of_tile : tile_counts) sum.above += of_tile.above, sum.equal += of_tile.equal;
    before_run = look_back(plan.look_back, run_index, run.first_of_group != 0, sum);
  }
  __syncthreads();
  if (active) {
    Counts before = before_run;
    for (int w = 0; w < warp; ++w) before.above += tile_counts[w].above, before.equal += tile_counts[w].equal;
    emit_tile<gradient_t, format>(plan, a, t, state, plan.large_groups[run.group].entry_offset, before, significands);
  }
  if constexpr (format == ValueFormat::kSign) {
    __syncthreads();
    if (significands[threadIdx.x] != 0)
      atomicAdd(&plan.significands[int64_t{run.group} * kExponents + threadIdx.x], significands[threadIdx.x]);
  }
}

// Leaves the cleared part of the workspace as it was; the histograms were cleared when they were read.
__device__ inline void clear_states(const DevicePlan& plan) {
#pragma unroll 1 // by one block: few rounds
  for (int g = threadIdx.x; g < plan.num_large_groups; g += kThreads) plan.states[g] = GroupState{};
#pragma unroll 1
  for (int r = threadIdx.x; r < plan.num_runs; r += kThreads) plan.look_back[r] = 0;
  if (threadIdx.x == 0) plan.step->non_finite = plan.step->next_run = 0; // the ticket has wrapped to 0 by itself
}

// Blocks per multiprocessor; their reads are far between, so every block more hides some of the wait. No spills at this bound.
constexpr int kEmitBlocks = 6, kEmitSignBlocks = 5;

template <typename gradient_t, ValueFormat format>
__global__ void __launch_bounds__(kThreads, format == ValueFormat::kSign ? kEmitSignBlocks : kEmitBlocks)
    emit_kernel(DevicePlan plan, SelectArguments a) {
  __shared__ int taken;
  if (threadIdx.x == 0) taken = static_cast<int>(atomicAdd(&plan.step->next_run, 1u));
  __syncthreads();
  if (taken < plan.num_runs)
    emit_run<gradient_t, format>(plan, a, taken);
  else if (taken < plan.num_runs + plan.num_dense_tiles)
    encode_dense<gradient_t>(plan, a, taken - plan.num_runs);
  if (!last_block(&plan.step->finished, gridDim.x)) return;
  encode_header<format>(plan, a);
  clear_states(plan);
}

} // namespace compressed_ddp::cuda
