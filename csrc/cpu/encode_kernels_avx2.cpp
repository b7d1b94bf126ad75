// The loops of encode in AVX2, eight entries at a time.
#include <immintrin.h>

#include <algorithm>

#include "encode_kernels.h"

namespace compressed_ddp {
namespace {

constexpr int kLanes = 8;

inline uint64_t or_of_lanes(__m256i x) {
  const __m128i two = _mm_or_si128(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_or_si128(two, _mm_unpackhi_epi64(two, two))));
}

// Eight entries at a time set their bits in four partial words, also where they go on into the next word. Where they are farther apart,
// they go one by one.
PieceEnds high_bits(const int32_t* indices, int64_t begin, int64_t end, uint64_t* words) {
  const int64_t first = high_bit(indices[begin], begin) / 64;
  HighBits high{words, first, first};
  const __m256i one = _mm256_set1_epi64x(1), largest_bit = _mm256_set1_epi32(63);
  __m256i entries = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(begin)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i partial = _mm256_setzero_si256();
  int64_t e = begin;
  for (; e + kLanes <= end; e += kLanes, entries = _mm256_add_epi32(entries, _mm256_set1_epi32(kLanes))) {
    const int64_t last_bit = high_bit(indices[e + kLanes - 1], e + kLanes - 1);
    if (last_bit / 64 > high.at + 1) {
      high.word |= or_of_lanes(partial);
      partial = _mm256_setzero_si256();
      for (int64_t i = e; i < e + kLanes; ++i) put_high_bit(high, high_bit(indices[i], i));
      continue;
    }
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + e));
    const __m256i bit = _mm256_sub_epi32(_mm256_add_epi32(_mm256_srli_epi32(index, 8), entries), // from the gathered word's begin
                                         _mm256_set1_epi32(static_cast<int32_t>(64 * high.at)));
    const __m256i in_word = _mm256_and_si256(bit, largest_bit);
    const __m256i low = _mm256_sllv_epi64(one, _mm256_cvtepu32_epi64(_mm256_castsi256_si128(in_word)));
    const __m256i up = _mm256_sllv_epi64(one, _mm256_cvtepu32_epi64(_mm256_extracti128_si256(in_word, 1)));
    if (last_bit / 64 == high.at) {
      partial = _mm256_or_si256(partial, _mm256_or_si256(low, up));
      continue;
    }
    const __m256i next = _mm256_cmpgt_epi32(bit, largest_bit);
    const __m256i low_next = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(next));
    const __m256i up_next = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(next, 1));
    const __m256i here = _mm256_or_si256(_mm256_andnot_si256(low_next, low), _mm256_andnot_si256(up_next, up));
    high.word |= or_of_lanes(_mm256_or_si256(partial, here));
    put_high_bit(high, last_bit); // begins the next word
    partial = _mm256_or_si256(_mm256_and_si256(low_next, low), _mm256_and_si256(up_next, up));
  }
  high.word |= or_of_lanes(partial);
  for (; e < end; ++e) put_high_bit(high, high_bit(indices[e], e));
  return ends_of(high);
}

struct Squares { // lanes 0 .. 3 and 4 .. 7
  __m256d low = _mm256_setzero_pd(), up = _mm256_setzero_pd();
};

inline void add_squares(Squares& sums, __m256 x) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), up = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  sums.low = _mm256_add_pd(sums.low, _mm256_mul_pd(low, low));
  sums.up = _mm256_add_pd(sums.up, _mm256_mul_pd(up, up));
}

inline void store_lanes(const Squares& sums, double* lane) {
  _mm256_store_pd(lane, sums.low);
  _mm256_store_pd(lane + 4, sums.up);
}

inline __m256i magnitude_of(__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)); }

// value - decoded, 0 where the value is not finite.
inline __m256 lost_by(__m256 value, __m256 decoded) {
  const __m256i finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(kInfinityKey)), magnitude_of(value));
  return _mm256_and_ps(_mm256_castsi256_ps(finite), _mm256_sub_ps(value, decoded));
}

// wire_bfloat16 (float_types.h), in the upper half of each lane; the lower half is 0.
inline __m256i round_to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value), magnitude = magnitude_of(value);
  const __m256i infinity = _mm256_set1_epi32(static_cast<int32_t>(kInfinityKey));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_and_si256(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))),
                                     _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u)));
  const __m256i is_infinite = _mm256_cmpeq_epi32(_mm256_and_si256(rounded, _mm256_set1_epi32(0x7fffffff)), infinity);
  const __m256i too_large = _mm256_and_si256(is_infinite, _mm256_cmpgt_epi32(infinity, magnitude));
  rounded = _mm256_sub_epi32(rounded, _mm256_and_si256(too_large, _mm256_set1_epi32(0x10000)));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(static_cast<int32_t>(kCanonicalNanBits)), _mm256_cmpgt_epi32(magnitude, infinity));
}

double bfloat16(const float* values, int64_t count, uint16_t* coded, float* lost) {
  Squares sums;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const __m256 value = _mm256_loadu_ps(values + i);
    const __m256i rounded = round_to_bfloat16(value);
    const __m256 difference = lost_by(value, _mm256_castsi256_ps(rounded));
    add_squares(sums, difference);
    if (lost != nullptr) _mm256_storeu_ps(lost + i, difference);
    const __m256i half = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(coded + i),
                     _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  alignas(32) double lane[kSumLanes];
  store_lanes(sums, lane);
  bfloat16_scalar(values, i, count, coded, lost, lane);
  return sum_of_lanes(lane);
}

void signs(const float* values, int64_t count, uint32_t* words) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    uint32_t word = 0;
    for (int j = 0; j < 32; j += kLanes) {
      const __m256 value = _mm256_loadu_ps(values + i + j);
      const __m256 number = _mm256_cmp_ps(value, value, _CMP_ORD_Q);
      word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_and_ps(value, number))) << j;
    }
    words[i / 32] = word;
  }
  signs_scalar(values, i, count, words);
}

double lost_by_signs(const float* values, int64_t count, float scale, float* lost) {
  const __m256 magnitude = _mm256_set1_ps(scale), sign_mask = _mm256_set1_ps(-0.0f);
  Squares sums;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const __m256 value = _mm256_loadu_ps(values + i);
    const __m256 difference = lost_by(value, _mm256_xor_ps(magnitude, _mm256_and_ps(value, sign_mask)));
    add_squares(sums, difference);
    _mm256_storeu_ps(lost + i, difference);
  }
  alignas(32) double lane[kSumLanes];
  store_lanes(sums, lane);
  lost_by_signs_scalar(values, i, count, scale, lost, lane);
  return sum_of_lanes(lane);
}

// Selected values are the largest, and so they share a few exponents: kBinades sums in registers, the first one below the exponent of
// the first value of a round. Values outside go one by one.
void add_magnitudes(const float* values, int64_t count, ExponentSums& sums) {
  constexpr int kBinades = 4;
  constexpr int64_t kRound = 255 * kLanes; // significands are below 2^24: a lane holds 256
  const __m256i exponent_mask = _mm256_set1_epi32(0xff), fraction_mask = _mm256_set1_epi32(0x7fffff);
  const __m256i implicit_one = _mm256_set1_epi32(0x800000), beyond = _mm256_set1_epi32(~(kBinades - 1)), zero = _mm256_setzero_si256();
  int64_t i = 0;
  while (i + kLanes <= count) {
    const int first = static_cast<int>(std::bit_cast<uint32_t>(values[i]) >> 23 & 0xffu);
    const int base = std::clamp(first - 1, 1, static_cast<int>(sums.size()) - kBinades); // of normal numbers: they have the implicit one
    __m256i lanes[kBinades] = {zero, zero, zero, zero};
    for (const int64_t end = std::min(i + kRound, count); i + kLanes <= end; i += kLanes) {
      const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(values + i));
      const __m256i binade = _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(bits, 23), exponent_mask), _mm256_set1_epi32(base));
      const __m256i significand = _mm256_or_si256(_mm256_and_si256(bits, fraction_mask), implicit_one);
      for (int b = 0; b < kBinades; ++b)
        lanes[b] = _mm256_add_epi32(lanes[b], _mm256_and_si256(significand, _mm256_cmpeq_epi32(binade, _mm256_set1_epi32(b))));
      const __m256i inside = _mm256_cmpeq_epi32(_mm256_and_si256(binade, beyond), zero);
      auto outside = static_cast<unsigned>(~_mm256_movemask_ps(_mm256_castsi256_ps(inside))) & 0xffu;
      for (; outside != 0; outside &= outside - 1) add_magnitude(values[i + std::countr_zero(outside)], sums);
    }
    for (int b = 0; b < kBinades; ++b) {
      alignas(32) uint32_t lane[kLanes];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lane), lanes[b]);
      for (const uint32_t sum : lane) sums[static_cast<size_t>(base + b)] += sum;
    }
  }
  for (; i < count; ++i) add_magnitude(values[i], sums);
}

} // namespace

const EncodeKernels kAvx2Encode = {high_bits, bfloat16, signs, lost_by_signs, add_magnitudes};

} // namespace compressed_ddp
