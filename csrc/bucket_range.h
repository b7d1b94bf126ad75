// A consecutive range of a bucket with a layout of its own: what one payload is about. The whole bucket in an all-gather; the part that
// one rank owns in the other exchanges.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"

namespace compressed_ddp {

struct BucketRange {
  int64_t begin = 0, end = 0; // in the bucket
  Layout layout;
  std::vector<size_t> entries;   // per segment of the layout: which of the bucket's entries (parameters) it belongs to
  std::vector<float*> residuals; // per segment: its part of the residual, nullptr for dense ones; empty = no error feedback

  int64_t numel() const { return end - begin; }
  // Per segment, from `unused` per entry, which may be shorter: entries behind it are used.
  std::vector<uint8_t> unused_segments(const std::vector<uint8_t>& unused) const {
    std::vector<uint8_t> of_segments;
    for (const size_t entry : entries) of_segments.push_back(entry < unused.size() ? unused[entry] : 0);
    return of_segments;
  }
};

} // namespace compressed_ddp
