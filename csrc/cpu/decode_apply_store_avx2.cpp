#include <immintrin.h>

#include "decode_apply_store.h"

namespace compressed_ddp {
namespace {

constexpr int64_t kLanes = 8, kStep = 4 * kLanes; // four sums of zeros, none of which waits for the one before

} // namespace

float store_avx2(float* sums, int64_t numel, float scale, float* out, bool stream) {
  int64_t i = stream ? first_aligned(out, numel, 32) : 0; // streaming needs aligned addresses
  float zero = store_scalar(sums, 0, i, scale, out);
  const __m256 factor = _mm256_set1_ps(scale), none = _mm256_setzero_ps();
  __m256 zeros[4] = {none, none, none, none};
  const auto scale_eight = [&](int64_t at, __m256& to) {
    const __m256 result = _mm256_mul_ps(_mm256_loadu_ps(sums + at), factor);
    to = _mm256_add_ps(to, _mm256_mul_ps(result, none));
    _mm256_storeu_ps(sums + at, none);
    return result;
  };
  if (stream) {
    for (; i + kStep <= numel; i += kStep)
      for (int64_t v = 0; v < 4; ++v) _mm256_stream_ps(out + i + v * kLanes, scale_eight(i + v * kLanes, zeros[v]));
  } else {
    for (; i + kStep <= numel; i += kStep)
      for (int64_t v = 0; v < 4; ++v) _mm256_storeu_ps(out + i + v * kLanes, scale_eight(i + v * kLanes, zeros[v]));
  }
  alignas(32) float lane[kLanes];
  _mm256_store_ps(lane, _mm256_add_ps(_mm256_add_ps(zeros[0], zeros[1]), _mm256_add_ps(zeros[2], zeros[3])));
  for (const float value : lane) zero += value;
  return zero + store_scalar(sums, i, numel, scale, out);
}

} // namespace compressed_ddp
