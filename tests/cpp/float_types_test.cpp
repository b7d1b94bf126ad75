#include "cpu/float_types.h"

#include <cmath>

#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::bits_of;
using testing::float_of;
using testing::Random;

// A 16-bit IEEE format by its three numbers. Every reference below works on the value, in double and integers; the
// code under test works on the bits of fp32.
struct Format {
  int mantissa_bits; // without the hidden one
  int min_exponent;  // of normal numbers
  int max_exponent;

  uint16_t infinity() const { return static_cast<uint16_t>((max_exponent - min_exponent + 2) << mantissa_bits); }
};
constexpr Format kFloat16Format{10, -14, 15};
constexpr Format kBFloat16Format{7, -126, 127};

double reference_value(const Format& format, uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  const int magnitude = bits & 0x7fff;
  const int biased_exponent = magnitude >> format.mantissa_bits;
  const int mantissa = magnitude & ((1 << format.mantissa_bits) - 1);
  if (magnitude == format.infinity()) return sign * HUGE_VAL;
  if (magnitude > format.infinity()) return std::nan("");
  if (biased_exponent == 0) return sign * std::ldexp(mantissa, format.min_exponent - format.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << format.mantissa_bits), biased_exponent - 1 + format.min_exponent - format.mantissa_bits);
}

// Round to nearest, ties to even, of a number that is no NaN.
uint16_t reference_bits(const Format& format, float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude == 0) return sign;
  if (std::isinf(magnitude)) return sign | format.infinity();
  const int exponent = std::max(std::ilogb(magnitude), format.min_exponent);
  const double in_units = std::ldexp(magnitude, format.mantissa_bits - exponent); // of the last place: exact in double
  const auto floor = static_cast<int64_t>(in_units);
  const double rest = in_units - static_cast<double>(floor);
  const int64_t rounded = floor + (rest > 0.5 || (rest == 0.5 && floor % 2 == 1) ? 1 : 0);
  // `rounded` carries into the exponent by itself: a mantissa that became 2.0 is 1.0 with the next exponent.
  const int64_t bits = rounded + (static_cast<int64_t>(exponent - format.min_exponent) << format.mantissa_bits);
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, format.infinity()));
}

template <typename gradient_t>
uint16_t rounded_bits(float value) {
  gradient_t out{};
  from_float(value, out);
  return out.bits;
}

template <typename gradient_t>
void expect_every_pattern_reads_as_its_value(const Format& format) {
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const auto bits = static_cast<uint16_t>(pattern);
    const float value = to_float(gradient_t{bits});
    const double expected = reference_value(format, bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << "pattern " << pattern;
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), expected) << "pattern " << pattern;
    ASSERT_EQ(std::signbit(value), std::signbit(expected)) << "pattern " << pattern;
  }
}

template <typename gradient_t>
void expect_every_pattern_survives_a_round_trip(const Format& format) {
  const auto quiet_bit = static_cast<uint16_t>(1 << (format.mantissa_bits - 1));
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const auto bits = static_cast<uint16_t>(pattern);
    const bool is_nan = (bits & 0x7fff) > format.infinity();
    const auto expected = static_cast<uint16_t>(is_nan ? bits | quiet_bit : bits);
    ASSERT_EQ(rounded_bits<gradient_t>(to_float(gradient_t{bits})), expected) << "pattern " << pattern;
  }
}

template <typename gradient_t>
void expect_rounding(const Format& format, float value) {
  const uint16_t bits = rounded_bits<gradient_t>(value);
  if (std::isnan(value)) {
    ASSERT_GT(bits & 0x7fff, format.infinity()) << testing::show_float(value);
    ASSERT_EQ(bits >> 15, bits_of(value) >> 31) << testing::show_float(value);
    return;
  }
  ASSERT_EQ(bits, reference_bits(format, value)) << testing::show_float(value);
}

// All upper halves of an fp32 with those lower halves at which rounding to 16 bits could turn: a tie, beside a tie, the ends.
template <typename gradient_t>
void expect_rounding_at_all_edges(const Format& format) {
  constexpr uint32_t kLowHalves[] = {0x0000, 0x0001, 0x0fff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x2fff, 0x3000, 0x3001,
                                     0x7000, 0x7fff, 0x8000, 0x8001, 0x9000, 0xb000, 0xefff, 0xf000, 0xf001, 0xffff};
  for (uint32_t high = 0; high < 65536; ++high)
    for (const uint32_t low : kLowHalves) {
      expect_rounding<gradient_t>(format, float_of(high << 16 | low));
      if (::testing::Test::HasFatalFailure()) return;
    }
}

// Whole random patterns, and random patterns near a tie of the format.
template <typename gradient_t>
void expect_rounding_of_random_patterns(const Format& format, uint64_t seed) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Random random(seed);
  for (int i = 0; i < 500000; ++i) {
    expect_rounding<gradient_t>(format, float_of(static_cast<uint32_t>(random.bits())));
    const auto bits = static_cast<uint16_t>(random.bits());
    if ((bits & 0x7fff) + 1 < format.infinity()) {
      const float tie = to_float(gradient_t{bits}) / 2 + to_float(gradient_t{static_cast<uint16_t>(bits + 1)}) / 2;
      for (const float value : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 2 * tie)}) expect_rounding<gradient_t>(format, value);
    }
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(Float16, EveryPatternReadsAsItsValue) { expect_every_pattern_reads_as_its_value<Float16>(kFloat16Format); }
TEST(BFloat16, EveryPatternReadsAsItsValue) { expect_every_pattern_reads_as_its_value<BFloat16>(kBFloat16Format); }
TEST(Float16, EveryPatternSurvivesARoundTrip) { expect_every_pattern_survives_a_round_trip<Float16>(kFloat16Format); }
TEST(BFloat16, EveryPatternSurvivesARoundTrip) { expect_every_pattern_survives_a_round_trip<BFloat16>(kBFloat16Format); }
TEST(Float16, RoundsHalfToEvenAtAllEdges) { expect_rounding_at_all_edges<Float16>(kFloat16Format); }
TEST(BFloat16, RoundsHalfToEvenAtAllEdges) { expect_rounding_at_all_edges<BFloat16>(kBFloat16Format); }
TEST(Float16, RoundsRandomPatternsLikeTheReference) { expect_rounding_of_random_patterns<Float16>(kFloat16Format, 2); }
TEST(BFloat16, RoundsRandomPatternsLikeTheReference) { expect_rounding_of_random_patterns<BFloat16>(kBFloat16Format, 3); }

TEST(Float16, RoundsTheKnownLimits) {
  EXPECT_EQ(rounded_bits<Float16>(65504.0f), 0x7bff);
  EXPECT_EQ(rounded_bits<Float16>(std::nextafter(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(rounded_bits<Float16>(65520.0f), 0x7c00) << "halfway to 65536 goes to Inf";
  EXPECT_EQ(rounded_bits<Float16>(-65520.0f), 0xfc00);
  EXPECT_EQ(rounded_bits<Float16>(0x1p-24f), 0x0001);
  EXPECT_EQ(rounded_bits<Float16>(0x1p-25f), 0x0000) << "halfway between 0 and the smallest goes to even";
  EXPECT_EQ(rounded_bits<Float16>(std::nextafter(0x1p-25f, 1.0f)), 0x0001);
  EXPECT_EQ(rounded_bits<Float16>(-0.0f), 0x8000);
}

TEST(BFloat16, RoundsTheKnownLimits) {
  EXPECT_EQ(rounded_bits<BFloat16>(std::numeric_limits<float>::max()), 0x7f80) << "rounds up to Inf";
  EXPECT_EQ(rounded_bits<BFloat16>(float_of(0x7f7f7fff)), 0x7f7f);
  EXPECT_EQ(rounded_bits<BFloat16>(float_of(0x00000001)), 0x0000);
  EXPECT_EQ(rounded_bits<BFloat16>(float_of(0x7f800001)), 0x7fc0) << "a NaN whose upper half looks like Inf stays a NaN";
  EXPECT_EQ(rounded_bits<BFloat16>(float_of(0xff80ffff)), 0xffc0);
}

// ---- the key

TEST(SelectionKey, OrdersByMagnitudeThenInfinityThenNan) {
  const float ascending[] = {
      0.0f,      float_of(1),         float_of(0x007fffff), 0x1p-126f, 1.0f, std::nextafter(1.0f, 2.0f), std::numeric_limits<float>::max(),
      HUGE_VALF, float_of(0x7fc00000)};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) EXPECT_LT(selection_key(ascending[i]), selection_key(ascending[i + 1])) << i;
  for (const float value : ascending) EXPECT_EQ(selection_key(value), selection_key(-value)) << testing::show_float(value);
}

TEST(SelectionKey, AgreesWithTheOrderOfAbsoluteValues) {
  constexpr uint64_t kSeed = 4;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  for (int i = 0; i < 200000; ++i) {
    const float a = float_of(static_cast<uint32_t>(random.bits()));
    const float b = float_of(static_cast<uint32_t>(random.bits()));
    if (std::isnan(a) || std::isnan(b)) continue;
    ASSERT_EQ(selection_key(a) < selection_key(b), std::fabs(a) < std::fabs(b)) << testing::show_float(a) << ", " << testing::show_float(b);
  }
}

TEST(SelectionKey, IsOneNumberForEveryNan) {
  for (const uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc12345u, 0xffffffffu})
    EXPECT_EQ(selection_key(float_of(bits)), kNanKey) << bits;
}

TEST(SelectionKey, TellsFiniteFromNonFinite) {
  EXPECT_TRUE(is_finite_key(selection_key(0.0f)));
  EXPECT_TRUE(is_finite_key(selection_key(-std::numeric_limits<float>::max())));
  EXPECT_FALSE(is_finite_key(selection_key(-HUGE_VALF)));
  EXPECT_FALSE(is_finite_key(selection_key(float_of(kCanonicalNanBits))));
}

} // namespace
} // namespace compressed_ddp
