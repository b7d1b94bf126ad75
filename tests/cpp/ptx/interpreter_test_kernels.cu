// What the interpreter's test runs: one kernel for each way in which nvcc turns CUDA C++ into PTX that the project relies on.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cuda/atomic>

namespace cg = cooperative_groups;

#define KERNEL extern "C" __global__ void

KERNEL add_vectors(const float4* a, const float4* b, float4* sum, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float4 x = a[i], y = b[i];
  sum[i] = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

KERNEL copy_with_cache_hints(const uint4* from, uint4* to, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) __stcs(to + i, i % 2 == 0 ? __ldcs(from + i) : __ldcg(from + i));
}

// Each block reverses its part in dynamic shared memory, which begins behind a static variable.
KERNEL reverse_blocks(int* values) {
  extern __shared__ int part[];
  __shared__ int last;
  if (threadIdx.x == 0) last = static_cast<int>(blockDim.x) - 1;
  part[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  values[blockIdx.x * blockDim.x + threadIdx.x] = part[last - threadIdx.x];
}

__constant__ float weights[4] = {0.5f, -1.25f, 2.0f, 1e-3f};
__device__ unsigned int calls = 5;
__device__ const char* words[] = {"one", "two"};

KERNEL use_globals(float* values, char* letters) {
  values[threadIdx.x] *= weights[threadIdx.x % 4];
  letters[threadIdx.x] = words[threadIdx.x % 2][threadIdx.x % 3];
  atomicAdd(&calls, 1u);
}

struct Split {
  long long quotient;
  int remainder;
};
__device__ __noinline__ Split split(long long value, int by) { return {value / by, static_cast<int>(value % by)}; }
__device__ __noinline__ unsigned factorial(unsigned n) { return n < 2 ? 1 : n * factorial(n - 1); }

KERNEL call_functions(long long* values, unsigned* factorials) {
  const Split parts = split(values[threadIdx.x], 7);
  values[threadIdx.x] = parts.quotient * 1000 + parts.remainder;
  factorials[threadIdx.x] = factorial(threadIdx.x);
}

__device__ __noinline__ int sum_in_shared(int value) {
  __shared__ int sum; // a shared variable of a function that is no kernel
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, value);
  __syncthreads();
  return sum;
}
KERNEL call_with_shared(int* values) {
  __shared__ int twice[64];
  twice[threadIdx.x] = 2 * values[threadIdx.x];
  values[threadIdx.x] = sum_in_shared(twice[threadIdx.x]);
}

KERNEL assert_positive(const int* values) { assert(values[threadIdx.x] > 0); }

KERNEL print_values(int* values) {
  printf("%d of %s\n", values[threadIdx.x], "values");
  values[threadIdx.x] += 1;
}

KERNEL switch_over(int* values) {
  const int v = values[threadIdx.x];
  int r = 0;
  switch (v & 15) {
    case 0:
      r = v * 7;
      break;
    case 1:
      r = v / 3;
      break;
    case 2:
      r = v ^ 0x55;
      break;
    case 3:
      r = v - 9;
      break;
    case 4:
      r = v << 3;
      break;
    case 5:
      r = ~v;
      break;
    case 6:
      r = v % 11;
      break;
    case 7:
      r = 42;
      break;
    case 8:
      r = v * v;
      break;
    case 9:
      r = __popc(v);
      break;
    case 10:
      r = __clz(v);
      break;
    default:
      r = -1;
      break;
  }
  values[threadIdx.x] = r;
}

KERNEL half_arithmetic(const __half* a, const __half* b, __half* sums, __half2* products, float* widened) {
  const int i = threadIdx.x;
  sums[i] = __hadd(a[i], b[i]);
  products[i] = __hfma2(__halves2half2(a[i], b[i]), __halves2half2(b[i], b[i]), __halves2half2(a[i], a[i]));
  widened[i] = __half2float(a[i]) + (__hlt(a[i], b[i]) ? 1.0f : 0.0f);
}

KERNEL bfloat16_arithmetic(const __nv_bfloat16* a, const __nv_bfloat16* b, __nv_bfloat16* sums, __nv_bfloat162* packed) {
  const int i = threadIdx.x;
  sums[i] = __hadd(a[i], b[i]);
  packed[i] = __floats2bfloat162_rn(__fmul_rn(__bfloat162float(a[i]), 1.001f), __bfloat162float(__hmax(a[i], b[i])));
}

KERNEL tiled_sum(const unsigned* values, unsigned* ballots, unsigned* tile_sums, unsigned* total) {
  const cg::thread_block block = cg::this_thread_block();
  const auto tile = cg::tiled_partition<8>(block);
  unsigned sum = values[block.thread_rank()];
  for (int distance = 4; distance > 0; distance /= 2) sum += tile.shfl_down(sum, distance);
  if (tile.thread_rank() == 0) {
    tile_sums[block.thread_rank() / 8] = sum;
    cuda::atomic_ref<unsigned, cuda::thread_scope_device>(*total).fetch_add(sum, cuda::memory_order_relaxed);
  }
  block.sync();
  ballots[block.thread_rank()] = tile.ballot(values[block.thread_rank()] % 3 == 0);
}

// The block that ends last adds up what the others wrote: store, fence, ticket, fence, load.
KERNEL last_block_sums(const int* values, int* partial, unsigned* ticket, int* total) {
  __shared__ bool last;
  int sum = values[blockIdx.x * blockDim.x + threadIdx.x];
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    cuda::atomic_ref<unsigned, cuda::thread_scope_device> counter(*ticket);
    last = counter.fetch_add(1, cuda::memory_order_acq_rel) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) all += partial[i];
    *total = all;
  }
}

KERNEL compare_lanes(const unsigned* values, unsigned* equal, int* all_equal, unsigned* largest, int* counted) {
  const unsigned lane = threadIdx.x, value = values[lane];
  equal[lane] = __match_any_sync(0xffffffffu, value);
  int same = 0;
  __match_all_sync(0xffffffffu, value / 1000, &same);
  all_equal[lane] = same;
  largest[lane] = __reduce_max_sync(0xffffffffu, value);
  counted[lane] = __syncthreads_count(value % 2) + 100 * __any_sync(0xffffffffu, value == 7) + 1000 * __syncthreads_or(value > 900) +
                  10000 * __syncthreads_and(value < 1000);
}

KERNEL doubles(double* values, unsigned long long* integers) {
  const double x = values[threadIdx.x];
  values[threadIdx.x] = sqrt(x) / 3.0 + fma(x, 1e-9, -1.0);
  integers[threadIdx.x] =
      integers[threadIdx.x] / 10 + __umul64hi(integers[threadIdx.x], 0x9e3779b97f4a7c15u) + integers[threadIdx.x] % 1000;
}

struct alignas(16) Options {
  float scale[6];
  const float* from;
  int shift;
};
KERNEL use_struct(const __grid_constant__ Options options, float* to) {
  to[threadIdx.x] = options.from[threadIdx.x + options.shift] * options.scale[threadIdx.x % 6];
}

// Adds up what lies in an array of local memory, indexed by the data.
KERNEL local_array(const unsigned char* indices, int* sums) {
  int bins[16] = {};
  for (int i = 0; i < 32; ++i) bins[indices[32 * threadIdx.x + i] % 16] += i;
  int sum = 0;
  for (int i = 0; i < 16; ++i) sum += bins[i] * (i + 1);
  sums[threadIdx.x] = sum;
}

KERNEL __launch_bounds__(64) bounded(int* values) { values[threadIdx.x] = 1; }

KERNEL read_beyond(const int* values, int* out) { out[threadIdx.x] = values[threadIdx.x + 1]; }
KERNEL read_misaligned(const char* values, int* out) { out[threadIdx.x] = *reinterpret_cast<const int*>(values + threadIdx.x); }
KERNEL write_same_word(int* out) { *out = static_cast<int>(threadIdx.x); }

// Integer work, nearly no memory: how fast the interpreter is.
KERNEL spin(unsigned* values, int rounds) {
  unsigned x = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int i = 0; i < rounds; ++i) x = (x ^ (x >> 3)) * 2654435761u + i;
  values[blockIdx.x * blockDim.x + threadIdx.x] = x;
}
