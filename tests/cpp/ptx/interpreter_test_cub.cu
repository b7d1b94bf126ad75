// CUB's block and warp algorithms, as the interpreter's test runs them.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_scan.cuh>

#define KERNEL extern "C" __global__ void

KERNEL block_reduce(const int* values, int* sums) {
  using Reduce = cub::BlockReduce<int, 128>;
  __shared__ typename Reduce::TempStorage storage;
  const int sum = Reduce(storage).Sum(values[blockIdx.x * 128 + threadIdx.x]);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

KERNEL block_scan(const int* values, int* sums, int* total) {
  using Scan = cub::BlockScan<int, 128>;
  __shared__ typename Scan::TempStorage storage;
  int items[4];
  for (int i = 0; i < 4; ++i) items[i] = values[(blockIdx.x * 128 + threadIdx.x) * 4 + i];
  int aggregate = 0;
  Scan(storage).ExclusiveSum(items, items, aggregate);
  for (int i = 0; i < 4; ++i) sums[(blockIdx.x * 128 + threadIdx.x) * 4 + i] = items[i];
  if (threadIdx.x == 0) total[blockIdx.x] = aggregate;
}

KERNEL warp_scan(const int* values, int* sums) {
  using Scan = cub::WarpScan<int>;
  __shared__ typename Scan::TempStorage storage[4];
  int value = values[threadIdx.x];
  Scan(storage[threadIdx.x / 32]).InclusiveSum(value, value);
  sums[threadIdx.x] = value;
}

KERNEL radix_sort(const unsigned* keys, unsigned* sorted) {
  using Sort = cub::BlockRadixSort<unsigned, 128, 4>;
  __shared__ typename Sort::TempStorage storage;
  unsigned items[4];
  for (int i = 0; i < 4; ++i) items[i] = keys[threadIdx.x * 4 + i];
  Sort(storage).SortDescending(items);
  for (int i = 0; i < 4; ++i) sorted[threadIdx.x * 4 + i] = items[i];
}
