#include "float_formats.h"

namespace simt::ptx {

uint64_t rounded(const FloatFormat& format, bool negative, uint64_t significand, int exponent, bool inexact, Rounding rounding) {
  const uint64_t sign = negative ? format.sign() : 0;
  const bool away = rounding == (negative ? Rounding::kDown : Rounding::kUp);
  if (significand == 0) return sign | (inexact && away ? 1 : 0);
  const int value_exponent = exponent + 63 - std::countl_zero(significand);
  if (value_exponent > format.max_exponent) {
    const bool to_infinity = away || rounding == Rounding::kNearestEven;
    return sign | (format.infinity() - (to_infinity ? 0 : 1));
  }
  const int field_exponent = value_exponent > format.min_exponent ? value_exponent : format.min_exponent;
  const int shift = field_exponent - format.fraction_bits - exponent; // that many low bits are rounded away
  uint64_t kept = 0;
  bool half = false, rest = inexact; // the first bit that is lost, and whether any behind it
  if (shift <= 0) {
    kept = significand << -shift;
  } else if (shift <= 64) {
    kept = shift == 64 ? 0 : significand >> shift;
    half = (significand >> (shift - 1) & 1) != 0;
    rest = rest || (significand & ((uint64_t{1} << (shift - 1)) - 1)) != 0;
  } else {
    rest = true;
  }
  const bool up = rounding == Rounding::kNearestEven ? half && (rest || (kept & 1) != 0) : away && (half || rest);
  // The leading bit of `kept` adds one to the exponent field, and so does a carry out of the fraction: both by themselves.
  return sign | ((static_cast<uint64_t>(field_exponent - format.min_exponent) << format.fraction_bits) + kept + (up ? 1 : 0));
}

uint64_t rounded(const FloatFormat& format, double value, Rounding rounding) {
  const auto bits = std::bit_cast<uint64_t>(value);
  const bool negative = bits >> 63 != 0;
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  const auto exponent = static_cast<int>(bits >> 52 & 0x7ff);
  if (exponent == 0x7ff) return fraction != 0 ? format.canonical_nan() : (negative ? format.sign() : 0) | format.infinity();
  if (exponent == 0) return rounded(format, negative, fraction, -1074, false, rounding);
  return rounded(format, negative, fraction | uint64_t{1} << 52, exponent - 1075, false, rounding);
}

double value_of(const FloatFormat& format, uint64_t bits) {
  const uint64_t magnitude = format.magnitude(bits);
  const uint64_t sign = (bits & format.sign()) != 0 ? uint64_t{1} << 63 : 0;
  const uint64_t fraction = magnitude & ((uint64_t{1} << format.fraction_bits) - 1);
  const auto exponent = static_cast<int64_t>(magnitude >> format.fraction_bits);
  uint64_t result = 0;
  if (magnitude >= format.infinity()) {
    result = 0x7ff0000000000000 | fraction << (52 - format.fraction_bits);
  } else if (exponent != 0) {
    result = static_cast<uint64_t>(exponent - 1 + format.min_exponent + 1023) << 52 | fraction << (52 - format.fraction_bits);
  } else {
    result = std::bit_cast<uint64_t>(std::ldexp(static_cast<double>(fraction), format.min_exponent - format.fraction_bits));
  }
  return std::bit_cast<double>(sign | result);
}

double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  // Knuth's TwoSum: `lost` is exactly what `sum` lacks.
  const double b_part = sum - a;
  const double lost = (a - (sum - b_part)) + (b - b_part);
  auto bits = std::bit_cast<uint64_t>(sum);
  if (lost == 0 || (bits & 1) != 0) return sum;
  // The neighbours of an even significand are odd: take the one on the side of what was lost.
  bits += (lost > 0) == (sum > 0) ? 1 : static_cast<uint64_t>(-1);
  return std::bit_cast<double>(bits);
}

} // namespace simt::ptx
