// The filter pass in AVX2: groups of 32 entries; a group without candidates (most, at low density) costs one test.
#include "avx2_pack.h"
#include "compensate_select_filter.h"

namespace compressed_ddp {
namespace {

constexpr int kGroup = 4 * kLanes; // 32 was faster than 16 and 64 at density 0.001 .. 0.01

inline __m256 load_gradient(const float* g) { return _mm256_loadu_ps(g); }
inline __m256 load_gradient(const Float16* g) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g))); }
inline __m256 load_gradient(const BFloat16* g) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g))), 16));
}

// acc - wire_bfloat16(acc) (float_types.h) of finite acc that round to finite numbers.
inline __m256 lost_by_bfloat16(__m256 acc) {
  const __m256i bits = _mm256_castps_si256(acc);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_and_si256(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))),
                                           _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u)));
  return _mm256_sub_ps(acc, _mm256_castsi256_ps(rounded));
}
// Of the larger finite ones, which are cut off.
constexpr int32_t kLargestThatRoundsToFinite = 0x7f7f7fff;
inline __m256 lost_by_cutting_off(__m256 acc) {
  return _mm256_sub_ps(acc, _mm256_and_ps(acc, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(0xffff0000u)))));
}

inline float sum_lanes(__m256 x) {
  alignas(32) float lane[kLanes];
  _mm256_store_ps(lane, x);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

template <typename gradient_t, FilterSource source, Kept kept_of_candidates>
struct Avx2 {
  static FilterResult run(const FilterArguments& a) {
    const auto* gradient = static_cast<const gradient_t*>(a.gradient);
    const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
    const __m256i below_low = _mm256_set1_epi32(static_cast<int32_t>(a.low_key) - 1); // key > low_key - 1; both are non-negative
    const __m256i largest_finite = _mm256_set1_epi32(static_cast<int32_t>(kInfinityKey) - 1);
    // Larger keys take a way of their own.
    const __m256i largest_usual = kept_of_candidates == Kept::kZero ? largest_finite : _mm256_set1_epi32(kLargestThatRoundsToFinite);
    const __m256i lane_index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    FilterResult result;
    __m256 gradient_sq[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 residual_sq[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + kGroup <= a.numel; i += kGroup) {
      __m256 old[4], acc[4];
      __m256i key[4], candidate[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * kLanes;
        if constexpr (source == FilterSource::kResidual) {
          old[j] = acc[j] = _mm256_loadu_ps(a.residual + at);
        } else {
          const __m256 g = load_gradient(gradient + at);
          gradient_sq[j & 1] = _mm256_add_ps(gradient_sq[j & 1], _mm256_mul_ps(g, g));
          acc[j] = g;
          if constexpr (source == FilterSource::kCompensate) {
            old[j] = _mm256_loadu_ps(a.residual + at);
            acc[j] = _mm256_add_ps(g, old[j]);
          }
        }
        key[j] = _mm256_and_si256(_mm256_castps_si256(acc[j]), magnitude_mask);
        candidate[j] = _mm256_cmpgt_epi32(key[j], below_low);
      }
      const __m256i any = _mm256_or_si256(_mm256_or_si256(candidate[0], candidate[1]), _mm256_or_si256(candidate[2], candidate[3]));
      if (_mm256_testz_si256(any, any)) {
        for (int j = 0; j < 4; ++j) {
          if constexpr (source == FilterSource::kCompensate) _mm256_storeu_ps(a.residual + i + j * kLanes, acc[j]);
          residual_sq[j & 1] = _mm256_add_ps(residual_sq[j & 1], _mm256_mul_ps(acc[j], acc[j]));
        }
        continue;
      }
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * kLanes;
        const auto mask = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(candidate[j])));
        __m256 kept = _mm256_andnot_ps(_mm256_castsi256_ps(candidate[j]), acc[j]);
        residual_sq[j & 1] = _mm256_add_ps(residual_sq[j & 1], _mm256_mul_ps(kept, kept));
        if constexpr (kept_of_candidates == Kept::kLostByBFloat16)
          kept = _mm256_blendv_ps(kept, lost_by_bfloat16(acc[j]), _mm256_castsi256_ps(candidate[j]));
        const __m256i unusual = _mm256_cmpgt_epi32(key[j], largest_usual);
        if (!_mm256_testz_si256(unusual, unusual)) [[unlikely]] {
          if constexpr (kept_of_candidates == Kept::kLostByBFloat16)
            kept = _mm256_blendv_ps(kept, lost_by_cutting_off(acc[j]), _mm256_castsi256_ps(_mm256_and_si256(unusual, candidate[j])));
          const __m256i non_finite = _mm256_cmpgt_epi32(key[j], largest_finite);
          result.non_finite += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(non_finite))));
          if constexpr (source != FilterSource::kGradient) kept = _mm256_blendv_ps(kept, old[j], _mm256_castsi256_ps(non_finite));
        }
        if constexpr (source != FilterSource::kGradient) _mm256_storeu_ps(a.residual + at, kept);
        const __m256i pack = pack_lanes(mask);
        const __m256i index = _mm256_add_epi32(lane_index, _mm256_set1_epi32(static_cast<int32_t>(at)));
        _mm256_storeu_ps(a.values + result.count, _mm256_permutevar8x32_ps(acc[j], pack));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.indices + result.count), _mm256_permutevar8x32_epi32(index, pack));
        result.count += __builtin_popcount(mask);
      }
    }
    result.gradient_sq = sum_lanes(_mm256_add_ps(gradient_sq[0], gradient_sq[1]));
    result.residual_sq = sum_lanes(_mm256_add_ps(residual_sq[0], residual_sq[1]));
    filter_scalar<gradient_t, source, kept_of_candidates>(a, i, result);
    return result;
  }
};

} // namespace

const FilterKernels kAvx2Filter = make_filter_kernels<Avx2>("avx2");

} // namespace compressed_ddp
