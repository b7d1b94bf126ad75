#include "decode_apply_store.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace compressed_ddp {

float store_portable(float* sums, int64_t numel, float scale, float* out, [[maybe_unused]] bool stream) {
  int64_t i = 0;
  float zero = 0;
#if defined(__SSE2__)
  if (stream) { // needs aligned addresses
    i = first_aligned(out, numel, 16);
    zero = store_scalar(sums, 0, i, scale, out);
  }
  const __m128 factor = _mm_set1_ps(scale);
  __m128 zeros = _mm_setzero_ps();
  const auto scale_four = [&](int64_t at) {
    const __m128 result = _mm_mul_ps(_mm_loadu_ps(sums + at), factor);
    zeros = _mm_add_ps(zeros, _mm_mul_ps(result, _mm_setzero_ps()));
    _mm_storeu_ps(sums + at, _mm_setzero_ps());
    return result;
  };
  if (stream) {
    for (; i + 4 <= numel; i += 4) _mm_stream_ps(out + i, scale_four(i));
  } else {
    for (; i + 4 <= numel; i += 4) _mm_storeu_ps(out + i, scale_four(i));
  }
  alignas(16) float lane[4];
  _mm_store_ps(lane, zeros);
  zero += lane[0] + lane[1] + lane[2] + lane[3];
#endif
  return zero + store_scalar(sums, i, numel, scale, out);
}

StoreKernel best_store() {
#if COMPRESSED_DDP_X86
  static const StoreKernel best = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? store_avx2 : store_portable;
  }();
  return best;
#else
  return store_portable;
#endif
}

} // namespace compressed_ddp
