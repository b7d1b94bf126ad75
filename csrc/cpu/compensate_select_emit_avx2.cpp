// The emit phase in AVX2: eight candidates are split into selected and rejected by two permutations. Eight that hold a tie or a
// non-finite value (few do) go entry by entry.
#include "avx2_pack.h"
#include "compensate_select_emit.h"

namespace compressed_ddp {

EmitResult emit_avx2(const EmitArguments& a) {
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i threshold = _mm256_set1_epi32(static_cast<int32_t>(a.threshold));
  const __m256i largest_finite = _mm256_set1_epi32(static_cast<int32_t>(kInfinityKey) - 1);
  const __m256i first_index = _mm256_set1_epi32(a.first_index);
  EmitResult result;
  EmitProgress at{.ties = a.ties};
  __m256d sent_sq[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
  // A store writes eight lanes, of which those beyond the counter are garbage: there must be room for them.
  while (at.candidate + kLanes <= a.count && at.out + kLanes <= a.selected) {
    const __m256 value = _mm256_loadu_ps(a.values + at.candidate);
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a.indices + at.candidate));
    const __m256i key = _mm256_and_si256(_mm256_castps_si256(value), magnitude_mask);
    const __m256i odd = _mm256_or_si256(_mm256_cmpeq_epi32(key, threshold), _mm256_cmpgt_epi32(key, largest_finite));
    if (!_mm256_testz_si256(odd, odd)) [[unlikely]] {
      emit_scalar(a, at.candidate + kLanes, at, result.sent_sq);
      continue;
    }
    const __m256 selected = _mm256_castsi256_ps(_mm256_cmpgt_epi32(key, threshold));
    const auto mask = static_cast<unsigned>(_mm256_movemask_ps(selected));
    const __m256 sent = _mm256_and_ps(selected, value);
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(sent)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(sent, 1));
    sent_sq[0] = _mm256_add_pd(sent_sq[0], _mm256_mul_pd(low, low));
    sent_sq[1] = _mm256_add_pd(sent_sq[1], _mm256_mul_pd(high, high));
    const __m256i front = pack_lanes(mask), back = pack_lanes(~mask & 0xffu);
    _mm256_storeu_ps(a.out_values + at.out, _mm256_permutevar8x32_ps(value, front));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.out_indices + at.out),
                        _mm256_permutevar8x32_epi32(_mm256_add_epi32(index, first_index), front));
    _mm256_storeu_ps(a.values + at.rejected, _mm256_permutevar8x32_ps(value, back));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.indices + at.rejected), _mm256_permutevar8x32_epi32(index, back));
    const auto count = static_cast<int64_t>(__builtin_popcount(mask));
    at.candidate += kLanes;
    at.out += count;
    at.rejected += kLanes - count;
  }
  emit_scalar(a, a.count, at, result.sent_sq);
  alignas(32) double lane[4];
  _mm256_store_pd(lane, _mm256_add_pd(sent_sq[0], sent_sq[1]));
  result.sent_sq += (lane[0] + lane[1]) + (lane[2] + lane[3]);
  result.rejected_sq = emit_rejected(a, at);
  return result;
}

} // namespace compressed_ddp
