// Where a position of the bucket lies.
#pragma once

#include "plan.h"

namespace compressed_ddp::cuda {

// The last segment whose offset is at most `index`, by search in a table that stays in the caches: empty segments before it are passed.
__device__ __forceinline__ int segment_of(const DevicePlan& plan, int64_t index) {
  int begin = 0, end = plan.num_segments;
  while (end - begin > 1) {
    const int middle = (begin + end) / 2;
    (plan.segment_offsets[middle] <= index ? begin : end) = middle;
  }
  return begin;
}

} // namespace compressed_ddp::cuda
