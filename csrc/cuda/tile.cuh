// How a block holds a tile: thread t owns entries 4t .. 4t+3 of each row of 1024, so that a warp reads 512 consecutive bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cpu/float_types.h"
#include "compensate_select.h"

namespace compressed_ddp::cuda {

constexpr int kRowNumel = 4 * kThreads;
constexpr int kRows = kTileNumel / kRowNumel;
static_assert(kRows * kWarps == 32, "one warp scans the counts of all rows and warps");

// ---- keys, on the device

__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t magnitude = __float_as_uint(value) & 0x7fffffffu;
  return magnitude > kInfinityKey ? kNanKey : magnitude;
}
__device__ __forceinline__ bool finite(uint32_t key) { return key < kInfinityKey; }
__device__ __forceinline__ float canonical(float value) { return key_of(value) == kNanKey ? __uint_as_float(kCanonicalNanBits) : value; }

// ---- gradients of the three types as fp32

__device__ __forceinline__ float load_one(const float* p) { return __ldcs(p); }
__device__ __forceinline__ float load_one(const Float16* p) {
  return __half2float(__ushort_as_half(__ldcs(reinterpret_cast<const unsigned short*>(p))));
}
__device__ __forceinline__ float load_one(const BFloat16* p) {
  return __uint_as_float(static_cast<uint32_t>(__ldcs(reinterpret_cast<const unsigned short*>(p))) << 16);
}

// Gradients are read once (streaming: they shall not push the residual out of the second-level cache).
__device__ __forceinline__ void load_four(const float* p, float (&out)[4]) {
  const float4 four = __ldcs(reinterpret_cast<const float4*>(p));
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}
__device__ __forceinline__ void load_four(const BFloat16* p, float (&out)[4]) {
  const uint2 four = __ldcs(reinterpret_cast<const uint2*>(p));
  out[0] = __uint_as_float(four.x << 16), out[1] = __uint_as_float(four.x & 0xffff0000u);
  out[2] = __uint_as_float(four.y << 16), out[3] = __uint_as_float(four.y & 0xffff0000u);
}
__device__ __forceinline__ void load_four(const Float16* p, float (&out)[4]) {
  const uint2 four = __ldcs(reinterpret_cast<const uint2*>(p));
  out[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(four.x & 0xffffu)));
  out[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(four.x >> 16)));
  out[2] = __half2float(__ushort_as_half(static_cast<unsigned short>(four.y & 0xffffu)));
  out[3] = __half2float(__ushort_as_half(static_cast<unsigned short>(four.y >> 16)));
}

// An increment whose old value nobody wants. Spelled out, because the compiler keeps the returning form of atomicAdd here.
__device__ __forceinline__ void add_relaxed(uint32_t* counter, uint32_t amount) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

// ---- where the entries of a tile lie

template <typename gradient_t>
struct TileSource {
  const gradient_t* gradient;
  float* residual; // nullptr: no error feedback, or nothing here may be written
  int numel;
  bool unused;
  bool vectors; // 16-byte accesses are possible

  __device__ TileSource(const SelectArguments& a, int64_t offset, int64_t segment_offset, int segment, int numel)
      : gradient(static_cast<const gradient_t*>(a.gradient) + offset),
        residual(a.residuals == nullptr ? nullptr : a.residuals[segment] + segment_offset),
        numel(numel),
        unused(a.unused != nullptr && a.unused[segment] != 0) {
    if (unused) residual = nullptr;
    vectors = (reinterpret_cast<uintptr_t>(gradient) % (4 * sizeof(gradient_t)) == 0) && (reinterpret_cast<uintptr_t>(residual) % 16 == 0);
  }
  __device__ TileSource(const SelectArguments& a, const Tile& tile)
      : TileSource(a, tile.offset, tile.segment_offset, tile.segment, tile.numel) {}

  // What the residual will hold if the entry is not selected, and what is selected by: gradient + residual. `stored`: the residual
  // already holds that sum, since an earlier pass has written it.
  __device__ float acc(int i, bool stored) const {
    if (unused) return 0.0f;
    if (residual == nullptr) return load_one(gradient + i);
    return stored ? residual[i] : __fadd_rn(load_one(gradient + i), residual[i]);
  }

  // Row r of this thread: acc, and 0 beyond the tile.
  __device__ void load_row(int r, bool stored, float (&acc)[4], float& gradient_sq) const {
    const int first = r * kRowNumel + 4 * static_cast<int>(threadIdx.x);
    float g[4] = {}, e[4] = {};
    const bool with_gradient = !(stored && residual != nullptr);
    if (!unused && vectors && first + 4 <= numel) {
      if (with_gradient) load_four(gradient + first, g);
      if (residual != nullptr) {
        const float4 four = *reinterpret_cast<const float4*>(residual + first);
        e[0] = four.x, e[1] = four.y, e[2] = four.z, e[3] = four.w;
      }
    } else if (!unused) {
      for (int j = 0; j < 4; ++j) {
        if (first + j >= numel) break;
        if (with_gradient) g[j] = load_one(gradient + first + j);
        if (residual != nullptr) e[j] = residual[first + j];
      }
    }
    for (int j = 0; j < 4; ++j) {
      gradient_sq = __fadd_rn(gradient_sq, __fmul_rn(g[j], g[j]));
      acc[j] = residual == nullptr ? g[j] : with_gradient ? __fadd_rn(g[j], e[j]) : e[j];
    }
  }

  // All rows. Of a whole tile with vectors, which nearly all are, every load is issued before the first is used.
  __device__ __forceinline__ void load_tile(bool stored, float (&acc)[kRows][4], float& gradient_sq) const {
    if (unused || !vectors || numel != kTileNumel || residual == nullptr) {
      for (int r = 0; r < kRows; ++r) load_row(r, stored, acc[r], gradient_sq);
      return;
    }
    float g[kRows][4] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int first = r * kRowNumel + 4 * static_cast<int>(threadIdx.x);
      const float4 four = *reinterpret_cast<const float4*>(residual + first);
      acc[r][0] = four.x, acc[r][1] = four.y, acc[r][2] = four.z, acc[r][3] = four.w;
      if (!stored) load_four(gradient + first, g[r]);
    }
    if (stored) return; // acc is what the residual holds, bit for bit (-0 + 0 would be +0)
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        gradient_sq = __fadd_rn(gradient_sq, __fmul_rn(g[r][j], g[r][j]));
        acc[r][j] = __fadd_rn(g[r][j], acc[r][j]);
      }
  }

  __device__ void store_row(int r, const float (&e)[4]) const {
    const int first = r * kRowNumel + 4 * static_cast<int>(threadIdx.x);
    if (residual == nullptr) return;
    if (vectors && first + 4 <= numel) {
      *reinterpret_cast<float4*>(residual + first) = make_float4(e[0], e[1], e[2], e[3]);
    } else {
      for (int j = 0; j < 4; ++j)
        if (first + j < numel) residual[first + j] = e[j];
    }
  }
};

// ---- order of chosen entries

// Ranks of a block's chosen entries in the order of their indices, from one bit per entry and thread; of two choices at once, the
// second counted in the upper half of each word.
struct BlockOrder {
  uint32_t before[kRows][kWarps];
  uint32_t total;
};
static_assert(kTileNumel < 1 << 16);

// `first`, `second`: bit 4r+j for row r, entry j. Afterwards order.before[r][w] entries lie before warp w's part of row r. Two barriers.
__device__ __forceinline__ void order_block(uint32_t first, uint32_t second, BlockOrder& order) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = 0; r < kRows; ++r) {
    const uint32_t mine = __popc(first >> (4 * r) & 15u) | __popc(second >> (4 * r) & 15u) << 16;
    const uint32_t count = __reduce_add_sync(0xffffffffu, mine);
    if (lane == 0) order.before[r][warp] = count;
  }
  __syncthreads();
  if (warp == 0) {
    uint32_t* counts = &order.before[0][0];
    const uint32_t mine = counts[lane];
    uint32_t sum = mine;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    counts[lane] = sum - mine;
    if (lane == 31) order.total = sum;
  }
  __syncthreads();
}

// Chosen entries of this row and warp that lie before this thread's first.
__device__ __forceinline__ int before_thread(uint32_t chosen, int r) {
  const uint32_t below = (1u << (threadIdx.x % 32)) - 1;
  int before = 0;
  for (int j = 0; j < 4; ++j) before += __popc(__ballot_sync(0xffffffffu, chosen >> (4 * r + j) & 1u) & below);
  return before;
}

} // namespace compressed_ddp::cuda
