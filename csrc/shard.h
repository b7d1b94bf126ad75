// Which entries of a parameter a rank owns whose node shares its residuals (exchange="hierarchical"): the index-th of `count` ranges. A
// function of the parameter alone, so that a residual stays where it is when DDP arranges its buckets anew, or a run is resumed.
// Torch-free.
#pragma once

#include <cstdint>

namespace compressed_ddp {

struct Shard {
  int64_t index = 0, count = 1; // count 1: the whole parameter
  bool operator==(const Shard&) const = default;

  // Multiples of 8 entries: 16 bytes in every type.
  int64_t begin(int64_t numel) const { return border(numel, index); }
  int64_t end(int64_t numel) const { return border(numel, index + 1); }
  int64_t numel_of(int64_t numel) const { return end(numel) - begin(numel); }

 private:
  int64_t border(int64_t numel, int64_t i) const { return i == count ? numel : numel * i / count / 8 * 8; }
};

} // namespace compressed_ddp
