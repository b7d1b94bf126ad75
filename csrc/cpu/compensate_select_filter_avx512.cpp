// The filter pass in AVX-512: 64 entries at a time; vcompressps packs the candidates.
// Built with SIMDe instead of the compiler's intrinsics (COMPRESSED_DDP_SIMDE) the same source runs, slowly, on any processor:
// that is how its logic is tested where no AVX-512 machine is at hand.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // g++ 12's own avx512fintrin.h starts from an undefined register (GCC bug 105593)
#endif
#if COMPRESSED_DDP_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "compensate_select_filter.h"

namespace compressed_ddp {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4; // per test for "no candidates here"

inline __m512 load_gradient(const float* g) { return _mm512_loadu_ps(g); }
#if COMPRESSED_DDP_SIMDE
// SIMDe 0.7.4 has neither _mm512_cvtph_ps nor _mm512_cvtepu16_epi32: in two halves.
inline __m256 load_half(const Float16* g) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g))); }
inline __m256 load_half(const BFloat16* g) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(g))), 16));
}
template <typename gradient_t>
inline __m512 load_gradient(const gradient_t* g) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(load_half(g)), load_half(g + kLanes / 2), 1);
}
#else
inline __m512 load_gradient(const Float16* g) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(g))); }
inline __m512 load_gradient(const BFloat16* g) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(g))), 16));
}
#endif

// acc - wire_bfloat16(acc) of finite acc (float_types.h).
inline __m512 lost_by_bfloat16(__m512 acc) {
  const __m512i bits = _mm512_castps_si512(acc);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_and_si512(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))),
                                     _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
  const __mmask16 too_large = _mm512_cmpeq_epi32_mask(_mm512_and_si512(rounded, _mm512_set1_epi32(0x7fffffff)),
                                                      _mm512_set1_epi32(static_cast<int32_t>(kInfinityKey)));
  rounded = _mm512_mask_sub_epi32(rounded, too_large, rounded, _mm512_set1_epi32(0x10000));
  return _mm512_sub_ps(acc, _mm512_castsi512_ps(rounded));
}

inline float sum_lanes(__m512 x) {
  alignas(64) float lane[kLanes];
  _mm512_storeu_ps(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

template <typename gradient_t, FilterSource source, Kept kept_of_candidates>
struct Avx512 {
  static FilterResult run(const FilterArguments& a) {
    const auto* gradient = static_cast<const gradient_t*>(a.gradient);
    const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
    const __m512i below_low = _mm512_set1_epi32(static_cast<int32_t>(a.low_key) - 1); // key > low_key - 1; both are non-negative
    const __m512i largest_finite = _mm512_set1_epi32(static_cast<int32_t>(kInfinityKey) - 1);
    const __m512i lane_index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    FilterResult result;
    __m512 gradient_sq[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 residual_sq[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + kVectors * kLanes <= a.numel; i += kVectors * kLanes) {
      __m512 old[kVectors], acc[kVectors];
      __m512i key[kVectors];
      __mmask16 candidate[kVectors];
      unsigned any = 0;
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i + j * kLanes;
        if constexpr (source == FilterSource::kResidual) {
          old[j] = acc[j] = _mm512_loadu_ps(a.residual + at);
        } else {
          const __m512 g = load_gradient(gradient + at);
          gradient_sq[j & 1] = _mm512_add_ps(gradient_sq[j & 1], _mm512_mul_ps(g, g));
          acc[j] = g;
          if constexpr (source == FilterSource::kCompensate) {
            old[j] = _mm512_loadu_ps(a.residual + at);
            acc[j] = _mm512_add_ps(g, old[j]);
          }
        }
        key[j] = _mm512_and_si512(_mm512_castps_si512(acc[j]), magnitude_mask);
        candidate[j] = _mm512_cmpgt_epi32_mask(key[j], below_low);
        any |= candidate[j];
      }
      if (any == 0) {
        for (int j = 0; j < kVectors; ++j) {
          if constexpr (source == FilterSource::kCompensate) _mm512_storeu_ps(a.residual + i + j * kLanes, acc[j]);
          residual_sq[j & 1] = _mm512_add_ps(residual_sq[j & 1], _mm512_mul_ps(acc[j], acc[j]));
        }
        continue;
      }
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i + j * kLanes;
        __m512 kept = _mm512_mask_mov_ps(acc[j], candidate[j], _mm512_setzero_ps());
        residual_sq[j & 1] = _mm512_add_ps(residual_sq[j & 1], _mm512_mul_ps(kept, kept));
        if constexpr (kept_of_candidates == Kept::kLostByBFloat16) kept = _mm512_mask_mov_ps(kept, candidate[j], lost_by_bfloat16(acc[j]));
        const __mmask16 non_finite = _mm512_cmpgt_epi32_mask(key[j], largest_finite);
        if (non_finite != 0) [[unlikely]] {
          result.non_finite += __builtin_popcount(non_finite);
          if constexpr (source != FilterSource::kGradient) kept = _mm512_mask_mov_ps(kept, non_finite, old[j]);
        }
        if constexpr (source != FilterSource::kGradient) _mm512_storeu_ps(a.residual + at, kept);
        // Compress in the register and store whole: a masked compressing store is microcoded on Zen 4.
        const __m512i index = _mm512_add_epi32(lane_index, _mm512_set1_epi32(static_cast<int32_t>(at)));
        _mm512_storeu_ps(a.values + result.count, _mm512_maskz_compress_ps(candidate[j], acc[j]));
        _mm512_storeu_si512(a.indices + result.count, _mm512_maskz_compress_epi32(candidate[j], index));
        result.count += __builtin_popcount(candidate[j]);
      }
    }
    result.gradient_sq = sum_lanes(_mm512_add_ps(gradient_sq[0], gradient_sq[1]));
    result.residual_sq = sum_lanes(_mm512_add_ps(residual_sq[0], residual_sq[1]));
    filter_scalar<gradient_t, source, kept_of_candidates>(a, i, result);
    return result;
  }
};

} // namespace

const FilterKernels kAvx512Filter = make_filter_kernels<Avx512>("avx512");

} // namespace compressed_ddp
