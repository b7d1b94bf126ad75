#include "decode_apply.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace compressed_ddp::cuda {
namespace {

constexpr int kDecodeTileNumel = 8192; // 32 KiB of sums: six blocks per multiprocessor of sm_90, and few searches per entry
constexpr int kRanksAtOnce = kThreads / 2;

__device__ __forceinline__ uint32_t key_of(float value) { return __float_as_uint(value) & 0x7fffffffu; }

__device__ __forceinline__ float round_to(float value, float*) { return value; }
__device__ __forceinline__ uint16_t round_to(float value, Float16*) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ uint16_t round_to(float value, BFloat16*) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// ---- one payload

struct PayloadView {
  const int32_t* indices;
  const float* values;
  const float* dense;
};

__device__ __forceinline__ PayloadView payload_of(const DevicePlan& plan, const DecodeArguments& a, int rank) {
  const uint8_t* words = a.gathered + rank * a.expected.payload_bytes + sizeof(PayloadHeader);
  const auto* indices = reinterpret_cast<const int32_t*>(words);
  const auto* values = reinterpret_cast<const float*>(words) + plan.selected_numel;
  return {indices, values, values + plan.selected_numel};
}

__device__ __forceinline__ const PayloadHeader& header_of(const DecodeArguments& a, int rank) {
  return *reinterpret_cast<const PayloadHeader*>(a.gathered + rank * a.expected.payload_bytes);
}

__device__ inline bool header_is_right(const PayloadHeader& got, const PayloadHeader& expected, int rank) {
  return got.magic == expected.magic && got.version == expected.version && (got.flags & ~kFlagNonFinite) == 0 &&
         got.rank == static_cast<uint32_t>(rank) && got.world_size == expected.world_size && got.layout_hash == expected.layout_hash &&
         got.step == expected.step && got.numel == expected.numel && got.selected_numel == expected.selected_numel &&
         got.dense_numel == expected.dense_numel && got.payload_bytes == expected.payload_bytes;
}

// The first of the entries whose index is at least `index`; of any bytes, a position in [0, count].
__device__ __forceinline__ int64_t lower_bound(const int32_t* indices, int64_t count, int64_t index) {
  int64_t begin = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (indices[begin + half] < index) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

// Lowest rank wins, whatever the order of blocks; 0 means none.
__device__ __forceinline__ void report(DecodeStatus* status, int rank) {
  const auto mine = static_cast<uint32_t>(rank) + 1;
  const uint32_t seen = atomicCAS(&status->bad_rank, 0u, mine);
  if (seen > mine) atomicMin(&status->bad_rank, mine);
  atomicOr(&status->step_is_bad, 1u);
}

// ---- checks that are not part of any tile: headers, and that every group's entries lie in the group

__device__ void check_payloads(const DevicePlan& plan, const DecodeArguments& a) {
  for (int rank = 0; rank < a.world_size; ++rank) {
    const PayloadView payload = payload_of(plan, a, rank);
    bool right = true;
    if (threadIdx.x == 0) {
      right = header_is_right(header_of(a, rank), a.expected, rank);
      if ((header_of(a, rank).flags & kFlagNonFinite) != 0) atomicOr(&a.status->step_is_bad, 1u);
    }
    for (int g = threadIdx.x; g < plan.num_groups; g += kThreads) {
      const GroupRange range = plan.group_ranges[g];
      right = right && payload.indices[range.entry_offset] >= range.first_index &&
              payload.indices[range.entry_offset + range.k - 1] <= range.last_index;
    }
    if (!right) report(a.status, rank);
  }
}

// ---- a tile

// Entries [begin, end) of one rank, added to the tile; by all threads, with at least one barrier, which orders the ranks. Both ends
// were found by search in bytes that nobody has checked; the neighbouring tiles find the same ends, so if every tile's entries ascend
// inside the tile, all of the payload does. Nothing is added before all of a round is known to ascend: two threads never meet in one sum.
__device__ bool add_entries(const PayloadView& payload, int64_t begin, int64_t end, int64_t tile_begin, int tile_numel, float* sums) {
  const int64_t tile_end = tile_begin + tile_numel;
  int64_t first = begin;
  do {
    const int64_t entry = first + threadIdx.x;
    const bool valid = entry < end;
    const int64_t index = valid ? payload.indices[entry] : tile_end;
    int64_t next = __shfl_down_sync(0xffffffffu, index, 1);
    if (threadIdx.x % 32 == 31) next = entry + 1 < end ? payload.indices[entry + 1] : tile_end;
    const bool wrong = begin > end || (valid && (index < tile_begin || index >= next || next > tile_end));
    if (__syncthreads_or(wrong)) return false; // the result is NaN anyway
    if (valid) sums[index - tile_begin] = __fadd_rn(sums[index - tile_begin], payload.values[entry]);
    first += kThreads;
  } while (first < end);
  return true;
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

template <typename gradient_t>
__device__ bool scale_and_store(const DecodeArguments& a, const float* sums, int64_t tile_begin, int numel) {
  using stored_t = decltype(round_to(0.0f, static_cast<gradient_t*>(nullptr)));
  const float scale = __fdiv_rn(1.0f, static_cast<float>(a.world_size));
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
  struct alignas(4 * sizeof(stored_t)) Four {
    stored_t value[4];
  };
  int i = 4 * static_cast<int>(threadIdx.x);
  if (reinterpret_cast<uintptr_t>(out) % sizeof(Four) == 0) {
    for (; i + 4 <= numel; i += 4 * kThreads) *reinterpret_cast<Four*>(out + i) = {{one(i), one(i + 1), one(i + 2), one(i + 3)}};
    for (int j = i; j < min(i + 4, numel); ++j) out[j] = one(j);
  } else {
    for (i = threadIdx.x; i < numel; i += kThreads) out[i] = one(i);
  }
  return is_finite;
}

template <typename gradient_t>
__global__ void __launch_bounds__(kThreads) decode_apply_kernel(DevicePlan plan, DecodeArguments a) {
  __shared__ float sums[kDecodeTileNumel];
  __shared__ int64_t begins[kRanksAtOnce], ends[kRanksAtOnce];
  __shared__ int first_dense;
  if (blockIdx.x == gridDim.x - 1) {
    check_payloads(plan, a);
    return;
  }
  const int64_t tile_begin = int64_t{blockIdx.x} * kDecodeTileNumel;
  const int64_t tile_end = min(tile_begin + kDecodeTileNumel, plan.numel);
  const auto numel = static_cast<int>(tile_end - tile_begin);
  for (int i = threadIdx.x; i < kDecodeTileNumel; i += kThreads) sums[i] = 0;
  if (threadIdx.x == 0) first_dense = first_dense_tile(plan, tile_begin);
  for (int first = 0; first < a.world_size; first += kRanksAtOnce) {
    const int count = min(kRanksAtOnce, a.world_size - first);
    __syncthreads(); // the ends of the ranks before are no longer needed
    if (threadIdx.x % kRanksAtOnce < count) {
      const PayloadView payload = payload_of(plan, a, first + static_cast<int>(threadIdx.x) % kRanksAtOnce);
      const bool is_end = threadIdx.x >= kRanksAtOnce;
      (is_end ? ends : begins)[threadIdx.x % kRanksAtOnce] =
          lower_bound(payload.indices, plan.selected_numel, is_end ? tile_end : tile_begin);
    }
    __syncthreads();
    const bool any_dense = first_dense < plan.num_dense_tiles && plan.dense_tiles[first_dense].offset < tile_end;
    for (int r = 0; r < count; ++r) { // rank order
      const PayloadView payload = payload_of(plan, a, first + r);
      const bool right = add_entries(payload, begins[r], ends[r], tile_begin, numel, sums);
      if (!right && threadIdx.x == 0) report(a.status, first + r);
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
__global__ void __launch_bounds__(kThreads) decode_apply_nan_kernel(DevicePlan plan, DecodeArguments a) {
  bool flagged = false;
  for (int rank = threadIdx.x; rank < a.world_size; rank += kThreads) flagged |= (header_of(a, rank).flags & kFlagNonFinite) != 0;
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
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < plan.numel; i += int64_t{gridDim.x} * kThreads)
    static_cast<stored_t*>(a.bucket)[i] = nan;
}

template <typename gradient_t>
void load() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, decode_apply_kernel<gradient_t>), "loading decode_apply");
  check(cudaFuncGetAttributes(&attributes, decode_apply_nan_kernel<gradient_t>), "loading decode_apply_nan");
}

template <typename gradient_t>
void enqueue(const DevicePlan& plan, const DecodeArguments& a, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>((plan.numel + kDecodeTileNumel - 1) / kDecodeTileNumel);
  decode_apply_kernel<gradient_t><<<tiles + 1, kThreads, 0, stream>>>(plan, a);
  check(cudaGetLastError(), "decode_apply");
  decode_apply_nan_kernel<gradient_t><<<min(tiles + 1, 512u), kThreads, 0, stream>>>(plan, a);
  check(cudaGetLastError(), "decode_apply_nan");
}

} // namespace

void decode_apply(const DevicePlan& plan, const DecodeArguments& arguments, cudaStream_t stream) {
  switch (arguments.type) {
    case GradientType::kFloat32:
      return enqueue<float>(plan, arguments, stream);
    case GradientType::kFloat16:
      return enqueue<Float16>(plan, arguments, stream);
    default:
      return enqueue<BFloat16>(plan, arguments, stream);
  }
}

void load_decode_apply(GradientType type) {
  switch (type) {
    case GradientType::kFloat32:
      return load<float>();
    case GradientType::kFloat16:
      return load<Float16>();
    default:
      return load<BFloat16>();
  }
}

} // namespace compressed_ddp::cuda
