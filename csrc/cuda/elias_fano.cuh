// The indices of a payload on the device (wire_format.h): Elias-Fano code with a directory.
//
// Bit x of the high bits that is set belongs to entry e = ones before x, whose index is (x - e) << 8 | low[e].
#pragma once

#include "plan.h"

namespace compressed_ddp::cuda {

// One payload in device memory.
struct PayloadView {
  const uint32_t* directory;
  const uint32_t* high; // half words of the wire's 64-bit words
  const float* scales;
  const float* dense;
  const uint8_t* values;
  const uint8_t* low;
};

__device__ __forceinline__ PayloadView payload_view(const DevicePlan& plan, const uint8_t* payload) {
  return {reinterpret_cast<const uint32_t*>(payload + plan.sections.directory),
          reinterpret_cast<const uint32_t*>(payload + plan.sections.high),
          reinterpret_cast<const float*>(payload + plan.sections.scales),
          reinterpret_cast<const float*>(payload + plan.sections.dense),
          payload + plan.sections.values,
          payload + plan.sections.low};
}

// ---- values

__device__ __forceinline__ uint16_t wire_bfloat16_bits(float value) { // float_types.h: wire_bfloat16
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  if (magnitude < kInfinityKey && (rounded & 0x7fffu) == 0x7f80u) --rounded;
  return static_cast<uint16_t>(magnitude > kInfinityKey ? kCanonicalNanBits >> 16 : rounded);
}
__device__ __forceinline__ float bfloat16_value(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// Groups [begin, end): what an entry's group is looked for in.
struct GroupSearch {
  int begin, end;
};

// The last group of `search` whose first entry is at most `entry`.
__device__ __forceinline__ int group_of(const DevicePlan& plan, int64_t entry, GroupSearch search) {
  while (search.end - search.begin > 1) {
    const int middle = (search.begin + search.end) / 2;
    (plan.group_ranges[middle].entry_offset <= entry ? search.begin : search.end) = middle;
  }
  return search.begin;
}

template <ValueFormat format>
__device__ __forceinline__ float decoded_value(const DevicePlan& plan, const PayloadView& payload, int64_t entry, GroupSearch search) {
  if constexpr (format == ValueFormat::kFloat32) {
    return reinterpret_cast<const float*>(payload.values)[entry];
  } else if constexpr (format == ValueFormat::kBFloat16) {
    return bfloat16_value(reinterpret_cast<const uint16_t*>(payload.values)[entry]);
  } else {
    const uint32_t negative = reinterpret_cast<const uint32_t*>(payload.values)[entry / 32] >> (entry % 32) & 1u;
    return __uint_as_float(__float_as_uint(payload.scales[group_of(plan, entry, search)]) ^ negative << 31);
  }
}

// ---- places

// The n-th zero of a word (n >= 1, and there are so many): its position.
__device__ __forceinline__ int nth_zero(uint32_t word, int n) {
  int position = 0;
  for (int width = 16; width > 0; width /= 2) {
    const int zeros = width - __popc(word >> position & ((1u << width) - 1));
    if (zeros < n) n -= zeros, position += width;
  }
  return position;
}

// Goes on from bit `bit`, which has `high` zeros before it, to behind the zero that makes them `wanted`: the place where entries with
// index >> 8 >= wanted begin. By one thread. Behind the last word every bit counts as a zero. `high < wanted`.
__device__ inline int64_t skip_to_high(const DevicePlan& plan, const PayloadView& payload, int64_t bit, int64_t high, int64_t wanted) {
  for (;;) {
    const int64_t word_index = bit / 32;
    if (word_index >= 2 * plan.high_words) return bit + (wanted - high);
    const int skipped = static_cast<int>(bit % 32);
    const uint32_t word = payload.high[word_index] | ((1u << skipped) - 1); // what lies before counts as ones
    const int zeros = 32 - __popc(word);
    if (high + zeros >= wanted) return word_index * 32 + nth_zero(word, static_cast<int>(wanted - high)) + 1;
    high += zeros;
    bit = (word_index + 1) * 32;
  }
}

// Where entries with index >> 8 >= wanted begin, by the directory and a short walk. By one thread; of any bytes, a number >= wanted.
__device__ inline int64_t find_high(const DevicePlan& plan, const PayloadView& payload, int64_t wanted) {
  if (wanted == 0) return 0;
  int64_t begin = 0, count = plan.sections.directory_numel; // the last entry of the directory below `wanted`
  while (count > 0) {
    const int64_t half = count / 2;
    if (payload.directory[begin + half] < wanted) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  if (begin == 0) return wanted; // no entry lies before
  const int64_t high = payload.directory[begin - 1];
  return skip_to_high(plan, payload, high + (begin - 1) * kDirectoryStride, high, wanted);
}

// The index of one entry, by one thread; of any bytes some number, -1 when the bits end before it.
__device__ inline int64_t index_of(const DevicePlan& plan, const PayloadView& payload, int64_t entry) {
  const int64_t stride = entry / kDirectoryStride;
  int64_t bit = int64_t{payload.directory[stride]} + stride * kDirectoryStride;
  auto ones = static_cast<int>(entry % kDirectoryStride); // to pass
  for (int64_t word_index = bit / 32; word_index < 2 * plan.high_words; ++word_index) {
    const uint32_t word = payload.high[word_index] & ~0u << (bit % 32);
    const int here = __popc(word);
    if (ones < here) return (word_index * 32 + nth_zero(~word, ones + 1) - entry) << kLowBits | payload.low[entry];
    ones -= here;
    bit = 0;
  }
  return -1;
}

// ---- a block reads entries

// Calls function(entry, index) for the entries of one directory stride of a payload that this process wrote; by all threads of a block.
template <typename Function>
__device__ __forceinline__ void for_each_entry(const DevicePlan& plan, const PayloadView& payload, int64_t stride, Function&& function) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t entry = stride * kDirectoryStride;
  const int64_t end = min(entry + kDirectoryStride, plan.selected_numel);
  const int64_t first_bit = int64_t{payload.directory[stride]} + entry;
  for (int64_t word_index = first_bit / 32; entry < end && word_index < 2 * plan.high_words; word_index += kWarps) {
    uint32_t word = 0;
    if (lane < kWarps && word_index + lane < 2 * plan.high_words) word = payload.high[word_index + lane];
    if (word_index == first_bit / 32 && lane == 0) word &= ~0u << (first_bit % 32);
    const int count = __popc(word);
    const int before = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(lane < warp ? count : 0)));
    const int total = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(count)));
    const uint32_t mine = __shfl_sync(0xffffffffu, word, warp);
    const int64_t here = entry + before + __popc(mine & ((1u << lane) - 1));
    if ((mine >> lane & 1u) != 0 && here < end) function(here, ((word_index + warp) * 32 + lane - here) << kLowBits | payload.low[here]);
    entry += total;
  }
}

} // namespace compressed_ddp::cuda
