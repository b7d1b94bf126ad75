#include "instruction_testing.h"

namespace simt::ptx::testing {
namespace {

constexpr uint64_t kMin32 = 0x80000000, kMax32 = 0x7fffffff, kOnes32 = 0xffffffff;
constexpr uint64_t kMin64 = 0x8000000000000000, kOnes64 = ~uint64_t{0};

TEST(IntegerInstructions, AddAndSubtractWrapAroundOrSaturate) {
  expect({
      {"add.s32 %r0, %r1, %r2;", {kMax32, 1}, kMin32},
      {"add.u32 %r0, %r1, -1;", {5}, 4},
      {"add.u16 %h0, %h1, %h2;", {0xffff, 2}, 1},
      {"add.s64 %l0, %l1, %l2;", {kOnes64, 1}, 0},
      {"add.sat.s32 %r0, %r1, %r2;", {kMax32, 1}, kMax32},
      {"add.sat.s32 %r0, %r1, %r2;", {kMin32, kOnes32}, kMin32},
      {"sub.s32 %r0, %r1, %r2;", {0, kMin32}, kMin32},
      {"sub.sat.s32 %r0, %r1, %r2;", {0, kMin32}, kMax32},
      {"sub.u64 %l0, %l1, %l2;", {0, 1}, kOnes64},
  });
}

TEST(IntegerInstructions, CarryGoesFromOneInstructionToTheNext) {
  expect({
      {"add.cc.u32 %r0, %r1, %r2; addc.u32 %r0, 0, 0;", {kOnes32, 1}, 1},
      {"add.cc.u32 %r0, %r1, %r2; addc.u32 %r0, 0, 0;", {kOnes32, 0}, 0},
      {"add.cc.u32 %r0, %r1, %r2; addc.cc.u32 %r0, %r1, 0; addc.u32 %r0, 0, 0;", {kOnes32, 1}, 1},
      {"sub.cc.u32 %r0, %r1, %r2; subc.u32 %r0, 10, 0;", {0, 1}, 9},
      {"sub.cc.u64 %l0, %l1, %l2; subc.u64 %l0, 10, 0;", {1, 1}, 10},
      {"mad.lo.cc.u32 %r0, %r1, %r2, %r3; madc.hi.u32 %r0, %r1, %r2, 0;", {kOnes32, 2, 2}, 2},
      {"mad.hi.cc.u32 %r0, %r1, %r2, %r3; addc.u32 %r0, 0, 0;", {kOnes32, kOnes32, 2}, 1},
  });
}

TEST(IntegerInstructions, MultiplyGivesEitherHalfOrBoth) {
  expect({
      {"mul.lo.s32 %r0, %r1, %r2;", {kMin32, 3}, kMin32},
      {"mul.hi.u32 %r0, %r1, %r2;", {kOnes32, kOnes32}, 0xfffffffe},
      {"mul.hi.s32 %r0, %r1, %r2;", {kOnes32, kOnes32}, 0},
      {"mul.hi.u64 %l0, %l1, %l2;", {kOnes64, kOnes64}, kOnes64 - 1},
      {"mul.hi.s64 %l0, %l1, %l2;", {kMin64, 2}, kOnes64},
      {"mul.hi.u16 %h0, %h1, %h2;", {0xffff, 0xffff}, 0xfffe},
      {"mul.wide.u32 %l0, %r1, %r2;", {kOnes32, kOnes32}, 0xfffffffe00000001},
      {"mul.wide.s32 %l0, %r1, %r2;", {kOnes32, 7}, uint64_t(-7)},
      {"mul.wide.u16 %r0, %h1, %h2;", {0xffff, 0xffff}, 0xfffe0001},
      {"mul.wide.s16 %r0, %h1, %h2;", {0xffff, 2}, 0xfffffffe},
      {"mad.lo.s32 %r0, %r1, %r2, %r3;", {6, 7, kOnes32}, 41},
      {"mad.hi.s32 %r0, %r1, %r2, %r3;", {kMin32, 2, 5}, 4},
      {"mad.hi.sat.s32 %r0, %r1, %r2, %r3;", {0x40000000, 0x40000000, kMax32}, kMax32},
      {"mad.wide.u32 %l0, %r1, %r2, %l3;", {kOnes32, 2, 3}, 0x200000001},
      {"mad.wide.s32 %l0, %r1, %r2, %l3;", {kOnes32, 2, 3}, 1},
      {"mad.lo.u64 %l0, %l1, %l2, %l3;", {1ull << 63, 2, 3}, 3},
  });
}

TEST(IntegerInstructions, DivideTruncatesAndHasAnAnswerForZero) {
  expect({
      {"div.s32 %r0, %r1, %r2;", {uint64_t(-7), 2}, uint32_t(-3)},
      {"rem.s32 %r0, %r1, %r2;", {uint64_t(-7), 2}, uint32_t(-1)},
      {"div.u32 %r0, %r1, %r2;", {kOnes32, 10}, 429496729},
      {"div.u32 %r0, %r1, %r2;", {5, 0}, kOnes32},
      {"rem.u32 %r0, %r1, %r2;", {5, 0}, 5},
      {"div.s32 %r0, %r1, %r2;", {kMin32, kOnes32}, kMin32},
      {"rem.s32 %r0, %r1, %r2;", {kMin32, kOnes32}, 0},
      {"div.s64 %l0, %l1, %l2;", {kMin64, kOnes64}, kMin64},
      {"div.u64 %l0, %l1, %l2;", {kOnes64, 3}, kOnes64 / 3},
      {"rem.u16 %h0, %h1, %h2;", {0xffff, 10}, 5},
  });
}

TEST(IntegerInstructions, MinimumMaximumAndAbsoluteValueFollowTheSignOfTheType) {
  expect({
      {"min.s32 %r0, %r1, %r2;", {kOnes32, 1}, kOnes32},
      {"min.u32 %r0, %r1, %r2;", {kOnes32, 1}, 1},
      {"max.s64 %l0, %l1, %l2;", {kOnes64, 1}, 1},
      {"max.u16 %h0, %h1, %h2;", {0xffff, 1}, 0xffff},
      {"min.relu.s32 %r0, %r1, %r2;", {kOnes32, 1}, 0},
      {"max.relu.s32 %r0, %r1, %r2;", {kOnes32, kMin32}, 0},
      {"neg.s32 %r0, %r1;", {kMin32}, kMin32},
      {"neg.s64 %l0, %l1;", {1}, kOnes64},
      {"abs.s32 %r0, %r1;", {uint64_t(-9)}, 9},
      {"abs.s32 %r0, %r1;", {kMin32}, kMin32},
      {"abs.s16 %h0, %h1;", {0xfff7}, 9},
      {"sad.u32 %r0, %r1, %r2, %r3;", {3, kOnes32, 4}, 0},
      {"sad.s32 %r0, %r1, %r2, %r3;", {3, kOnes32, 4}, 8},
      {"dp4a.u32.u32 %r0, %r1, %r2, %r3;", {0x01020304, 0x05060708, 100}, 100 + 5 + 12 + 21 + 32},
      {"dp4a.s32.u32 %r0, %r1, %r2, %r3;", {0xff000000, 0x02000000, 0}, uint32_t(-2)},
  });
}

TEST(BitInstructions, LogicWorksOnEveryWidthAndOnPredicates) {
  expect({
      {"and.b32 %r0, %r1, %r2;", {0xff00ff00, 0x0ff00ff0}, 0x0f000f00},
      {"or.b64 %l0, %l1, %l2;", {kMin64, 1}, kMin64 + 1},
      {"xor.b16 %h0, %h1, %h2;", {0xffff, 0x00ff}, 0xff00},
      {"not.b32 %r0, %r1;", {0xf0f0f0f0}, 0x0f0f0f0f},
      {"cnot.b32 %r0, %r1;", {0}, 1},
      {"cnot.b64 %l0, %l1;", {kMin64}, 0},
      {"and.pred %p0, %p1, %p2;", {1, 0}, 0},
      {"or.pred %p0, %p1, %p2;", {1, 0}, 1},
      {"xor.pred %p0, %p1, %p2;", {1, 1}, 0},
      {"not.pred %p0, %p1;", {0}, 1},
      {"lop3.b32 %r0, %r1, %r2, %r3, 0x96;", {0xf0f0f0f0, 0xcccccccc, 0xaaaaaaaa}, 0x96969696},
      {"lop3.b32 %r0, %r1, %r2, %r3, 0xca;", {0xffff0000, 0x12345678, 0x9abcdef0}, 0x1234def0},
  });
  const Results combined = evaluate_all("lop3.and.b32 %r0|%p0, %r1, %r2, %r3, 0x80, !%p4;", {7, 3, 1, 0});
  EXPECT_EQ(combined.r, 1u);
  EXPECT_EQ(combined.p, 1u);
  EXPECT_EQ(evaluate_all("lop3.or.b32 _|%p0, %r1, %r2, %r3, 0x80, %p4;", {7, 3, 0, 0}).p, 0u);
}

TEST(BitInstructions, ShiftsBeyondTheWidthShiftEverythingOut) {
  expect({
      {"shl.b32 %r0, %r1, %r2;", {1, 31}, kMin32},
      {"shl.b32 %r0, %r1, %r2;", {1, 32}, 0},
      {"shl.b32 %r0, %r1, %r2;", {1, kOnes32}, 0},
      {"shl.b16 %h0, %h1, %r2;", {3, 15}, 0x8000},
      {"shl.b16 %h0, %h1, %r2;", {1, 16}, 0},
      {"shl.b64 %l0, %l1, %r2;", {1, 63}, kMin64},
      {"shl.b64 %l0, %l1, %r2;", {1, 64}, 0},
      {"shr.u32 %r0, %r1, %r2;", {kMin32, 32}, 0},
      {"shr.s32 %r0, %r1, %r2;", {kMin32, 32}, kOnes32},
      {"shr.s32 %r0, %r1, %r2;", {kMin32, 4}, 0xf8000000},
      {"shr.b32 %r0, %r1, %r2;", {kMin32, 31}, 1},
      {"shr.s64 %l0, %l1, %r2;", {kMin64, 100}, kOnes64},
      {"shr.u16 %h0, %h1, %r2;", {0x8000, 15}, 1},
      {"shf.l.wrap.b32 %r0, %r1, %r2, %r3;", {0x80000001, 0x12345678, 36}, 0x23456788},
      {"shf.l.clamp.b32 %r0, %r1, %r2, %r3;", {0x80000001, 0x12345678, 36}, 0x80000001},
      {"shf.r.wrap.b32 %r0, %r1, %r2, %r3;", {0x80000001, 0x12345678, 36}, 0x88000000},
      {"shf.r.clamp.b32 %r0, %r1, %r2, %r3;", {0x80000001, 0x12345678, 36}, 0x12345678},
      {"shf.r.wrap.b32 %r0, %r1, %r2, %r3;", {0x80000001, 0x12345678, 0}, 0x80000001},
  });
}

TEST(BitInstructions, CountAndFindBits) {
  expect({
      {"popc.b32 %r0, %r1;", {0xf000000f}, 8},
      {"popc.b64 %r0, %l1;", {kOnes64}, 64},
      {"clz.b32 %r0, %r1;", {0}, 32},
      {"clz.b32 %r0, %r1;", {1}, 31},
      {"clz.b64 %r0, %l1;", {0}, 64},
      {"brev.b32 %r0, %r1;", {1}, kMin32},
      {"brev.b64 %l0, %l1;", {2}, kMin64 >> 1},
      {"bfind.u32 %r0, %r1;", {0x10}, 4},
      {"bfind.u32 %r0, %r1;", {0}, kOnes32},
      {"bfind.s32 %r0, %r1;", {kOnes32}, kOnes32},
      {"bfind.s32 %r0, %r1;", {0xfffffff7}, 3},
      {"bfind.shiftamt.u32 %r0, %r1;", {0x10}, 27},
      {"bfind.u64 %r0, %l1;", {kMin64}, 63},
      {"bfind.shiftamt.s64 %r0, %l1;", {0}, kOnes32},
  });
}

TEST(BitInstructions, FieldsMayReachBeyondTheValue) {
  expect({
      {"bfe.u32 %r0, %r1, %r2, %r3;", {0x12345678, 8, 8}, 0x56},
      {"bfe.u32 %r0, %r1, %r2, %r3;", {0x12345678, 8, 0}, 0},
      {"bfe.u32 %r0, %r1, %r2, %r3;", {0xf2345678, 28, 10}, 0xf},
      {"bfe.s32 %r0, %r1, %r2, %r3;", {0xf2345678, 28, 10}, kOnes32},
      {"bfe.s32 %r0, %r1, %r2, %r3;", {0x12345678, 4, 4}, 7},
      {"bfe.s32 %r0, %r1, %r2, %r3;", {0x00000080, 4, 4}, 0xfffffff8},
      {"bfe.s32 %r0, %r1, %r2, %r3;", {kMin32, 40, 4}, kOnes32},
      {"bfe.u32 %r0, %r1, %r2, %r3;", {kOnes32, 40, 4}, 0},
      {"bfe.u32 %r0, %r1, %r2, %r3;", {kOnes32, 0, 255}, kOnes32},
      {"bfe.u32 %r0, %r1, %r2, %r3;", {0x12345678, 0x108, 0x108}, 0x56},
      {"bfe.u64 %l0, %l1, %r2, %r3;", {0x123456789abcdef0, 0, 64}, 0x123456789abcdef0},
      {"bfe.s64 %l0, %l1, %r2, %r3;", {0x8000000000000000, 60, 4}, 0xfffffffffffffff8},
      {"bfi.b32 %r0, %r1, %r2, %r3, %r4;", {0xab, 0x12345678, 8, 8}, 0x1234ab78},
      {"bfi.b32 %r0, %r1, %r2, %r3, %r4;", {0xab, 0x12345678, 8, 0}, 0x12345678},
      {"bfi.b32 %r0, %r1, %r2, %r3, %r4;", {0xab, 0x12345678, 28, 8}, 0xb2345678},
      {"bfi.b32 %r0, %r1, %r2, %r3, %r4;", {0xab, 0x12345678, 32, 8}, 0x12345678},
      {"bfi.b32 %r0, %r1, %r2, %r3, %r4;", {0xab, 0x12345678, 0, 32}, 0xab},
      {"bfi.b64 %l0, %l1, %l2, %r3, %r4;", {1, 0, 63, 255}, kMin64},
      {"bmsk.clamp.b32 %r0, %r1, %r2;", {4, 8}, 0xff0},
      {"bmsk.clamp.b32 %r0, %r1, %r2;", {28, 8}, 0xf0000000},
      {"bmsk.clamp.b32 %r0, %r1, %r2;", {32, 8}, 0},
      {"bmsk.clamp.b32 %r0, %r1, %r2;", {0, 32}, kOnes32},
      {"bmsk.wrap.b32 %r0, %r1, %r2;", {36, 8}, 0xff0},
      {"bmsk.wrap.b32 %r0, %r1, %r2;", {0, 32}, 0},
  });
}

TEST(BitInstructions, PermuteBytesInEveryMode) {
  constexpr uint64_t kA = 0x33221180, kB = 0x77665544;
  expect({
      {"prmt.b32 %r0, %r1, %r2, %r3;", {kA, kB, 0x7531}, 0x77553311},
      {"prmt.b32 %r0, %r1, %r2, %r3;", {kA, kB, 0x0000}, 0x80808080},
      {"prmt.b32 %r0, %r1, %r2, 0x8091;", {kA, kB}, 0xff800011},
      {"prmt.b32.f4e %r0, %r1, %r2, %r3;", {kA, kB, 1}, 0x44332211},
      {"prmt.b32.f4e %r0, %r1, %r2, %r3;", {kA, kB, 7}, 0x66554433},
      {"prmt.b32.b4e %r0, %r1, %r2, %r3;", {kA, kB, 0}, 0x55667780},
      {"prmt.b32.b4e %r0, %r1, %r2, %r3;", {kA, kB, 3}, 0x80112233},
      {"prmt.b32.rc8 %r0, %r1, %r2, %r3;", {kA, kB, 2}, 0x22222222},
      {"prmt.b32.ecl %r0, %r1, %r2, %r3;", {kA, kB, 1}, 0x33221111},
      {"prmt.b32.ecr %r0, %r1, %r2, %r3;", {kA, kB, 2}, 0x22221180},
      {"prmt.b32.rc16 %r0, %r1, %r2, %r3;", {kA, kB, 1}, 0x33223322},
  });
}

} // namespace
} // namespace simt::ptx::testing
