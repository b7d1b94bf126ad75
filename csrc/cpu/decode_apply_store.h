// The last loop of decode_apply over one tile of fp32 results: scale the sums, store them, clear the sums for the next tile. In portable
// C++ (with SSE2 where there is any) and in AVX2; the same bits from both.
#pragma once

#include <cstdint>

namespace compressed_ddp {

// out[i] = sums[i] * scale; sums[i] = 0. stream: stores go past the caches, and somebody has to fence. Returns 0 when every result is
// finite, NaN otherwise: x * 0 is NaN for Inf and NaN.
using StoreKernel = float (*)(float* sums, int64_t numel, float scale, float* out, bool stream);

float store_portable(float* sums, int64_t numel, float scale, float* out, bool stream);
#if COMPRESSED_DDP_X86
float store_avx2(float* sums, int64_t numel, float scale, float* out, bool stream);
#endif

// The widest kernel that this processor runs; decided once per process.
StoreKernel best_store();

// Static, so that each object has its own: an AVX object's copy must not serve the others.
// Entries [begin, end), one by one.
static inline float store_scalar(float* sums, int64_t begin, int64_t end, float scale, float* out) {
  float zero = 0;
  for (int64_t i = begin; i < end; ++i) {
    out[i] = sums[i] * scale;
    zero += out[i] * 0.0f;
    sums[i] = 0;
  }
  return zero;
}

// The first entry at which `out` is aligned to `bytes`, a power of two; at most numel.
static inline int64_t first_aligned(const float* out, int64_t numel, uintptr_t bytes) {
  const auto entries = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) & (bytes - 1)) / sizeof(float));
  return entries < numel ? entries : numel;
}

} // namespace compressed_ddp
