// A group that fits one tile: one block holds it in registers, finds the exact k-th key digit by digit and writes everything once.
#pragma once

#include "encode.cuh"
#include "histogram.cuh"
#include "tile.cuh"

namespace compressed_ddp::cuda {

struct Threshold {
  uint32_t key;  // of the k-th entry
  uint32_t ties; // entries with that key to take
};

// Exact, from keys in registers: 11, 10 and 10 bits, from the top. Zeros count like any key.
__device__ inline Threshold block_threshold(const uint32_t (&keys)[kRows][4], uint32_t valid, uint32_t k) {
  __shared__ uint32_t counts[kHistogramBins];
  uint32_t prefix = 0, rank = k - 1;
  for (int shift = 20; shift >= 0; shift -= 10) { // of the digit; the first has 11 bits, and nothing above it
    const int bins = shift == 20 ? 2048 : 1024;
    for (int b = threadIdx.x; b < bins; b += kThreads) counts[b] = 0;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t digits = keys[r][j] >> shift;
        if ((valid >> (4 * r + j) & 1u) != 0 && (shift == 20 || digits >> 10 == prefix)) atomicAdd(&counts[digits & (bins - 1u)], 1u);
      }
    __syncthreads();
    const int64_t ranks[1] = {rank};
    RankInHistogram found[1];
    find_ranks(counts, bins, ranks, false, found);
    prefix = prefix << 10 | found[0].bin;
    rank = found[0].rank;
  }
  return {prefix, rank + 1};
}

template <typename gradient_t>
__device__ void select_small(const DevicePlan& plan, const SelectArguments& a, int index) {
  __shared__ BlockOrder order;
  __shared__ unsigned long long significands[kExponents];
  const bool with_scale = plan.value_format == ValueFormat::kSign;
  if (with_scale) significands[threadIdx.x] = 0; // block_threshold's barriers follow
  const SmallGroup group = plan.small_groups[index];
  const TileSource<gradient_t> source(a, group.offset, 0, group.segment, group.numel);
  float acc[kRows][4], gradient_sq = 0, acc_sq = 0, sent_sq = 0;
  uint32_t keys[kRows][4], valid = 0;
  bool odd = false;
  source.load_tile(false, acc, gradient_sq);
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) {
      keys[r][j] = key_of(acc[r][j]);
      valid |= static_cast<uint32_t>(r * kRowNumel + 4 * static_cast<int>(threadIdx.x) + j < group.numel) << (4 * r + j);
      odd |= !finite(keys[r][j]);
      if (finite(keys[r][j])) acc_sq = __fadd_rn(acc_sq, __fmul_rn(acc[r][j], acc[r][j]));
    }
  }
  const Threshold threshold = block_threshold(keys, valid, static_cast<uint32_t>(group.k));
  uint32_t above = 0, equal = 0;
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 4; ++j) {
      const uint32_t bit = valid & 1u << (4 * r + j);
      if (keys[r][j] > threshold.key) above |= bit;
      if (keys[r][j] == threshold.key) equal |= bit;
    }
  order_block(above, equal, order);
#pragma unroll // so that acc and keys stay in registers
  for (int r = 0; r < kRows; ++r) {
    const uint32_t before_warp = order.before[r][threadIdx.x / 32];
    uint32_t before_above = (before_warp & 0xffffu) + before_thread(above, r);
    uint32_t before_equal = (before_warp >> 16) + before_thread(equal, r);
    float kept[4];
    bool any_odd = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t bit = 1u << (4 * r + j);
      const bool selected = (above & bit) != 0 || ((equal & bit) != 0 && before_equal < threshold.ties);
      kept[j] = selected ? left_behind(plan, acc[r][j]) : acc[r][j];
      any_odd |= !finite(keys[r][j]);
      if (selected) {
        const int64_t index_in_bucket = group.offset + r * kRowNumel + 4 * static_cast<int>(threadIdx.x) + j;
        encode_entry_of_any_format(plan, a, group.entry_offset + before_above + min(before_equal, threshold.ties), index_in_bucket,
                                   acc[r][j]);
        if (finite(keys[r][j])) {
          sent_sq = __fadd_rn(sent_sq, captured_sq(plan, acc[r][j]));
          if (with_scale) add_significand(significands, acc[r][j]);
        }
      }
      before_above += (above & bit) != 0;
      before_equal += (equal & bit) != 0;
    }
    if (!any_odd) {
      source.store_row(r, kept);
    } else if (source.residual != nullptr) {
      for (int j = 0; j < 4; ++j)
        if (finite(keys[r][j]) && (valid >> (4 * r + j) & 1u) != 0)
          source.residual[r * kRowNumel + 4 * static_cast<int>(threadIdx.x) + j] = kept[j];
    }
  }
  odd = __syncthreads_or(odd);
  const Sums<float, 3> squares = block_sums<float, 3>({gradient_sq, acc_sq, sent_sq});
  if (with_scale && threadIdx.x < 32) {
    const float scale = sign_scale(significands, plan.group_ranges[group.group].inverse_k);
    if (threadIdx.x == 0) reinterpret_cast<float*>(a.payload + plan.sections.scales)[group.group] = scale;
  }
  if (threadIdx.x == 0) {
    if (odd) atomicOr(&plan.step->non_finite, 1u);
    float* sums = plan.sums + 3 * int64_t{plan.num_tiles + index};
    for (int s = 0; s < 3; ++s) sums[s] = squares.of[s];
  }
}

// Where no histogram pass is launched that could take these blocks along.
template <typename gradient_t>
__global__ void __launch_bounds__(kThreads) small_kernel(DevicePlan plan, SelectArguments a) {
  select_small<gradient_t>(plan, a, static_cast<int>(blockIdx.x));
}

} // namespace compressed_ddp::cuda
