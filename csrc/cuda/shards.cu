#include "shards.h"

#include <algorithm>
#include <cstring>
#include <cub/block/block_scan.cuh>

#include "bad_rank.cuh"
#include "launch.h"
#include "tile.cuh"

namespace compressed_ddp::cuda {
namespace {

// ---- pieces, in tiles; entries are copied as bits: unit_t is uint32_t or uint16_t

constexpr int kWordsAtOnce = 4; // that a thread loads before it stores the first
constexpr int kPieceTileBytes = kWordsAtOnce * 16 * kThreads;
// Blocks: with 16 KiB in flight each, several times what keeps memory busy, and few that read the list of pieces. No more than four of
// them come to one of 132 multiprocessors; with registers for more some would spill.
constexpr int64_t kMaxBlocks = 512;
constexpr int kResidentBlocks = 4;

// Calls function(piece, begin, numel) for this block's tiles [begin, begin + numel) of pieces, by all threads. One piece has millions of
// entries, the next has three, and the host knows no more than how many there are: so blocks number the tiles of all pieces, kThreads
// pieces at a time, and block b takes tiles b, b + gridDim.x, .. That is even whatever the sizes, where blocks over (piece, tile of the
// largest piece) would nearly all be empty.
template <typename unit_t, typename Function>
__device__ __forceinline__ void for_each_tile(const ShardPiece* pieces, int num_pieces, Function&& function) {
  constexpr int kTile = kPieceTileBytes / sizeof(unit_t);
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ uint32_t first_tile[kThreads];
  uint32_t tile = blockIdx.x, end = 0; // end: of the tiles of the pieces seen
  for (int first = 0; first < num_pieces; first += kThreads) {
    const int mine = first + static_cast<int>(threadIdx.x);
    const uint32_t tiles = mine < num_pieces ? static_cast<uint32_t>((pieces[mine].numel + kTile - 1) / kTile) : 0;
    uint32_t before, total;
    Scan(storage).ExclusiveSum(tiles, before, total);
    first_tile[threadIdx.x] = end + before; // nobody looks up the pieces before any more: all have taken part in the scan
    end += total;
    __syncthreads();
    for (; tile < end; tile += gridDim.x) {
      int found = 0; // the last piece whose first tile is this one or before it: an empty piece has the first tile of the next
      for (int step = kThreads / 2; step > 0; step /= 2)
        if (first_tile[found + step] <= tile) found += step;
      const ShardPiece piece = pieces[first + found];
      const int64_t begin = int64_t{tile - first_tile[found]} * kTile;
      function(piece, begin, static_cast<int>(min(int64_t{kTile}, piece.numel - begin)));
    }
  }
}

// `from` and `to` are equally far from a multiple of word_t. The few entries before the first word and behind the last are loaded along
// with the words.
template <typename word_t, typename unit_t>
__device__ __forceinline__ void copy_as(const unit_t* from, unit_t* to, int numel) {
  constexpr int kUnits = sizeof(word_t) / sizeof(unit_t);
  const int thread = static_cast<int>(threadIdx.x);
  const int head = min(numel, static_cast<int>(-(reinterpret_cast<uintptr_t>(to) / sizeof(unit_t)) % kUnits));
  const int num_words = (numel - head) / kUnits, tail = head + num_words * kUnits;
  const int edge = thread < kUnits ? thread : tail + thread - kUnits;
  const bool has_edge = edge < (thread < kUnits ? head : numel);
  const unit_t edge_unit = has_edge ? from[edge] : unit_t{0};
  const auto* in = reinterpret_cast<const word_t*>(from + head);
  auto* out = reinterpret_cast<word_t*>(to + head);
  for (int i = thread; i < num_words; i += kWordsAtOnce * kThreads) {
    word_t words[kWordsAtOnce];
#pragma unroll
    for (int j = 0; j < kWordsAtOnce; ++j)
      if (i + j * kThreads < num_words) words[j] = __ldcs(in + i + j * kThreads);
#pragma unroll
    for (int j = 0; j < kWordsAtOnce; ++j)
      if (i + j * kThreads < num_words) out[i + j * kThreads] = words[j];
  }
  if (has_edge) to[edge] = edge_unit;
}

template <typename unit_t>
__device__ __forceinline__ void copy_tile(const unit_t* from, unit_t* to, int numel) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(from) ^ reinterpret_cast<uintptr_t>(to);
  if (apart % sizeof(uint4) == 0)
    copy_as<uint4>(from, to, numel);
  else if (sizeof(unit_t) < sizeof(uint32_t) && apart % sizeof(uint32_t) == 0)
    copy_as<uint32_t>(from, to, numel);
  else
    copy_as<unit_t>(from, to, numel);
}

// ---- kernels

template <typename unit_t>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) pack_shards_kernel(PackShardsArguments a, unit_t one) {
  const auto* bucket = static_cast<const unit_t*>(a.bucket);
  auto* shards = static_cast<unit_t*>(a.shards);
  for_each_tile<unit_t>(a.pieces, static_cast<int>(a.num_pieces), [&](const ShardPiece& piece, int64_t begin, int numel) {
    copy_tile(bucket + piece.bucket_begin + begin, shards + piece.shards_begin + begin, numel);
  });
  for (int64_t s = blockIdx.x; s < a.num_shards; s += gridDim.x)
    for (int64_t p = threadIdx.x; p < a.num_parameters; p += kThreads) shards[a.presence_from[s] + p] = a.unused[p] != 0 ? unit_t{0} : one;
}

template <typename unit_t>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) unpack_shards_kernel(UnpackShardsArguments a, unit_t nan) {
  bool is_bad = false;
  for (int s = threadIdx.x; s < a.count; s += kThreads) {
    const PayloadHeader header = load_header(a.slots + s * a.slot_bytes);
    const bool right = header_is_right(header, a.expected, static_cast<uint32_t>(s)), flagged = (header.flags & kFlagNonFinite) != 0;
    is_bad |= flagged || !right;
    if (blockIdx.x > 0) continue; // every block must know, one of them tells
    if (!right) report_bad_rank(a.status, a.expected.rank + static_cast<uint32_t>(s));
    if (flagged) atomicOr(&a.status->step_is_bad, 1u);
  }
  is_bad = __syncthreads_or(is_bad);
  const auto* slots = reinterpret_cast<const unit_t*>(a.slots);
  auto* bucket = static_cast<unit_t*>(a.bucket);
  for_each_tile<unit_t>(a.pieces, static_cast<int>(a.num_pieces), [&](const ShardPiece& piece, int64_t begin, int numel) {
    unit_t* to = bucket + piece.bucket_begin + begin;
    if (!is_bad) return copy_tile(slots + piece.shards_begin + begin, to, numel);
    for (int i = threadIdx.x; i < numel; i += kThreads) to[i] = nan;
  });
}

// 16 bytes as fp32.
__device__ __forceinline__ void widen(uint4 from, float (&to)[4], float*) {
  to[0] = __uint_as_float(from.x), to[1] = __uint_as_float(from.y), to[2] = __uint_as_float(from.z), to[3] = __uint_as_float(from.w);
}
template <typename gradient_t>
__device__ __forceinline__ void widen(uint4 from, float (&to)[8], gradient_t*) {
  const uint32_t pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = i % 2 == 0 ? pairs[i / 2] & 0xffffu : pairs[i / 2] >> 16;
    to[i] = std::is_same_v<gradient_t, BFloat16> ? __uint_as_float(bits << 16)
                                                 : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

// A thread has the entries of one vector, or as many that lie kThreads apart.
template <typename gradient_t>
__global__ void __launch_bounds__(kThreads)
    mean_of_shards_kernel(const gradient_t* shards, int count, int64_t numel, float scale, float* mean, bool vectors) {
  constexpr int kItems = 16 / sizeof(gradient_t);
  const int64_t tile = int64_t{blockIdx.x} * kItems * kThreads;
  float sums[kItems] = {};
  if (vectors) {
    const int64_t first = tile + static_cast<int>(threadIdx.x) * kItems;
    if (first >= numel) return;
#pragma unroll 4
    for (int s = 0; s < count; ++s) { // rank order
      float values[kItems];
      widen(__ldcs(reinterpret_cast<const uint4*>(shards + s * numel + first)), values, static_cast<gradient_t*>(nullptr));
#pragma unroll
      for (int j = 0; j < kItems; ++j) sums[j] = __fadd_rn(sums[j], values[j]);
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) sums[j] = canonical(__fmul_rn(sums[j], scale));
#pragma unroll
    for (int j = 0; j < kItems; j += 4)
      *reinterpret_cast<float4*>(mean + first + j) = make_float4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3]);
    return;
  }
  const int64_t first = tile + threadIdx.x;
  for (int s = 0; s < count; ++s) {
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      if (first + j * kThreads < numel) sums[j] = __fadd_rn(sums[j], load_one(shards + s * numel + first + j * kThreads));
  }
#pragma unroll
  for (int j = 0; j < kItems; ++j)
    if (first + j * kThreads < numel) mean[first + j * kThreads] = canonical(__fmul_rn(sums[j], scale));
}

__global__ void __launch_bounds__(kThreads)
    mark_unused_kernel(const float* presence, const int32_t* parameter_of_segment, int64_t num_segments, uint8_t* unused) {
  const int64_t s = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (s >= num_segments) return;
  const int32_t parameter = parameter_of_segment[s];
  unused[s] = parameter >= 0 && presence[parameter] == 0 ? 1 : 0;
}

__global__ void __launch_bounds__(kThreads) seal_slot_kernel(uint8_t* slot, PayloadHeader header, const DecodeStatus* status) {
  if (status->step_is_bad != 0) header.flags |= kFlagNonFinite;
  *reinterpret_cast<PayloadHeader*>(slot) = header;
}

// ---- launches

template <typename Function>
void with_unit(GradientType type, Function&& function) {
  if (type == GradientType::kFloat32)
    function(uint32_t{});
  else
    function(uint16_t{});
}

uint32_t one_bits(GradientType type) {
  return type == GradientType::kFloat32 ? 0x3f800000u : type == GradientType::kFloat16 ? 0x3c00u : 0x3f80u;
}
uint32_t nan_bits(GradientType type) {
  return type == GradientType::kFloat32 ? kCanonicalNanBits : type == GradientType::kFloat16 ? 0x7e00u : 0x7fc0u;
}

// No more than there can be tiles; one, if there is nothing but presence or headers.
unsigned num_blocks(int64_t num_pieces, int64_t largest_piece_numel, GradientType type) {
  const int64_t tiles = (largest_piece_numel * element_bytes(type) + kPieceTileBytes - 1) / kPieceTileBytes;
  return static_cast<unsigned>(std::clamp(num_pieces * tiles, int64_t{1}, kMaxBlocks));
}

} // namespace

void load_shards(GradientType type) {
  cudaFuncAttributes attributes;
  with_unit(type, [&](auto unit) {
    check(cudaFuncGetAttributes(&attributes, pack_shards_kernel<decltype(unit)>), "loading pack_shards");
    check(cudaFuncGetAttributes(&attributes, unpack_shards_kernel<decltype(unit)>), "loading unpack_shards");
  });
  with_gradient_type(type, [&](auto gradient) {
    check(cudaFuncGetAttributes(&attributes, mean_of_shards_kernel<decltype(gradient)>), "loading mean_of_shards");
  });
  check(cudaFuncGetAttributes(&attributes, mark_unused_kernel), "loading mark_unused");
  check(cudaFuncGetAttributes(&attributes, seal_slot_kernel), "loading seal_slot");
}

void pack_shards(const PackShardsArguments& arguments, cudaStream_t stream) {
  const unsigned blocks = num_blocks(arguments.num_pieces, arguments.largest_piece_numel, arguments.type);
  with_unit(arguments.type, [&](auto one) {
    one = static_cast<decltype(one)>(one_bits(arguments.type));
    pack_shards_kernel<<<blocks, kThreads, 0, stream>>>(arguments, one);
  });
  check(cudaGetLastError(), "pack_shards");
}

void mean_of_shards(const void* shards, GradientType type, int64_t count, int64_t numel, float* mean, cudaStream_t stream) {
  if (numel == 0) return;
  const float scale = 1.0f / static_cast<float>(count); // not on the device: its division has fused multiply-adds
  with_gradient_type(type, [&](auto gradient) {
    using gradient_t = decltype(gradient);
    constexpr int64_t kItems = 16 / sizeof(gradient_t);
    const auto blocks = static_cast<unsigned>((numel + kItems * kThreads - 1) / (kItems * kThreads));
    const bool vectors =
        numel % kItems == 0 && reinterpret_cast<uintptr_t>(shards) % 16 == 0 && reinterpret_cast<uintptr_t>(mean) % 16 == 0;
    mean_of_shards_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const gradient_t*>(shards), static_cast<int>(count), numel, scale,
                                                           mean, vectors);
  });
  check(cudaGetLastError(), "mean_of_shards");
}

void mark_unused(const float* presence, const int32_t* parameter_of_segment, int64_t num_segments, uint8_t* unused, cudaStream_t stream) {
  if (num_segments == 0) return;
  const auto blocks = static_cast<unsigned>((num_segments + kThreads - 1) / kThreads);
  mark_unused_kernel<<<blocks, kThreads, 0, stream>>>(presence, parameter_of_segment, num_segments, unused);
  check(cudaGetLastError(), "mark_unused");
}

void seal_slot(uint8_t* slot, const PayloadHeader& header, const DecodeStatus* status, cudaStream_t stream) {
  seal_slot_kernel<<<1, 1, 0, stream>>>(slot, header, status);
  check(cudaGetLastError(), "seal_slot");
}

void unpack_shards(const UnpackShardsArguments& arguments, cudaStream_t stream) {
  const unsigned blocks = num_blocks(arguments.num_pieces, arguments.largest_piece_numel, arguments.type);
  with_unit(arguments.type, [&](auto nan) {
    nan = static_cast<decltype(nan)>(nan_bits(arguments.type));
    unpack_shards_kernel<<<blocks, kThreads, 0, stream>>>(arguments, nan);
  });
  check(cudaGetLastError(), "unpack_shards");
}

} // namespace compressed_ddp::cuda
