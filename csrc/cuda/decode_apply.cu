#include "decode_apply.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bad_rank.cuh"
#include "elias_fano.cuh"
#include "launch.h"

namespace compressed_ddp::cuda {
namespace {

constexpr int kDecodeTileNumel = 8192; // 32 KiB of sums: six blocks per multiprocessor of sm_90, and few searches per entry
constexpr int kTileHighs = kDecodeTileNumel >> kLowBits;
static_assert(kTileHighs << kLowBits == kDecodeTileNumel, "a tile begins where a value of index >> 8 begins");
constexpr int kRanksAtOnce = kThreads;

__device__ __forceinline__ uint32_t key_of(float value) { return __float_as_uint(value) & 0x7fffffffu; }

__device__ __forceinline__ float round_to(float value, float*) { return value; }
__device__ __forceinline__ uint16_t round_to(float value, Float16*) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ uint16_t round_to(float value, BFloat16*) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// ---- one payload

__device__ __forceinline__ PayloadView payload_of(const DevicePlan& plan, const DecodeArguments& a, int rank) {
  return payload_view(plan, a.gathered + rank * plan.sections.payload_bytes);
}

__device__ __forceinline__ void report(const DecodeArguments& a, int payload) {
  report_bad_rank(a.status, a.expected.rank + static_cast<uint32_t>(payload) * a.rank_stride);
}

// ---- checks that are not part of any tile: headers, that directories ascend, and that every group's entries lie in the group

// Block `block` looks at kThreads groups of one rank.
__device__ void check_payload(const DevicePlan& plan, const DecodeArguments& a, int block) {
  const int rank = block % a.count, g = block / a.count * kThreads + static_cast<int>(threadIdx.x);
  const PayloadView payload = payload_of(plan, a, rank);
  bool right = true;
  if (block < a.count && threadIdx.x == 0) {
    const PayloadHeader header = load_header(a.gathered + rank * plan.sections.payload_bytes);
    right = header_is_right(header, a.expected, static_cast<uint32_t>(rank) * a.rank_stride);
    if ((header.flags & kFlagNonFinite) != 0) atomicOr(&a.status->step_is_bad, 1u);
  }
  if (g < plan.num_groups) {
    const GroupRange range = plan.group_ranges[g];
    const int64_t first = index_of(plan, payload, range.entry_offset), last = index_of(plan, payload, range.entry_offset + range.k - 1);
    right = right && first >= range.first_index && last >= first && last <= range.last_index;
  }
  if (block < a.count) // otherwise a tile's search might not land where the count of the tile before it ended
    for (int64_t d = threadIdx.x; d + 1 < plan.sections.directory_numel; d += kThreads)
      right = right && payload.directory[d] <= payload.directory[d + 1];
  if (!right) report(a, rank);
}
__host__ __device__ inline int num_check_blocks(int num_groups, int world_size) {
  return world_size * (num_groups > kThreads ? (num_groups + kThreads - 1) / kThreads : 1);
}

// ---- a tile

// Bits [begin, end) of one rank's high bits are its entries of a tile. Found by search in bytes that nobody has checked; what makes sure of
// the whole payload is that every tile checks its part: that its entries ascend, that the directory says the same of every 256th, and
// that the directory's next one lies behind the tile, so that the count goes on where the next tile begins to count.
struct TileBits {
  int64_t begin, end;
};

__device__ inline TileBits bits_of_tile(const DevicePlan& plan, const PayloadView& payload, int64_t first_high, bool& right) {
  const int64_t begin = find_high(plan, payload, first_high);
  const int64_t end = skip_to_high(plan, payload, begin, first_high, first_high + kTileHighs);
  const int64_t first_entry = begin - first_high, end_entry = end - first_high - kTileHighs;
  const int64_t next = (end_entry + kDirectoryStride - 1) / kDirectoryStride;
  const bool last_tile = (first_high + kTileHighs) << kLowBits >= plan.numel;
  right = first_entry <= plan.selected_numel && end_entry <= plan.selected_numel && (!last_tile || end_entry == plan.selected_numel) &&
          (next >= plan.sections.directory_numel || payload.directory[next] >= first_high + kTileHighs);
  return {begin, end};
}

// Adds these entries to the tile; by all threads, a thread per bit, with at least one barrier, which orders the ranks. Nothing is added
// before all of a round is known to be right: two threads never meet in one sum.
template <ValueFormat format>
__device__ bool add_entries(const DevicePlan& plan, const PayloadView& payload, TileBits bits, GroupSearch groups, int64_t first_high,
                            int tile_numel, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t entry = bits.begin - first_high; // of the first bit of a round
  uint32_t last_word = 0;                  // of the round before: its last bit may be the entry before ours
  for (int64_t word_index = bits.begin / 32;; word_index += kWarps) {
    const bool is_last = (word_index + kWarps) * 32 >= bits.end;
    uint32_t word = 0;
    const bool has_bits = (word_index + warp) * 32 < bits.end;
    if ((lane <= warp && has_bits) || (lane < kWarps && !is_last)) { // what lies before, to count it; all, if another round follows
      const int64_t first_bit = (word_index + lane) * 32;
      if (first_bit < bits.end && word_index + lane < 2 * plan.high_words) word = payload.high[word_index + lane];
      if (first_bit < bits.begin) word &= ~0u << (bits.begin - first_bit);
      if (first_bit < bits.end && bits.end - first_bit < 32) word &= (1u << (bits.end - first_bit)) - 1;
    }
    const int count = __popc(word);
    const int before = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(lane < warp ? count : 0)));
    const uint32_t mine = __shfl_sync(0xffffffffu, word, warp);
    const uint32_t left = __shfl_sync(0xffffffffu, word, (warp + 31) % 32); // the word to the left, but for the first warp
    const int64_t here = entry + before + __popc(mine & ((1u << lane) - 1));
    const bool valid = (mine >> lane & 1u) != 0 && here < plan.selected_numel;
    const int64_t high = (word_index + warp) * 32 + lane - here;
    const int low = valid ? payload.low[here] : 0;
    const float value = valid ? decoded_value<format>(plan, payload, here, groups) : 0.0f;
    int low_before = __shfl_up_sync(0xffffffffu, low, 1);
    const uint32_t bit_before = lane > 0 ? mine >> (lane - 1) & 1u : (warp > 0 ? left : last_word) >> 31;
    if (valid && lane == 0 && bit_before != 0) low_before = payload.low[here - 1];
    const auto index = static_cast<int>((high - first_high) << kLowBits) + low; // in the tile
    const bool wrong = ((mine >> lane & 1u) != 0 && !valid) || (valid && (index >= tile_numel || (bit_before != 0 && low <= low_before))) ||
                       (valid && here % kDirectoryStride == 0 && payload.directory[here / kDirectoryStride] != high);
    if (__syncthreads_or(wrong)) return false; // the result is NaN anyway
    if (valid) sums[index] = __fadd_rn(sums[index], value);
    if (is_last) return true;
    last_word = __shfl_sync(0xffffffffu, word, kWarps - 1);
    entry += static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(count)));
  }
}

__device__ void add_dense(const DevicePlan& plan, const PayloadView& payload, int first_tile, int64_t tile_begin, int64_t tile_end,
                          float* sums) {
  for (int t = first_tile; t < plan.num_dense_tiles && plan.dense_tiles[t].offset < tile_end; ++t) {
    const Tile dense = plan.dense_tiles[t];
    const int64_t from = max(int64_t{dense.offset}, tile_begin), to = min(int64_t{dense.offset} + dense.numel, tile_end);
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads)
      sums[i - tile_begin] = __fadd_rn(sums[i - tile_begin], payload.dense[dense.slot + (i - dense.offset)]);
  }
}

// The first dense tile that ends behind `index`.
__device__ inline int first_dense_tile(const DevicePlan& plan, int64_t index) {
  int begin = 0, count = plan.num_dense_tiles;
  while (count > 0) {
    const int half = count / 2;
    const Tile& tile = plan.dense_tiles[begin + half];
    if (tile.offset + tile.numel <= index) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

// The groups whose span meets the tile.
__device__ inline GroupSearch groups_of_tile(const DevicePlan& plan, int64_t tile_begin, int64_t tile_end) {
  GroupSearch groups{0, plan.num_groups};
  if (plan.value_format != ValueFormat::kSign) return groups; // nobody asks
  for (int count = plan.num_groups; count > 0;) {             // the first that ends in the tile or behind
    const int half = count / 2;
    if (plan.group_ranges[groups.begin + half].last_index < tile_begin) {
      groups.begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  groups.end = groups.begin;
  while (groups.end < plan.num_groups && plan.group_ranges[groups.end].first_index < tile_end) ++groups.end;
  groups.begin = min(groups.begin, plan.num_groups - 1); // none: an entry here is somebody's mistake, and its scale does not matter
  return groups;
}

template <typename gradient_t>
__device__ bool scale_and_store(const DecodeArguments& a, const float* sums, int64_t tile_begin, int numel) {
  using stored_t = decltype(round_to(0.0f, static_cast<gradient_t*>(nullptr)));
  const float scale = __fdiv_rn(1.0f, static_cast<float>(a.count));
  auto* out = static_cast<stored_t*>(a.bucket) + tile_begin;
  bool is_finite = true;
  const auto one = [&](int i) {
    const auto result = round_to(__fmul_rn(sums[i], scale), static_cast<gradient_t*>(nullptr));
    if constexpr (sizeof(stored_t) == 4)
      is_finite = is_finite && key_of(result) < kInfinityKey;
    else
      is_finite = is_finite && (result & 0x7fffu) < (std::is_same_v<gradient_t, Float16> ? 0x7c00u : 0x7f80u);
    return result;
  };
  int i = 4 * static_cast<int>(threadIdx.x);
  if (reinterpret_cast<uintptr_t>(out) % (4 * sizeof(stored_t)) == 0) {
    for (; i + 4 <= numel; i += 4 * kThreads) {
      const stored_t four[4] = {one(i), one(i + 1), one(i + 2), one(i + 3)};
      if constexpr (sizeof(stored_t) == 4)
        __stwb(reinterpret_cast<float4*>(out + i), make_float4(four[0], four[1], four[2], four[3])); // an assignment is taken apart
      else
        __stwb(reinterpret_cast<ushort4*>(out + i), make_ushort4(four[0], four[1], four[2], four[3]));
    }
    for (; i < numel; ++i) out[i] = one(i); // at most three, of one thread
  } else {
    for (i = threadIdx.x; i < numel; i += kThreads) out[i] = one(i);
  }
  return is_finite;
}

template <typename gradient_t, ValueFormat format>
__global__ void __launch_bounds__(kThreads) decode_apply_kernel(DevicePlan plan, DecodeArguments a, int num_check_blocks) {
  __shared__ float sums[kDecodeTileNumel];
  __shared__ TileBits bits[kRanksAtOnce];
  __shared__ bool is_right[kRanksAtOnce];
  __shared__ int first_dense;
  __shared__ GroupSearch groups;
  if (blockIdx.x < num_check_blocks) {
    check_payload(plan, a, static_cast<int>(blockIdx.x));
    return;
  }
  const int64_t tile = static_cast<int64_t>(blockIdx.x) - num_check_blocks;
  const int64_t tile_begin = tile * kDecodeTileNumel, first_high = tile * kTileHighs;
  const int64_t tile_end = min(tile_begin + kDecodeTileNumel, plan.numel);
  const auto numel = static_cast<int>(tile_end - tile_begin);
  for (int i = threadIdx.x; i < kDecodeTileNumel; i += kThreads) sums[i] = 0;
  if (threadIdx.x == 0) first_dense = first_dense_tile(plan, tile_begin);
  if (threadIdx.x == 32) groups = groups_of_tile(plan, tile_begin, tile_end);
  for (int first = 0; first < a.count; first += kRanksAtOnce) {
    const int count = min(kRanksAtOnce, a.count - first);
    if (first > 0) __syncthreads(); // the places of the ranks before are no longer needed
    if (threadIdx.x < count && plan.selected_numel > 0) {
      bool right = true;
      bits[threadIdx.x] = bits_of_tile(plan, payload_of(plan, a, first + static_cast<int>(threadIdx.x)), first_high, right);
      is_right[threadIdx.x] = right;
    }
    __syncthreads();
    const bool any_dense = first_dense < plan.num_dense_tiles && plan.dense_tiles[first_dense].offset < tile_end;
    for (int r = 0; r < count; ++r) { // rank order
      const PayloadView payload = payload_of(plan, a, first + r);
      if (plan.selected_numel > 0) {
        const bool right = is_right[r] && add_entries<format>(plan, payload, bits[r], groups, first_high, numel, sums);
        if (!right && threadIdx.x == 0) report(a, first + r);
      }
      if (!any_dense) continue;
      __syncthreads(); // an entry may lie in a dense segment, if somebody wants to do harm
      add_dense(plan, payload, first_dense, tile_begin, tile_end, sums);
    }
  }
  __syncthreads();
  if (!scale_and_store<gradient_t>(a, sums, tile_begin, numel)) atomicOr(&a.status->step_is_bad, 1u);
}

// NaN everywhere if some rank's payload is bad or flagged: that it is bad is known only when all of the first kernel is done.
template <typename gradient_t>
__global__ void __launch_bounds__(kThreads) nan_if_flagged_kernel(NanIfFlaggedArguments a) {
  bool flagged = false;
  for (int p = threadIdx.x; p < a.count; p += kThreads) flagged |= (load_header(a.payloads + p * a.stride).flags & kFlagNonFinite) != 0;
  if (!__syncthreads_or(flagged) && a.status->bad_rank == 0) return;
  // An earlier bucket's bad rank makes this one NaN as well: its step is as bad, whatever became of the flag since.
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicOr(&a.status->step_is_bad, 1u);
  using stored_t = decltype(round_to(0.0f, static_cast<gradient_t*>(nullptr)));
  const stored_t nan = [] {
    if constexpr (std::is_same_v<gradient_t, float>)
      return __uint_as_float(kCanonicalNanBits);
    else
      return static_cast<uint16_t>(std::is_same_v<gradient_t, Float16> ? 0x7e00 : 0x7fc0);
  }();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.numel; i += int64_t{gridDim.x} * kThreads)
    static_cast<stored_t*>(a.bucket)[i] = nan;
}

template <typename gradient_t>
void load(ValueFormat value_format) {
  cudaFuncAttributes attributes;
  with_value_format(value_format, [&](auto format) {
    check(cudaFuncGetAttributes(&attributes, decode_apply_kernel<gradient_t, format.value>), "loading decode_apply");
  });
  check(cudaFuncGetAttributes(&attributes, nan_if_flagged_kernel<gradient_t>), "loading nan_if_flagged");
}

template <typename gradient_t>
void enqueue(const DevicePlan& plan, const DecodeArguments& a, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((plan.numel + kDecodeTileNumel - 1) / kDecodeTileNumel);
  const int checks = num_check_blocks(plan.num_groups, a.count);
  const unsigned blocks = tiles + static_cast<unsigned>(checks);
  with_value_format(plan.value_format,
                    [&](auto format) { decode_apply_kernel<gradient_t, format.value><<<blocks, kThreads, 0, stream>>>(plan, a, checks); });
  check(cudaGetLastError(), "decode_apply");
  nan_if_flagged({a.gathered, plan.sections.payload_bytes, a.count, a.bucket, plan.numel, a.type, a.status}, stream);
}

} // namespace

void nan_if_flagged(const NanIfFlaggedArguments& arguments, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((arguments.numel + kDecodeTileNumel - 1) / kDecodeTileNumel);
  with_gradient_type(arguments.type, [&](auto gradient) {
    nan_if_flagged_kernel<decltype(gradient)><<<min(tiles + 1, 512u), kThreads, 0, stream>>>(arguments);
  });
  check(cudaGetLastError(), "nan_if_flagged");
}

void decode_apply(const DevicePlan& plan, const DecodeArguments& arguments, cudaStream_t stream) {
  with_gradient_type(arguments.type, [&](auto gradient) { enqueue<decltype(gradient)>(plan, arguments, stream); });
}

void load_decode_apply(GradientType type, ValueFormat value_format) {
  with_gradient_type(type, [&](auto gradient) { load<decltype(gradient)>(value_format); });
}

} // namespace compressed_ddp::cuda
