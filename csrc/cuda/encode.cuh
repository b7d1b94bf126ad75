// encode on the device: the bytes of a payload (wire_format.h), written by whoever has just selected an entry.
#pragma once

#include "elias_fano.cuh"
#include "histogram.cuh"
#include "tile.cuh"

namespace compressed_ddp::cuda {

// ---- entries

// The bits of a payload that entries are or-ed into: zero before the first entry. By one block of a kernel that runs before.
__device__ inline void clear_bits(const DevicePlan& plan, const SelectArguments& a) {
  auto* high = reinterpret_cast<uint64_t*>(a.payload + plan.sections.high);
#pragma unroll 1
  for (int64_t w = threadIdx.x; w < plan.high_words; w += kThreads) high[w] = 0;
  if (plan.value_format != ValueFormat::kSign) return;
  auto* signs = reinterpret_cast<uint32_t*>(a.payload + plan.sections.values);
#pragma unroll 1
  for (int64_t w = threadIdx.x; w < (plan.selected_numel + 31) / 32; w += kThreads) signs[w] = 0;
}

__device__ __forceinline__ void or_relaxed(uint32_t* word, uint32_t bits) {
  asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(word), "r"(bits) : "memory");
}

// Entry `position` of the payload.
template <ValueFormat format>
__device__ __forceinline__ void encode_entry(const DevicePlan& plan, const SelectArguments& a, int64_t position, int64_t index,
                                             float value) {
  const auto high = static_cast<uint32_t>(index >> kLowBits);
  a.payload[plan.sections.low + position] = static_cast<uint8_t>(index);
  const int64_t bit = high + position;
  or_relaxed(reinterpret_cast<uint32_t*>(a.payload + plan.sections.high) + bit / 32, 1u << (bit % 32));
  if (position % kDirectoryStride == 0)
    reinterpret_cast<uint32_t*>(a.payload + plan.sections.directory)[position / kDirectoryStride] = high;
  uint8_t* values = a.payload + plan.sections.values;
  if constexpr (format == ValueFormat::kFloat32) {
    reinterpret_cast<float*>(values)[position] = canonical(value);
  } else if constexpr (format == ValueFormat::kBFloat16) {
    reinterpret_cast<uint16_t*>(values)[position] = wire_bfloat16_bits(value);
  } else {
    if (__float_as_uint(canonical(value)) >> 31 != 0)
      or_relaxed(reinterpret_cast<uint32_t*>(values) + position / 32, 1u << (position % 32));
  }
}

__device__ __forceinline__ void encode_entry_of_any_format(const DevicePlan& plan, const SelectArguments& a, int64_t position,
                                                           int64_t index, float value) {
  switch (plan.value_format) {
    case ValueFormat::kFloat32:
      return encode_entry<ValueFormat::kFloat32>(plan, a, position, index, value);
    case ValueFormat::kBFloat16:
      return encode_entry<ValueFormat::kBFloat16>(plan, a, position, index, value);
    default:
      return encode_entry<ValueFormat::kSign>(plan, a, position, index, value);
  }
}

// What a finite entry that is sent leaves in the residual; no branch, since the filter does it to every entry.
__device__ __forceinline__ float left_behind(const DevicePlan& plan, float value) {
  const uint32_t bits = __float_as_uint(value);
  uint32_t rounded = (bits + plan.rounding.half + (bits >> 16 & plan.rounding.tie)) & plan.rounding.mask;
  if ((rounded & 0x7fffffffu) == kInfinityKey) rounded -= 0x10000u; // never from finite to Inf
  return __fsub_rn(value, __uint_as_float(rounded));
}

// What sending it takes out of |residual|^2; sign values are counted by encode_scales.
__device__ __forceinline__ float captured_sq(const DevicePlan& plan, float value) {
  const float left = left_behind(plan, value);
  return __fsub_rn(__fmul_rn(value, value), __fmul_rn(left, left));
}

// ---- scales of value format sign (cpu/value_format.h: sign_scale, whose order of additions this is)

__device__ __forceinline__ void add_significand(unsigned long long* sums, float value) {
  const uint32_t bits = __float_as_uint(value), exponent = bits >> 23 & 0xffu;
  atomicAdd(&sums[exponent], static_cast<unsigned long long>((bits & 0x7fffffu) | (exponent != 0 ? 1u << 23 : 0u)));
}

// By one warp; the same in all lanes.
__device__ inline float sign_scale(const unsigned long long* sums, double inverse_k) {
  constexpr int kPerLane = kExponents / 32;
  const int lane = threadIdx.x % 32;
  double partial = 0;
  for (int e = lane * kPerLane; e < (lane + 1) * kPerLane; ++e) {
    const double weight = __longlong_as_double(static_cast<long long>(max(e, 1) - 150 + 1023) << 52);
    partial = __dadd_rn(partial, __dmul_rn(static_cast<double>(sums[e]), weight));
  }
  for (int distance = 1; distance < 32; distance *= 2) partial = __dadd_rn(partial, __shfl_xor_sync(0xffffffffu, partial, distance));
  return static_cast<float>(__dmul_rn(partial, inverse_k));
}

// By the last block of the last kernel of the selection. Leaves the sums zero. Returns what the scales take out of |residual|^2, one
// part per thread.
__device__ inline double encode_scales(const DevicePlan& plan, const SelectArguments& a) {
  auto* scales = reinterpret_cast<float*>(a.payload + plan.sections.scales);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int g = warp; g < plan.num_large_groups; g += kWarps) {
    unsigned long long* sums = plan.significands + int64_t{g} * kExponents;
    const int group = plan.large_groups[g].group;
    const float scale = sign_scale(sums, plan.group_ranges[group].inverse_k);
    if (lane == 0) scales[group] = scale;
    __syncwarp();
    for (int e = lane; e < kExponents; e += 32) sums[e] = 0;
  }
  __syncthreads();
  const bool nothing = plan.step->non_finite != 0; // every rank's bucket becomes NaN: nothing shall leave the residual
  double captured = 0;
  for (int g = threadIdx.x; g < plan.num_groups; g += kThreads) {
    if (nothing) scales[g] = 0;
    const double scale = scales[g];
    captured = __dadd_rn(captured, __dmul_rn(__dmul_rn(scale, scale), static_cast<double>(plan.group_ranges[g].k)));
  }
  return captured;
}

// One tile of a dense segment, by one block.
template <typename gradient_t>
__device__ void encode_dense(const DevicePlan& plan, const SelectArguments& a, int index) {
  const Tile tile = plan.dense_tiles[index];
  const bool unused = a.unused != nullptr && a.unused[tile.segment] != 0;
  const auto* gradient = static_cast<const gradient_t*>(a.gradient) + tile.offset;
  auto* dense = reinterpret_cast<float*>(a.payload + plan.sections.dense) + tile.slot;
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
template <ValueFormat format>
__device__ void encode_header(const DevicePlan& plan, const SelectArguments& a) {
  const int64_t num_sums = int64_t{plan.num_tiles} + plan.num_small_groups + plan.num_dense_tiles;
  Sums<double, 3> sums{};
#pragma unroll 1 // by one block, and the registers of several sums would be all blocks'
  for (int64_t i = threadIdx.x; i < num_sums; i += kThreads)
    for (int s = 0; s < 3; ++s) sums.of[s] += static_cast<double>(plan.sums[3 * i + s]);
  if constexpr (format == ValueFormat::kSign) sums.of[2] = encode_scales(plan, a);
  sums = block_sums(sums);
  if (plan.sections.used_bytes + threadIdx.x < plan.sections.payload_bytes) a.payload[plan.sections.used_bytes + threadIdx.x] = 0;
  if (threadIdx.x != 0) return;
  PayloadHeader header = a.header;
  if (plan.step->non_finite != 0) header.flags |= kFlagNonFinite;
  *reinterpret_cast<PayloadHeader*>(a.payload) = header;
  *a.statistics = {sums.of[0], sums.of[1], sums.of[2]};
  if (a.sent != nullptr) *a.sent = 1;
}

} // namespace compressed_ddp::cuda
