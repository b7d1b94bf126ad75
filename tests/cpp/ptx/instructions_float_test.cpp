#include "instruction_testing.h"

#include <cmath>
#include <random>

#include "float_formats.h"

namespace simt::ptx::testing {
namespace {

constexpr float kTiny = 1e-40f; // subnormal
constexpr float kUlp = 0x1p-23f;

TEST(FloatInstructions, NanResultsAreCanonical) {
  expect({
      {"add.f32 %r0, %r1, %r2;", {f(kInfinity), f(-kInfinity)}, kCanonicalNan},
      {"add.f32 %r0, %r1, %r2;", {kOtherNan, f(1)}, kCanonicalNan},
      {"sub.f32 %r0, %r1, %r2;", {f(1), kSignalingNan}, kCanonicalNan},
      {"mul.f32 %r0, %r1, %r2;", {f(0), f(kInfinity)}, kCanonicalNan},
      {"fma.rn.f32 %r0, %r1, %r2, %r3;", {f(0), f(kInfinity), f(1)}, kCanonicalNan},
      {"div.rn.f32 %r0, %r1, %r2;", {f(0), f(0)}, kCanonicalNan},
      {"sqrt.rn.f32 %r0, %r1;", {f(-1)}, kCanonicalNan},
      {"add.f64 %l0, %l1, %l2;", {d(INFINITY), d(-INFINITY)}, kCanonicalNan64},
      {"mul.rn.f64 %l0, %l1, %l2;", {0xfff8000000000123, d(1)}, kCanonicalNan64},
  });
}

TEST(FloatInstructions, EachRoundsInTheDirectionAskedFor) {
  const uint64_t one = f(1), next = one + 1, half_ulp = f(kUlp / 2), quarter = f(kUlp / 4);
  expect({
      {"add.rn.f32 %r0, %r1, %r2;", {one, quarter}, one},
      {"add.f32 %r0, %r1, %r2;", {one, half_ulp}, one}, // a tie, to even
      {"add.rn.f32 %r0, %r1, %r2;", {next, half_ulp}, next + 1},
      {"add.rz.f32 %r0, %r1, %r2;", {next, half_ulp}, next},
      {"add.rp.f32 %r0, %r1, %r2;", {one, quarter}, next},
      {"add.rm.f32 %r0, %r1, %r2;", {one, quarter}, one},
      {"add.rm.f32 %r0, %r1, %r2;", {f(-1), f(-kUlp / 4)}, f(-1) + 1},
      {"add.rz.f32 %r0, %r1, %r2;", {f(-1), f(-kUlp / 4)}, f(-1)},
      {"sub.rm.f32 %r0, %r1, %r2;", {f(2), f(2)}, f(-0.0f)},
      {"sub.rn.f32 %r0, %r1, %r2;", {f(2), f(2)}, f(0)},
      {"mul.rp.f32 %r0, %r1, %r2;", {next, next}, one + 3},
      {"mul.rz.f32 %r0, %r1, %r2;", {next, next}, one + 2},
      {"div.rp.f32 %r0, %r1, %r2;", {one, f(3)}, f(1.0f / 3)},
      {"div.rm.f32 %r0, %r1, %r2;", {one, f(3)}, f(1.0f / 3) - 1},
      {"rcp.rz.f32 %r0, %r1;", {f(3)}, f(1.0f / 3) - 1},
      {"sqrt.rp.f32 %r0, %r1;", {f(2)}, f(std::sqrt(2.0f)) + (static_cast<double>(std::sqrt(2.0f)) < std::sqrt(2.0) ? 1 : 0)},
      {"mul.rz.f32 %r0, %r1, %r2;", {f(3e38f), f(3e38f)}, f(std::numeric_limits<float>::max())},
      {"mul.rn.f32 %r0, %r1, %r2;", {f(3e38f), f(3e38f)}, f(kInfinity)},
      {"add.rp.f64 %l0, %l1, %l2;", {d(1), d(1e-30)}, d(1) + 1},
      {"fma.rz.f64 %l0, %l1, %l2, %l3;", {d(1), d(1), d(-1e-30)}, d(1) - 1},
      {"fma.rm.f32 %r0, %r1, %r2, %r3;", {one, one, f(-1e-30f)}, one - 1},
      {"rcp.rn.f64 %l0, %l1;", {d(3)}, d(1.0 / 3)},
      {"add.f32 %r0, %r1, %r2;", {one, f(2)}, f(3)}, // no direction is left behind
  });
}

TEST(FloatInstructions, FmaRoundsOnceWhereMultiplyAndAddRoundTwice) {
  const uint64_t a = f(1 + kUlp), c = f(-(1 + 2 * kUlp));
  expect({
      {"fma.rn.f32 %r0, %r1, %r2, %r3;", {a, a, c}, f(kUlp * kUlp)},
      {"mad.rn.f32 %r0, %r1, %r2, %r3;", {a, a, c}, f(kUlp * kUlp)},
      {"mul.rn.f32 %r0, %r1, %r2; add.rn.f32 %r0, %r0, %r3;", {a, a, c}, 0},
      {"fma.rn.f64 %l0, %l1, %l2, %l3;", {d(1 + 0x1p-52), d(1 + 0x1p-52), d(-(1 + 0x1p-51))}, d(0x1p-104)},
  });
}

TEST(FloatInstructions, SubnormalNumbersStayUnlessFlushed) {
  expect({
      {"add.f32 %r0, %r1, %r2;", {f(kTiny), f(0)}, f(kTiny)},
      {"add.ftz.f32 %r0, %r1, %r2;", {f(kTiny), f(0)}, 0},
      {"mul.ftz.f32 %r0, %r1, %r2;", {f(-kTiny), f(1)}, f(-0.0f)},
      {"mul.rn.ftz.f32 %r0, %r1, %r2;", {f(1e-30f), f(-1e-10f)}, f(-0.0f)},
      {"fma.rn.ftz.f32 %r0, %r1, %r2, %r3;", {f(1e30f), f(kTiny), f(1)}, f(1)},
      {"abs.ftz.f32 %r0, %r1;", {f(-kTiny)}, 0},
      {"neg.ftz.f32 %r0, %r1;", {f(kTiny)}, f(-0.0f)},
      {"neg.f32 %r0, %r1;", {f(kTiny)}, f(-kTiny)},
      {"min.ftz.f32 %r0, %r1, %r2;", {f(-kTiny), f(1)}, f(-0.0f)},
      {"rcp.approx.ftz.f32 %r0, %r1;", {f(kTiny)}, f(kInfinity)},
      {"div.full.f32 %r0, %r1, %r2;", {f(1), f(4)}, f(0.25f)},
      {"div.approx.ftz.f32 %r0, %r1, %r2;", {f(kTiny), f(4)}, 0},
  });
}

TEST(FloatInstructions, SaturationClampsToZeroAndOne) {
  expect({
      {"add.sat.f32 %r0, %r1, %r2;", {f(0.75f), f(0.5f)}, f(1)},
      {"add.sat.f32 %r0, %r1, %r2;", {f(0.25f), f(-0.5f)}, 0},
      {"mul.sat.f32 %r0, %r1, %r2;", {f(-0.0f), f(1)}, 0},
      {"fma.rn.sat.f32 %r0, %r1, %r2, %r3;", {kQuietNan, f(1), f(1)}, 0},
      {"mul.ftz.sat.f32 %r0, %r1, %r2;", {f(0.5f), f(0.5f)}, f(0.25f)},
  });
}

TEST(FloatInstructions, MinimumAndMaximumKnowSignedZerosAndNan) {
  expect({
      {"min.f32 %r0, %r1, %r2;", {f(0.0f), f(-0.0f)}, f(-0.0f)},
      {"min.f32 %r0, %r1, %r2;", {f(-0.0f), f(0.0f)}, f(-0.0f)},
      {"max.f32 %r0, %r1, %r2;", {f(-0.0f), f(0.0f)}, 0},
      {"max.f32 %r0, %r1, %r2;", {f(0.0f), f(-0.0f)}, 0},
      {"max.f32 %r0, %r1, %r2;", {kOtherNan, f(1)}, f(1)},
      {"min.f32 %r0, %r1, %r2;", {f(1), kQuietNan}, f(1)},
      {"min.f32 %r0, %r1, %r2;", {kOtherNan, kQuietNan}, kCanonicalNan},
      {"max.NaN.f32 %r0, %r1, %r2;", {f(1), kOtherNan}, kCanonicalNan},
      {"min.f64 %l0, %l1, %l2;", {d(NAN), d(-2)}, d(-2)},
      {"max.xorsign.abs.f32 %r0, %r1, %r2;", {f(-3), f(2)}, f(-3)},
      {"min.xorsign.abs.f32 %r0, %r1, %r2;", {f(-3), f(-2)}, f(2)},
      {"neg.f32 %r0, %r1;", {kQuietNan}, kQuietNan | 0x80000000},
      {"abs.f64 %l0, %l1;", {d(-0.0)}, 0},
      {"copysign.f32 %r0, %r1, %r2;", {f(-1), f(7)}, f(-7)},
  });
}

TEST(FloatInstructions, ApproximationsAreTheNearestNumber) {
  expect({
      {"rcp.approx.f32 %r0, %r1;", {f(3)}, f(1.0f / 3)},
      {"sqrt.approx.f32 %r0, %r1;", {f(2)}, f(std::sqrt(2.0f))},
      {"rsqrt.approx.f32 %r0, %r1;", {f(4)}, f(0.5f)},
      {"rsqrt.approx.f32 %r0, %r1;", {f(0)}, f(kInfinity)},
      {"ex2.approx.f32 %r0, %r1;", {f(-3)}, f(0.125f)},
      {"ex2.approx.ftz.f32 %r0, %r1;", {f(-140)}, 0},
      {"lg2.approx.f32 %r0, %r1;", {f(8)}, f(3)},
      {"lg2.approx.f32 %r0, %r1;", {f(-1)}, kCanonicalNan},
      {"sin.approx.f32 %r0, %r1;", {f(0)}, f(0)},
      {"cos.approx.f32 %r0, %r1;", {f(0)}, f(1)},
      {"tanh.approx.f32 %r0, %r1;", {f(kInfinity)}, f(1)},
      {"rcp.approx.ftz.f64 %l0, %l1;", {d(3)}, d(1.0 / 3) & 0xffffffff00000000},
  });
}

TEST(HalfInstructions, RoundOnceAndGiveCanonicalNan) {
  constexpr uint64_t kOne = 0x3c00, kBOne = 0x3f80, kNan = 0x7fff;
  expect({
      {"add.f16 %h0, %h1, %h2;", {kOne, 0x1000}, kOne},            // 1 + 2^-11: a tie, to even
      {"add.rn.f16 %h0, %h1, %h2;", {kOne + 1, 0x1000}, kOne + 2}, // the same from an odd number
      {"add.f16 %h0, %h1, %h2;", {kOne, 0x1001}, kOne + 1},
      {"sub.f16 %h0, %h1, %h2;", {kOne, kOne}, 0},
      {"mul.f16 %h0, %h1, %h2;", {0x7bff, 0x7bff}, 0x7c00},
      {"mul.f16 %h0, %h1, %h2;", {0x0001, 0x3800}, 0}, // half of the smallest: a tie, to zero
      {"mul.ftz.f16 %h0, %h1, %h2;", {0x03ff, kOne}, 0},
      {"add.f16 %h0, %h1, %h2;", {0x7c00, 0xfc00}, kNan},
      {"add.sat.f16 %h0, %h1, %h2;", {kOne, kOne}, kOne},
      {"fma.rn.f16 %h0, %h1, %h2, %h3;", {kOne + 1, kOne + 1, 0xbc02}, 0x0010}, // 2^-20 survives
      {"fma.rn.relu.f16 %h0, %h1, %h2, %h3;", {kOne, 0xbc00, 0}, 0},
      {"fma.rn.f16 %h0, %h1, %h2, %h3;", {kOne, 0x1000, kOne}, kOne},
      {"fma.rn.f16 %h0, %h1, %h2, %h3;", {0x1000, kOne + 1, kOne}, kOne + 1}, // just above the tie
      {"fma.rn.f16 %h0, %h1, %h2, %h3;", {0x0001, 0x0001, kOne}, kOne},
      {"add.f16x2 %r0, %r1, %r2;", {0x3c003c00, 0x7e003c00}, 0x7fff4000},
      {"fma.rn.bf16 %h0, %h1, %h2, %h3;", {kBOne, kBOne, kBOne}, 0x4000},
      {"fma.rn.bf16 %h0, %h1, %h2, %h3;", {kBOne, 0x3b80, kBOne}, kBOne}, // 1 + 2^-8: a tie
      {"fma.rn.bf16 %h0, %h1, %h2, %h3;", {0x0001, 0x3f00, 0}, 0},
      {"fma.rn.bf16x2 %r0, %r1, %r2, %r3;", {0x3f803f80, 0x40004000, 0xffc03f80}, 0x7fff4040},
      {"add.rn.bf16 %h0, %h1, %h2;", {0x7f7f, 0x7f7f}, 0x7f80},
      {"mul.bf16 %h0, %h1, %h2;", {0x0080, 0x3f00}, 0x0040}, // subnormal results stay
      {"min.f16 %h0, %h1, %h2;", {0x8000, 0x0000}, 0x8000},
      {"max.f16 %h0, %h1, %h2;", {0xfe00, 0x8000}, 0x8000},
      {"max.NaN.f16 %h0, %h1, %h2;", {0xfe00, 0x8000}, kNan},
      {"max.bf16x2 %r0, %r1, %r2;", {0xc000bf80, 0xbf80c000}, 0xbf80bf80},
      {"neg.f16 %h0, %h1;", {kOne}, 0xbc00},
      {"abs.bf16x2 %r0, %r1;", {0xbf80ffff}, 0x3f807fff},
      {"neg.bf16 %h0, %h1;", {0}, 0x8000},
  });
}

// Rounding a sum of two random halves in long double, which holds it exactly, must give what the instruction gives.
TEST(HalfInstructions, AgreeWithExactSumsOfRandomNumbers) {
  std::mt19937_64 engine(5);
  const std::string text = ptx_around("fma.rn.f16 %h0, %h1, %h2, %h3;", 3);
  const Program program = Program::from_ptx(text, "test");
  for (int i = 0; i < 3000; ++i) {
    uint64_t bits[3];
    for (uint64_t& b : bits) {
      b = engine() & 0xffff;
      if (kFloat16.magnitude(b) >= kFloat16.infinity()) b ^= 0x4000;
    }
    const long double exact =
        static_cast<long double>(value_of(kFloat16, bits[0])) * value_of(kFloat16, bits[1]) + value_of(kFloat16, bits[2]);
    if (exact == 0) continue;
    int exponent = 0;
    const auto significand = static_cast<uint64_t>(std::ldexp(std::frexp(std::fabs(exact), &exponent), 64));
    const uint64_t expected = rounded(kFloat16, exact < 0, significand, exponent - 64, false, Rounding::kNearestEven);
    const DeviceArray<uint64_t> in(std::vector<uint64_t>(bits, bits + 3)), out(std::vector<uint64_t>(7, 0));
    launch(program, "k", {{1}, {1}}, LaunchOptions{}, in, out);
    ASSERT_EQ(out[0], expected) << std::hex << bits[0] << " " << bits[1] << " " << bits[2];
  }
}

} // namespace
} // namespace simt::ptx::testing
