// Stage 4, decode_apply_: the payloads of all ranks, summed into the bucket in place. Torch-free.
//
//   bucket[i] = round((((0 + d_0[i]) + d_1[i]) + .. + d_{P-1}[i]) * fp32(1 / P))
// where d_p is what rank p sent (its selected entry at i, or its dense entry, or nothing); additions in rank order, in fp32; one
// multiplication; one rounding to the bucket's type. The own payload is decoded from its bytes like any other, so the result is
// bitwise the same on every rank, whatever the number of threads. If any payload carries the non-finite flag the whole
// bucket becomes NaN on every rank. Finite payloads can still give a non-finite result (a sum beyond fp32, an average beyond
// fp16): that is reported too, and is the same on every rank.
//
// Method: a tile of the bucket that fits the first-level cache is summed in scratch, rank by rank, then scaled and stored once.
// Indices ascend, so each rank's entries of a tile are one run: a cursor on its payload decodes them where they are needed, and no list of
// all entries is ever written to memory.
#pragma once

#include <atomic>
#include <string>

#include "decode.h"
#include "float_types.h"

namespace compressed_ddp {

struct DecodeApplyArguments {
  const uint8_t* payloads; // [count, payload_bytes(layout)]; check_payloads has let them pass, and nobody has changed them since
  int64_t count;           // of ranks: the sum is multiplied by fp32(1 / count)
  void* bucket;            // [numel] of `type`, written
  GradientType type;
};

// True when some rank flagged a non-finite entry.
bool any_non_finite(const Layout& layout, const uint8_t* payloads, int64_t count);

int64_t num_decode_tiles(const Layout& layout);

// Parallel over tiles. Returns whether every result is finite.
bool decode_apply_tiles(const Layout& layout, const DecodeApplyArguments& arguments, int64_t begin, int64_t end);

// bucket = NaN everywhere.
void fill_nan(int64_t numel, void* bucket, GradientType type);

// parallel_for as in compensate_select.h. Returns whether the bucket holds a non-finite result.
template <typename ParallelFor>
bool decode_apply(const Layout& layout, const DecodeApplyArguments& arguments, ParallelFor&& parallel_for) {
  if (any_non_finite(layout, arguments.payloads, arguments.count)) {
    fill_nan(layout.numel, arguments.bucket, arguments.type);
    return true;
  }
  std::atomic<bool> finite{true};
  parallel_for(num_decode_tiles(layout), [&](int64_t begin, int64_t end) {
    if (!decode_apply_tiles(layout, arguments, begin, end)) finite.store(false, std::memory_order_relaxed);
  });
  return !finite.load(std::memory_order_relaxed);
}

} // namespace compressed_ddp
