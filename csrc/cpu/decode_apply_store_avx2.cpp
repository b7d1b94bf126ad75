// Sixteen entries at a time. What lies before the first aligned address (where stores go past the caches) and behind the last sixteen is
// computed in a piece of its own, so that nothing here calls a scalar function that another object might then share.
#include <immintrin.h>

#include <cstring>
#include <iterator>

#include "decode_apply_store.h"

namespace compressed_ddp {
namespace {

constexpr int64_t kPiece = 16;
constexpr uintptr_t kAlignment = 32; // bytes, of a streamed store

// Results of one piece, as they lie in memory.
template <typename gradient_t>
struct Piece {
  __m256i bits[kPiece * sizeof(gradient_t) / 32];
};

// 0 or NaN of every result so far. Two, so that an addition need not wait for the one just before.
struct Zeros {
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
};
inline void add_zero(__m256& zeros, __m256 result) { zeros = _mm256_add_ps(zeros, _mm256_mul_ps(result, _mm256_setzero_ps())); }

// Rounds the two halves of a piece.
inline Piece<float> round(__m256 low, __m256 high, Zeros& zeros, float) {
  add_zero(zeros.low, low);
  add_zero(zeros.high, high);
  return {{_mm256_castps_si256(low), _mm256_castps_si256(high)}};
}

// As the hardware does: to nearest, ties to even; a NaN keeps the upper bits of its payload and becomes quiet.
inline Piece<Float16> round(__m256 low, __m256 high, Zeros& zeros, Float16) {
  const auto half = [](__m256 value, __m256& zero) {
    const __m128i rounded = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    add_zero(zero, _mm256_cvtph_ps(rounded));
    return rounded;
  };
  return {{_mm256_inserti128_si256(_mm256_castsi128_si256(half(low, zeros.low)), half(high, zeros.high), 1)}};
}

inline Piece<BFloat16> round(__m256 low, __m256 high, Zeros& zeros, BFloat16) {
  const auto half = [](__m256 value, __m256& zero) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, is_nan), 16);
    add_zero(zero, _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16)));
    return upper;
  };
  // Low and high by turns, 64 bits of each.
  const __m256i packed = _mm256_packus_epi32(half(low, zeros.low), half(high, zeros.high));
  return {{_mm256_permute4x64_epi64(packed, 0b11'01'10'00)}};
}

template <typename gradient_t>
class Tile {
 public:
  Tile(float* sums, float scale, gradient_t* out) : sums_(sums), out_(out), factor_(_mm256_set1_ps(scale)) {}

  // `put` stores 32 bytes.
  template <typename Put>
  void store_piece(int64_t at, Put&& put) {
    const Piece<gradient_t> piece = take(sums_ + at);
    for (size_t v = 0; v < std::size(piece.bits); ++v) put(reinterpret_cast<__m256i*>(out_ + at) + v, piece.bits[v]);
  }
  void store_part(int64_t begin, int64_t end) { // fewer than kPiece
    if (begin == end) return;
    const size_t count = static_cast<size_t>(end - begin);
    alignas(32) float sums[kPiece] = {};
    std::memcpy(sums, sums_ + begin, count * sizeof(float));
    std::memset(sums_ + begin, 0, count * sizeof(float));
    const Piece<gradient_t> piece = take(sums);
    std::memcpy(out_ + begin, piece.bits, count * sizeof(gradient_t));
  }
  float zero() const {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, _mm256_add_ps(zeros_.low, zeros_.high));
    float sum = 0;
    for (const float value : lane) sum += value;
    return sum;
  }

 private:
  Piece<gradient_t> take(float* sums) {
    const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(sums), factor_), high = _mm256_mul_ps(_mm256_loadu_ps(sums + 8), factor_);
    _mm256_storeu_ps(sums, _mm256_setzero_ps());
    _mm256_storeu_ps(sums + 8, _mm256_setzero_ps());
    return round(low, high, zeros_, gradient_t{});
  }

  float* sums_;
  gradient_t* out_;
  __m256 factor_;
  Zeros zeros_;
};

template <typename gradient_t>
float store(float* sums, int64_t numel, float scale, gradient_t* out, bool stream) {
  Tile<gradient_t> tile(sums, scale, out);
  int64_t i = 0;
  const bool can_align = reinterpret_cast<uintptr_t>(out) % sizeof(gradient_t) == 0; // else no entry begins at an aligned address
  if (stream && can_align) {
    const uintptr_t behind = (kAlignment - reinterpret_cast<uintptr_t>(out) % kAlignment) % kAlignment;
    i = static_cast<int64_t>(behind / sizeof(gradient_t));
    if (i > numel) i = numel;
    tile.store_part(0, i);
    for (; i + kPiece <= numel; i += kPiece) tile.store_piece(i, [](__m256i* to, __m256i bits) { _mm256_stream_si256(to, bits); });
  } else {
    for (; i + kPiece <= numel; i += kPiece) tile.store_piece(i, [](__m256i* to, __m256i bits) { _mm256_storeu_si256(to, bits); });
  }
  tile.store_part(i, numel);
  return tile.zero();
}

} // namespace

const StoreKernels kAvx2Store = {store<float>, store<Float16>, store<BFloat16>};

} // namespace compressed_ddp
