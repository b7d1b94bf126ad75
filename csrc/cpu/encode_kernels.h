// The loops of encode over one piece of the entries, once in portable C++ and once in AVX2; both write the same bytes and return the same
// sums, bit for bit.
//
// Sums are taken in eight lanes, value i in lane i % 8, and added as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "float_types.h"

namespace compressed_ddp {

// Magnitudes added as whole numbers, one sum per exponent: parts of a group may be added in any order.
using ExponentSums = std::array<uint64_t, 256>;

struct HighWord {
  int64_t at;
  uint64_t bits;
};
struct PieceEnds {
  HighWord first, last; // may be the same
};

struct EncodeKernels {
  // Gathers the bits (index >> 8) + entry of entries [begin, end), at least one. Writes the words between the first and the last, which
  // nobody else writes; returns these two.
  PieceEnds (*high_bits)(const int32_t* indices, int64_t begin, int64_t end, uint64_t* words);
  // wire_bfloat16 of each value. lost[i] = value - decoded, 0 where the value is not finite; nullptr: not wanted. Returns the sum of
  // lost^2.
  double (*bfloat16)(const float* values, int64_t count, uint16_t* coded, float* lost);
  // Bit i % 32 of words[i / 32]: value i is negative and no NaN.
  void (*signs)(const float* values, int64_t count, uint32_t* words);
  // lost[i] and its sum as above, of values that are decoded as `scale` with their sign.
  double (*lost_by_signs)(const float* values, int64_t count, float scale, float* lost);
  // sums[e] += the significands, as whole numbers, of the values with the biased exponent e, Inf and NaN (255) among them.
  void (*add_magnitudes)(const float* values, int64_t count, ExponentSums& sums);
};

extern const EncodeKernels kPortableEncode;
#if COMPRESSED_DDP_X86
extern const EncodeKernels kAvx2Encode;
#endif

// The widest kernels that this processor runs; decided once per process.
const EncodeKernels& best_encode();

// ---- shared by the kernels. Static, so that each object has its own: an AVX object's copy must not serve the others.

constexpr int kSumLanes = 8;

static inline double sum_of_lanes(const double* lane) {
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

static inline float lost_of(float value, float decoded) {
  const float difference = value - decoded;
  return is_finite_key(selection_key(value)) ? difference : 0.0f;
}

static inline float scale_with_sign_of(float scale, float value) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scale) ^ (std::bit_cast<uint32_t>(value) & 0x80000000u));
}

static inline void add_magnitude(float value, ExponentSums& sums) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t exponent = bits >> 23 & 0xffu;
  sums[exponent] += (bits & 0x7fffffu) | static_cast<uint32_t>(exponent != 0) << 23;
}

static inline int64_t high_bit(int32_t index, int64_t entry) { return (static_cast<uint32_t>(index) >> 8) + entry; }

struct HighBits { // the word that is being gathered
  uint64_t* words;
  int64_t first; // word
  int64_t at;
  uint64_t word = 0;
  uint64_t first_word = 0;
};

static inline void put_high_bit(HighBits& high, int64_t bit) {
  if (bit / 64 != high.at) {
    (high.at == high.first ? high.first_word : high.words[high.at]) = high.word;
    high.at = bit / 64;
    high.word = 0;
  }
  high.word |= uint64_t{1} << (bit % 64);
}

static inline PieceEnds ends_of(const HighBits& high) {
  return {{high.first, high.at == high.first ? high.word : high.first_word}, {high.at, high.word}};
}

// Values [begin, count), into the lanes of the caller.
static inline void bfloat16_scalar(const float* values, int64_t begin, int64_t count, uint16_t* coded, float* lost, double* lane) {
  for (int64_t i = begin; i < count; ++i) {
    coded[i] = wire_bfloat16(values[i]);
    const float difference = lost_of(values[i], to_float(BFloat16{coded[i]}));
    if (lost != nullptr) lost[i] = difference;
    lane[i % kSumLanes] += static_cast<double>(difference) * difference;
  }
}

static inline void signs_scalar(const float* values, int64_t begin, int64_t count, uint32_t* words) {
  for (int64_t i = begin; i < count; ++i) {
    if (i % 32 == 0) words[i / 32] = 0;
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    words[i / 32] |= static_cast<uint32_t>((bits & 0x7fffffffu) <= kInfinityKey) << (i % 32) & (bits >> 31) << (i % 32);
  }
}

static inline void lost_by_signs_scalar(const float* values, int64_t begin, int64_t count, float scale, float* lost, double* lane) {
  for (int64_t i = begin; i < count; ++i) {
    lost[i] = lost_of(values[i], scale_with_sign_of(scale, values[i]));
    lane[i % kSumLanes] += static_cast<double>(lost[i]) * lost[i];
  }
}

} // namespace compressed_ddp
