// encode on the device: the bytes of a payload (wire_format.h), written by whoever has just selected an entry.
#pragma once

#include "histogram.cuh"
#include "tile.cuh"

namespace compressed_ddp::cuda {

// Entry `position` of the payload.
__device__ __forceinline__ void encode_entry(const DevicePlan& plan, const SelectArguments& a, int64_t position, int64_t index,
                                             float value) {
  auto* words = reinterpret_cast<uint32_t*>(a.payload + sizeof(PayloadHeader));
  words[position] = static_cast<uint32_t>(index);
  words[plan.selected_numel + position] = __float_as_uint(canonical(value));
}

// One tile of a dense segment, by one block.
template <typename gradient_t>
__device__ void encode_dense(const DevicePlan& plan, const SelectArguments& a, int index) {
  const Tile tile = plan.dense_tiles[index];
  const bool unused = a.unused != nullptr && a.unused[tile.segment] != 0;
  const auto* gradient = static_cast<const gradient_t*>(a.gradient) + tile.offset;
  auto* dense = reinterpret_cast<float*>(a.payload + sizeof(PayloadHeader)) + 2 * plan.selected_numel + tile.slot;
  float gradient_sq = 0;
  bool odd = false;
  for (int i = threadIdx.x; i < tile.numel; i += kThreads) {
    const float value = unused ? 0.0f : canonical(load_one(gradient + i));
    dense[i] = value;
    odd |= !finite(key_of(value));
    gradient_sq = __fadd_rn(gradient_sq, __fmul_rn(value, value));
  }
  odd = __syncthreads_or(odd);
  gradient_sq = block_sums<float, 1>({gradient_sq}).of[0];
  if (threadIdx.x == 0) {
    if (odd) atomicOr(&plan.step->non_finite, 1u);
    float* sums = plan.sums + 3 * int64_t{plan.num_tiles + plan.num_small_groups + index};
    sums[0] = gradient_sq, sums[1] = 0, sums[2] = 0;
  }
}

// Header, padding and statistics, by the last block of the last kernel.
__device__ inline void encode_header(const DevicePlan& plan, const SelectArguments& a) {
  const int64_t num_sums = int64_t{plan.num_tiles} + plan.num_small_groups + plan.num_dense_tiles;
  Sums<double, 3> sums{};
  for (int64_t i = threadIdx.x; i < num_sums; i += kThreads)
    for (int s = 0; s < 3; ++s) sums.of[s] += static_cast<double>(plan.sums[3 * i + s]);
  sums = block_sums(sums);
  const int64_t used_bytes = sizeof(PayloadHeader) + 8 * plan.selected_numel + 4 * plan.dense_numel;
  for (int64_t byte = used_bytes + threadIdx.x; byte < a.header.payload_bytes; byte += kThreads) a.payload[byte] = 0;
  if (threadIdx.x != 0) return;
  PayloadHeader header = a.header;
  if (plan.step->non_finite != 0) header.flags |= kFlagNonFinite;
  *reinterpret_cast<PayloadHeader*>(a.payload) = header;
  *a.statistics = {sums.of[0], sums.of[1], sums.of[2]};
  if (a.sent != nullptr) *a.sent = 1;
}

} // namespace compressed_ddp::cuda
