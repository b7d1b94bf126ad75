#include "instruction_testing.h"

#include <cmath>
#include <random>

#include "float_formats.h"

namespace simt::ptx::testing {
namespace {

constexpr uint64_t kOnes32 = 0xffffffff, kMin32 = 0x80000000, kMax32 = 0x7fffffff;
constexpr uint64_t kMin64 = 0x8000000000000000, kOnes64 = ~uint64_t{0};

TEST(Convert, IntegersExtendTruncateAndSaturate) {
  expect({
      {"cvt.s64.s32 %l0, %r1;", {kOnes32}, kOnes64},
      {"cvt.u64.u32 %l0, %r1;", {kOnes32}, kOnes32},
      {"cvt.s32.s8 %r0, %r1;", {0x80}, 0xffffff80},
      {"cvt.u32.u8 %r0, %r1;", {0x180}, 0x80},
      {"cvt.u16.u32 %h0, %r1;", {0x12345678}, 0x5678},
      {"cvt.s16.s8 %h0, %r1;", {0x80}, 0xff80},
      {"cvt.s8.s32 %r0, %r1;", {0x1ff}, kOnes32}, // a narrow result is extended to its register
      {"cvt.u8.u32 %r0, %r1;", {0x1ff}, 0xff},
      {"cvt.sat.u8.s32 %r0, %r1;", {kOnes32}, 0},
      {"cvt.sat.u8.s32 %r0, %r1;", {300}, 255},
      {"cvt.sat.s8.s32 %r0, %r1;", {300}, 127},
      {"cvt.sat.s32.u32 %r0, %r1;", {kOnes32}, kMax32},
      {"cvt.sat.u32.s64 %r0, %l1;", {kOnes64}, 0},
      {"cvt.sat.s16.s64 %h0, %l1;", {kMin64}, 0x8000},
  });
}

TEST(Convert, FloatsToIntegersRoundAsAskedAndClamp) {
  expect({
      {"cvt.rni.s32.f32 %r0, %r1;", {f(2.5f)}, 2},
      {"cvt.rni.s32.f32 %r0, %r1;", {f(3.5f)}, 4},
      {"cvt.rzi.s32.f32 %r0, %r1;", {f(-2.7f)}, uint32_t(-2)},
      {"cvt.rmi.s32.f32 %r0, %r1;", {f(-2.1f)}, uint32_t(-3)},
      {"cvt.rpi.s32.f32 %r0, %r1;", {f(2.1f)}, 3},
      {"cvt.rzi.s32.f32 %r0, %r1;", {f(3e9f)}, kMax32},
      {"cvt.rzi.s32.f32 %r0, %r1;", {f(-3e9f)}, kMin32},
      {"cvt.rzi.s32.f32 %r0, %r1;", {f(0x1p31f)}, kMax32},
      {"cvt.rzi.u32.f32 %r0, %r1;", {f(-1)}, 0},
      {"cvt.rzi.u32.f32 %r0, %r1;", {f(5e9f)}, kOnes32},
      {"cvt.rzi.u32.f32 %r0, %r1;", {f(kInfinity)}, kOnes32},
      {"cvt.rzi.s32.f32 %r0, %r1;", {kQuietNan}, 0},
      {"cvt.rzi.s64.f32 %l0, %r1;", {kQuietNan}, kMin64},
      {"cvt.rzi.u64.f32 %l0, %r1;", {kQuietNan}, kMin64},
      {"cvt.rzi.s32.f64 %r0, %l1;", {d(NAN)}, kMin32},
      {"cvt.rzi.s64.f64 %l0, %l1;", {d(1e30)}, kMin64 - 1},
      {"cvt.rzi.u64.f64 %l0, %l1;", {d(0x1p63)}, kMin64},
      {"cvt.rpi.ftz.s32.f32 %r0, %r1;", {f(1e-40f)}, 0},
      {"cvt.rpi.s32.f32 %r0, %r1;", {f(1e-40f)}, 1},
      {"cvt.rzi.s16.f32 %h0, %r1;", {f(70000)}, 0x7fff},
      {"cvt.rzi.u8.f32 %r0, %r1;", {f(300)}, 255},
      {"cvt.rni.s32.f16 %r0, %h1;", {0x4100}, 2}, // 2.5
      {"cvt.rzi.u32.bf16 %r0, %h1;", {0x4348}, 200},
  });
}

TEST(Convert, IntegersToFloatsRoundOnce) {
  expect({
      {"cvt.rn.f32.s32 %r0, %r1;", {uint64_t(-7)}, f(-7)},
      {"cvt.rn.f32.u32 %r0, %r1;", {kOnes32}, f(0x1p32f)},
      {"cvt.rz.f32.u32 %r0, %r1;", {kOnes32}, f(0x1p32f) - 1},
      {"cvt.rm.f32.s32 %r0, %r1;", {uint64_t(-16777217)}, f(-16777218)},
      {"cvt.rp.f32.s32 %r0, %r1;", {uint64_t(-16777217)}, f(-16777216)},
      {"cvt.rn.f32.s32 %r0, %r1;", {16777217}, f(16777216)},
      {"cvt.rn.f32.u64 %r0, %l1;", {0x8000008000000001}, f(0x1p63f) + 1}, // through double it would be a tie
      {"cvt.rn.f64.s64 %l0, %l1;", {kMin64}, d(-0x1p63)},
      {"cvt.rz.f64.u64 %l0, %l1;", {kOnes64}, d(0x1p64) - 1},
      {"cvt.rn.f16.s32 %h0, %r1;", {65519}, 0x7bff},
      {"cvt.rn.f16.s32 %h0, %r1;", {65520}, 0x7c00},
      {"cvt.rn.f16.u16 %h0, %h1;", {2049}, 0x6800},
      {"cvt.rn.bf16.s32 %h0, %r1;", {uint64_t(-1)}, 0xbf80},
      {"cvt.rn.f32.s8 %r0, %r1;", {0x80}, f(-128)},
      {"cvt.rn.f32.s32 %r0, %r1;", {0}, 0},
  });
}

TEST(Convert, FloatsToNarrowerFloatsRoundInEveryDirection) {
  expect({
      {"cvt.rn.f16.f32 %h0, %r1;", {f(1 + 0x1p-11f)}, 0x3c00},
      {"cvt.rn.f16.f32 %h0, %r1;", {f(1 + 3 * 0x1p-11f)}, 0x3c02},
      {"cvt.rz.f16.f32 %h0, %r1;", {f(1 + 3 * 0x1p-11f)}, 0x3c01},
      {"cvt.rp.f16.f32 %h0, %r1;", {f(1 + 0x1p-20f)}, 0x3c01},
      {"cvt.rm.f16.f32 %h0, %r1;", {f(-1 - 0x1p-20f)}, 0xbc01},
      {"cvt.rn.f16.f32 %h0, %r1;", {f(65520)}, 0x7c00},
      {"cvt.rz.f16.f32 %h0, %r1;", {f(1e9f)}, 0x7bff},
      {"cvt.rn.f16.f32 %h0, %r1;", {f(0x1p-25f)}, 0},
      {"cvt.rn.f16.f32 %h0, %r1;", {f(0x1.8p-25f)}, 1},
      {"cvt.rn.f16.f32 %h0, %r1;", {kOtherNan}, 0x7fff},
      {"cvt.rn.satfinite.f16.f32 %h0, %r1;", {f(-1e9f)}, 0xfbff},
      {"cvt.rn.relu.f16.f32 %h0, %r1;", {f(-2)}, 0},
      {"cvt.rn.relu.f16.f32 %h0, %r1;", {kOtherNan}, 0x7fff},
      {"cvt.rn.bf16.f32 %h0, %r1;", {0x3f808000}, 0x3f80},
      {"cvt.rn.bf16.f32 %h0, %r1;", {0x3f818000}, 0x3f82},
      {"cvt.rz.bf16.f32 %h0, %r1;", {0x3f81ffff}, 0x3f81},
      {"cvt.rn.bf16.f32 %h0, %r1;", {0x7f7fffff}, 0x7f80},
      {"cvt.rn.bf16.f32 %h0, %r1;", {0x7f800001}, 0x7fff},
      {"cvt.rn.bf16x2.f32 %r0, %r1, %r2;", {f(1), f(-2)}, 0x3f80c000},
      {"cvt.rn.f16x2.f32 %r0, %r1, %r2;", {f(1), f(-2)}, 0x3c00c000},
      {"cvt.rn.relu.bf16x2.f32 %r0, %r1, %r2;", {f(-1), f(2)}, 0x00004000},
      {"cvt.rz.f16x2.f32 %r0, %r1, %r2;", {f(1e9f), f(0)}, 0x7bff0000},
      {"cvt.rn.f32.f64 %r0, %l1;", {d(1 + 0x1p-24)}, f(1)},
      {"cvt.rp.f32.f64 %r0, %l1;", {d(1 + 0x1p-24)}, f(1) + 1},
      {"cvt.rn.f32.f64 %r0, %l1;", {d(NAN)}, kCanonicalNan},
      {"cvt.rn.ftz.f32.f64 %r0, %l1;", {d(-1e-40)}, f(-0.0f)},
      {"cvt.rn.f16.f64 %h0, %l1;", {d(1 + 0x1p-11 + 0x1p-40)}, 0x3c01},
      {"cvt.rn.bf16.f16 %h0, %h1;", {0x3c01}, 0x3f80},
  });
}

TEST(Convert, FloatsToWiderFloatsAreExact) {
  expect({
      {"cvt.f32.f16 %r0, %h1;", {0x0001}, f(0x1p-24f)},
      {"cvt.f32.f16 %r0, %h1;", {0xfc00}, f(-kInfinity)},
      {"cvt.f32.f16 %r0, %h1;", {0x7c01}, kCanonicalNan},
      {"cvt.f32.bf16 %r0, %h1;", {0xffc1}, 0xffc10000}, // moves bits, whatever they are
      {"cvt.f64.f32 %l0, %r1;", {f(1e-40f)}, d(static_cast<double>(1e-40f))},
      {"cvt.ftz.f64.f32 %l0, %r1;", {f(1e-40f)}, 0},
      {"cvt.f64.f32 %l0, %r1;", {kOtherNan}, kCanonicalNan64},
      {"cvt.f64.f16 %l0, %h1;", {0xc000}, d(-2)},
  });
}

TEST(Convert, FloatsToIntegralFloatsKeepTheirFormat) {
  expect({
      {"cvt.rni.f32.f32 %r0, %r1;", {f(-0.5f)}, f(-0.0f)},
      {"cvt.rzi.f32.f32 %r0, %r1;", {f(1.9f)}, f(1)},
      {"cvt.rmi.f32.f32 %r0, %r1;", {f(-1.1f)}, f(-2)},
      {"cvt.rpi.f64.f64 %l0, %l1;", {d(1.1)}, d(2)},
      {"cvt.rni.f32.f32 %r0, %r1;", {f(1e30f)}, f(1e30f)},
      {"cvt.rni.f32.f32 %r0, %r1;", {kOtherNan}, kCanonicalNan},
      {"cvt.sat.f32.f32 %r0, %r1;", {f(1.5f)}, f(1)},
      {"cvt.sat.f32.f32 %r0, %r1;", {kQuietNan}, 0},
      {"cvt.ftz.f32.f32 %r0, %r1;", {f(-1e-40f)}, f(-0.0f)},
      {"cvt.rpi.f16.f16 %h0, %h1;", {0x3c01}, 0x4000},
  });
}

TEST(FloatFormats, RoundToSingleAsTheHostDoes) {
  std::mt19937_64 engine(3);
  for (int i = 0; i < 200000; ++i) {
    // Exponents around those of single, so that overflow, subnormal results and ties all happen.
    const uint64_t bits = (engine() & 0x800fffffffffffff) | (engine() % 300 + 870) << 52;
    const double value = std::bit_cast<double>(i % 2 == 0 ? bits : bits & ~uint64_t{0xfffffff});
    ASSERT_EQ(rounded(kFloat32, value, Rounding::kNearestEven), std::bit_cast<uint32_t>(static_cast<float>(value))) << value;
  }
}

TEST(FloatFormats, EveryHalfReadsBackAsItself) {
  for (const FloatFormat& format : {kFloat16, kBFloat16})
    for (uint64_t bits = 0; bits < 0x10000; ++bits) {
      const double value = value_of(format, bits);
      for (const Rounding rounding : {Rounding::kNearestEven, Rounding::kTowardZero, Rounding::kDown, Rounding::kUp})
        ASSERT_EQ(rounded(format, value, rounding), format.is_nan(bits) ? format.canonical_nan() : bits) << std::hex << bits;
    }
}

TEST(Convert, ModifiersThatBelongElsewhereAreRefused) {
  EXPECT_NE(complaint_about("cvt.f16.f32 %h0, %r1;").find("without a rounding modifier"), std::string::npos);
  EXPECT_NE(complaint_about("cvt.s32.f32 %r0, %r1;").find("without a rounding modifier"), std::string::npos);
  EXPECT_NE(complaint_about("cvt.rn.u32.s32 %r0, %r1;").find("cvt.rn.u32.s32"), std::string::npos);
  EXPECT_NE(complaint_about("cvt.rna.tf32.f32 %r0, %r1;").find("cvt.rna.tf32.f32"), std::string::npos);
}

} // namespace
} // namespace simt::ptx::testing
