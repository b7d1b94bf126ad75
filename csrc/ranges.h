// Where a bucket is cut into the ranges of a split exchange, one per owner (docs/exchanges.md). Torch-free.
#pragma once

#include <span>
#include <vector>

#include "layout.h"

namespace compressed_ddp {

inline constexpr int64_t kRangeNumel = 8; // ranges end at multiples of it: 16-byte accesses of 16-bit gradients stay aligned

struct RangePart { // what a range may hold a part of; parts lie one after another
  int64_t numel;
  bool dense;
};

struct RangeRule {
  double density;
  ValueFormat value_format;
  bool one_selection; // over all parts of a range (scope "bucket"); otherwise each part that is not dense is one
};

// The ends of `count` ranges, in order. All ranges' payloads are sent padded to the largest, so it is made as small as can be: the ranges
// are, from the first on, as long as their payloads allow within the least limit with which `count` ranges suffice. Every end is a multiple
// of kRangeNumel or the last one; ranges that are not needed come last and are empty. A function of its arguments in whole numbers but for
// selection_k: the same on every rank.
std::vector<int64_t> range_ends(std::span<const RangePart> parts, int64_t count, const RangeRule& rule);

} // namespace compressed_ddp
