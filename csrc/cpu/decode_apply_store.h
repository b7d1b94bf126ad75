// The last loop of decode_apply over one tile of results: scale the sums, round them to the gradient's type, store them, and clear the sums
// for the next tile. Once in portable C++ and once in AVX2; the same bits from both.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace compressed_ddp {

// out[i] = sums[i] * scale, rounded; sums[i] = 0. stream: stores may go past the caches, and somebody has to fence. Returns 0 when every
// result is finite, NaN otherwise: x * 0 is NaN for Inf and NaN.
struct StoreKernels {
  float (*fp32)(float* sums, int64_t numel, float scale, float* out, bool stream);
  float (*fp16)(float* sums, int64_t numel, float scale, Float16* out, bool stream);
  float (*bf16)(float* sums, int64_t numel, float scale, BFloat16* out, bool stream);
  // By the type of `out`.
  float operator()(float* sums, int64_t numel, float scale, float* out, bool stream) const { return fp32(sums, numel, scale, out, stream); }
  float operator()(float* sums, int64_t numel, float scale, Float16* out, bool stream) const {
    return fp16(sums, numel, scale, out, stream);
  }
  float operator()(float* sums, int64_t numel, float scale, BFloat16* out, bool stream) const {
    return bf16(sums, numel, scale, out, stream);
  }
};

extern const StoreKernels kPortableStore;
#if COMPRESSED_DDP_X86
extern const StoreKernels kAvx2Store;
#endif

// The widest kernels that this processor runs; decided once per process.
const StoreKernels& best_store();

} // namespace compressed_ddp
