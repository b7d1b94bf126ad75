#include "instruction_testing.h"

#include <cmath>

namespace simt::ptx::testing {
namespace {

TEST(Compare, IntegersFollowTheSignOfTheType) {
  expect({
      {"setp.lt.s32 %p0, %r1, %r2;", {0xffffffff, 1}, 1},
      {"setp.lt.u32 %p0, %r1, %r2;", {0xffffffff, 1}, 0},
      {"setp.lo.u32 %p0, %r1, %r2;", {1, 0xffffffff}, 1},
      {"setp.hs.u64 %p0, %l1, %l2;", {5, 5}, 1},
      {"setp.ge.s16 %p0, %h1, %h2;", {0x8000, 0}, 0},
      {"setp.eq.b32 %p0, %r1, %r2;", {0x100000001, 1}, 1},
      {"setp.ne.b64 %p0, %l1, %l2;", {0x100000001, 1}, 1},
      {"setp.gt.s64 %p0, %l1, -1;", {0}, 1},
      {"setp.le.u16 %p0, %h1, 7;", {8}, 0},
  });
}

TEST(Compare, FloatsAreOrderedOrNot) {
  const uint64_t nan = kOtherNan;
  for (const char* comparison : {"eq", "ne", "lt", "le", "gt", "ge", "num"})
    EXPECT_EQ(evaluate(std::string("setp.") + comparison + ".f32 %p0, %r1, %r2;", {nan, f(1)}), 0u) << comparison;
  for (const char* comparison : {"equ", "neu", "ltu", "leu", "gtu", "geu", "nan"})
    EXPECT_EQ(evaluate(std::string("setp.") + comparison + ".f32 %p0, %r1, %r2;", {f(1), nan}), 1u) << comparison;
  expect({
      {"setp.eq.f32 %p0, %r1, %r2;", {f(0.0f), f(-0.0f)}, 1},
      {"setp.ne.f32 %p0, %r1, %r2;", {f(1), f(2)}, 1},
      {"setp.neu.f32 %p0, %r1, %r2;", {f(1), f(1)}, 0},
      {"setp.ltu.f64 %p0, %l1, %l2;", {d(2), d(1)}, 0},
      {"setp.num.f64 %p0, %l1, %l2;", {d(2), d(1)}, 1},
      {"setp.gt.f32 %p0, %r1, 0f00000000;", {f(1e-40f)}, 1},
      {"setp.gt.ftz.f32 %p0, %r1, 0f00000000;", {f(1e-40f)}, 0},
      {"setp.lt.f16 %p0, %h1, %h2;", {0xbc00, 0x3c00}, 1},
      {"setp.lt.f16 %p0, %h1, %h2;", {0x7e00, 0x3c00}, 0},
      {"setp.geu.bf16 %p0, %h1, %h2;", {0x7fc0, 0x3c00}, 1},
      {"setp.gt.bf16 %p0, %h1, %h2;", {0x4000, 0x3f80}, 1},
  });
}

TEST(Compare, TheSecondPredicateIsTheOppositeCombinedLikewise) {
  const auto both = [](const char* instruction, const std::vector<uint64_t>& inputs) {
    const Results results = evaluate_all(instruction, inputs);
    return results.p + 2 * results.p8;
  };
  EXPECT_EQ(both("setp.lt.s32 %p0|%p8, %r1, %r2;", {1, 2}), 1u);
  EXPECT_EQ(both("setp.lt.s32 %p0|%p8, %r1, %r2;", {2, 1}), 2u);
  EXPECT_EQ(both("setp.lt.and.s32 %p0|%p8, %r1, %r2, %p3;", {1, 2, 0}), 0u);
  EXPECT_EQ(both("setp.lt.or.s32 %p0|%p8, %r1, %r2, %p3;", {1, 2, 1}), 3u);
  EXPECT_EQ(both("setp.lt.xor.s32 %p0|%p8, %r1, %r2, !%p3;", {1, 2, 0}), 2u);
  EXPECT_EQ(both("setp.gt.f16x2 %p0|%p8, %r1, %r2;", {0x40003c00, 0x3c004000}), 2u); // low and high half
  EXPECT_EQ(both("setp.gt.and.f16x2 %p0|%p8, %r1, %r2, %p3;", {0x40003c00, 0x3c004000, 0}), 0u);
  EXPECT_EQ(both("setp.eq.and.s32 %p0|%p8, %r1, %r2, !%p3;", {4, 4, 1}), 0u);
}

TEST(Compare, SetSelectAndTest) {
  expect({
      {"set.gt.u32.s32 %r0, %r1, %r2;", {2, 1}, 0xffffffff},
      {"set.gt.f32.s32 %r0, %r1, %r2;", {2, 1}, f(1)},
      {"set.lt.and.u32.f32 %r0, %r1, %r2, %p3;", {f(1), f(2), 0}, 0},
      {"set.eq.f16x2.f16x2 %r0, %r1, %r2;", {0x3c004000, 0x3c003c00}, 0x3c000000},
      {"set.lt.u32.bf16x2 %r0, %r1, %r2;", {0x3f804000, 0x40004000}, 0xffff0000},
      {"set.ne.f16.f16 %h0, %h1, %h2;", {1, 2}, 0x3c00},
      {"selp.b32 %r0, %r1, %r2, %p3;", {5, 6, 1}, 5},
      {"selp.f64 %l0, %l1, %l2, %p3;", {d(5), d(6), 0}, d(6)},
      {"slct.u32.s32 %r0, %r1, %r2, %r3;", {5, 6, 0}, 5},
      {"slct.u32.s32 %r0, %r1, %r2, %r3;", {5, 6, 0xffffffff}, 6},
      {"slct.f32.f32 %r0, %r1, %r2, %r3;", {f(5), f(6), f(-0.0f)}, f(5)},
      {"slct.f32.f32 %r0, %r1, %r2, %r3;", {f(5), f(6), kQuietNan}, f(6)},
      {"testp.subnormal.f32 %p0, %r1;", {f(1e-40f)}, 1},
      {"testp.normal.f32 %p0, %r1;", {f(0)}, 0},
      {"testp.finite.f64 %p0, %l1;", {d(INFINITY)}, 0},
      {"testp.infinite.f64 %p0, %l1;", {d(-INFINITY)}, 1},
      {"testp.notanumber.f32 %p0, %r1;", {kSignalingNan}, 1},
      {"testp.number.f32 %p0, %r1;", {f(-kInfinity)}, 1},
  });
}

TEST(Compare, ComparisonsThatATypeDoesNotHaveAreRefused) {
  EXPECT_NE(complaint_about("setp.lt.b32 %p0, %r1, %r2;").find("an order of a type that has none"), std::string::npos);
  EXPECT_NE(complaint_about("setp.ltu.s32 %p0, %r1, %r2;").find("a comparison of floating point"), std::string::npos);
  EXPECT_NE(complaint_about("setp.lo.s32 %p0, %r1, %r2;").find("a comparison of unsigned integers"), std::string::npos);
  EXPECT_NE(complaint_about("setp.eq.s32 %r0, %r1, %r2;").find("does not fit the type"), std::string::npos);
}

} // namespace
} // namespace simt::ptx::testing
