// Binary floating point formats narrower than double, rounded in one step in each of the four directions.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace simt::ptx {

enum class Rounding : uint8_t { kNearestEven, kTowardZero, kDown, kUp };

struct FloatFormat {
  int fraction_bits;
  int min_exponent, max_exponent; // of normal numbers
  int total_bits;

  constexpr uint64_t sign() const { return uint64_t{1} << (total_bits - 1); }
  constexpr uint64_t infinity() const { return uint64_t(max_exponent - min_exponent + 2) << fraction_bits; }
  constexpr uint64_t magnitude(uint64_t bits) const { return bits & (sign() - 1); }
  constexpr uint64_t canonical_nan() const { return sign() - 1; } // 0x7fff, 0x7fffffff
  constexpr bool is_nan(uint64_t bits) const { return magnitude(bits) > infinity(); }
  constexpr bool is_subnormal(uint64_t bits) const { return magnitude(bits) != 0 && magnitude(bits) < (uint64_t{1} << fraction_bits); }
  // Subnormal numbers become zeros of their sign.
  constexpr uint64_t flushed(uint64_t bits) const { return is_subnormal(bits) ? bits & sign() : bits; }
};
inline constexpr FloatFormat kFloat16{10, -14, 15, 16};
inline constexpr FloatFormat kBFloat16{7, -126, 127, 16};
inline constexpr FloatFormat kFloat32{23, -126, 127, 32};

// The number (-1)^negative * significand * 2^exponent, and a little more in magnitude if `inexact`.
uint64_t rounded(const FloatFormat& format, bool negative, uint64_t significand, int exponent, bool inexact, Rounding rounding);
// NaN becomes the canonical one.
uint64_t rounded(const FloatFormat& format, double value, Rounding rounding);
// Exact; a NaN stays one.
double value_of(const FloatFormat& format, uint64_t bits);

// a + b, rounded to odd: rounding this once more to a format with at most 51 bits gives what rounding the exact sum would.
double add_to_odd(double a, double b);

} // namespace simt::ptx
