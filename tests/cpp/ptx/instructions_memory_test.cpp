#include "instruction_testing.h"

#include <cstring>

#include "counters.h"

namespace simt::ptx::testing {
namespace {

const std::string kVariables =
    ".global .align 16 .b8 bytes[64] = {1, 2, 3, 255, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};\n"
    ".const .align 4 .u32 table[3] = {7, 8, 9};\n.shared .align 16 .b8 tile[64];\n.global .u32 number = 40;\n";

std::optional<Failure> failure_in(const std::string& instructions, const std::vector<uint64_t>& inputs = {}) {
  return failure_of([&] { evaluate_all(instructions, inputs, kVariables); });
}

TEST(Memory, LoadsExtendToTheirRegister) {
  const auto load = [](const std::string& instruction) { return evaluate_all(instruction, {}, kVariables); };
  EXPECT_EQ(load("ld.global.u8 %r0, [bytes+3];").r, 255u);
  EXPECT_EQ(load("ld.global.s8 %r0, [bytes+3];").r, 0xffffffffu);
  EXPECT_EQ(load("ld.global.s8 %l0, [bytes+3];").l, ~uint64_t{0});
  EXPECT_EQ(load("ld.global.s16 %r0, [bytes+2];").r, 0xffffff03u);
  EXPECT_EQ(load("ld.global.b64 %l0, [bytes+8];").l, 0x100f0e0d0c0b0a09u);
  EXPECT_EQ(load("ld.const.u32 %r0, [table+8];").r, 9u);
  EXPECT_EQ(load("mov.u64 %l1, bytes; ld.global.u32 %r0, [%l1+12];").r, 0x100f0e0du);
  EXPECT_EQ(load("mov.u64 %l1, bytes+8; ld.u8 %r0, [%l1+-1];").r, 8u);
}

TEST(Memory, VectorsMoveUpTo16Bytes) {
  const Results two = evaluate_all("ld.global.v2.u32 {%r0, %r8}, [bytes+8];", {}, kVariables);
  EXPECT_EQ(two.r, 0x0c0b0a09u);
  EXPECT_EQ(two.r8, 0x100f0e0du);
  EXPECT_EQ(evaluate_all("ld.global.v4.u8 {_, _, %r0, %r8}, [bytes];", {}, kVariables).r8, 255u);
  EXPECT_EQ(evaluate_all("ld.global.v2.b64 {%l0, %l8}, [bytes];", {}, kVariables).l8, 0x100f0e0d0c0b0a09u);
  EXPECT_EQ(evaluate_all("ld.global.v4.f32 {_, _, %r0, %r8}, [bytes];", {}, kVariables).r8, 0x100f0e0du);
  EXPECT_EQ(evaluate_all("st.shared.v4.b32 [tile+16], {%r1, %r2, %r3, %r4}; ld.shared.b64 %l0, [tile+24];", {1, 2, 3, 4}, kVariables).l,
            0x400000003u);
  EXPECT_EQ(evaluate_all(".reg .b128 %q; ld.global.b128 %q, [bytes]; st.shared.b128 [tile], %q; mov.b128 {%l0, %l8}, %q;\n"
                         "ld.shared.b64 %l0, [tile];",
                         {}, kVariables)
                .l8,
            0x100f0e0d0c0b0a09u);
}

TEST(Memory, HintsAndStrengthsChangeNoValue) {
  for (const char* load :
       {"ld.global.nc.u32", "ld.global.ca.u32", "ld.global.cg.u32", "ld.global.cs.u32", "ld.global.lu.u32", "ld.global.cv.u32",
        "ld.global.nc.L1::no_allocate.L2::128B.u32", "ld.global.L1::evict_last.u32", "ld.volatile.global.u32", "ld.relaxed.gpu.global.u32",
        "ld.acquire.sys.global.u32", "ld.weak.global.u32", "ld.relaxed.cta.u32", "ldu.global.u32"})
    EXPECT_EQ(evaluate_all(std::string("mov.u64 %l1, bytes; ") + load + " %r0, [%l1];", {}, kVariables).r, 0xff030201u) << load;
  for (const char* store : {"st.global.wb.u32", "st.global.cg.u32", "st.global.cs.u32", "st.global.wt.u32", "st.volatile.global.u32",
                            "st.relaxed.gpu.global.u32", "st.release.gpu.global.u32", "st.global.L1::no_allocate.u32"})
    EXPECT_EQ(evaluate_all(std::string(store) + " [number], 17; ld.global.u32 %r0, [number];", {}, kVariables).r, 17u) << store;
  EXPECT_EQ(evaluate_all("createpolicy.fractional.L2::evict_first.b64 %l1, 0f3F800000;\n"
                         "ld.global.L2::cache_hint.u32 %r0, [number], %l1;",
                         {}, kVariables)
                .r,
            40u);
  EXPECT_EQ(evaluate_all("prefetch.global.L2 [bytes]; prefetch.global.L2::evict_last [bytes]; prefetchu.L1 [bytes]; mov.u32 %r0, 1;", {},
                         kVariables)
                .r,
            1u);
}

TEST(Memory, GenericAddressesReachEverySpace) {
  EXPECT_EQ(evaluate_all("mov.u64 %l1, tile; cvta.shared.u64 %l2, %l1; st.b32 [%l2+8], 77; ld.shared.b32 %r0, [tile+8];\n"
                         "cvta.to.shared.u64 %l3, %l2; sub.u64 %l8, %l3, %l1;",
                         {}, kVariables)
                .r,
            77u);
  EXPECT_EQ(evaluate_all(".local .align 8 .b8 mine[16]; mov.u64 %l1, mine; cvta.local.u64 %l2, %l1; st.b32 [%l2+4], 5;\n"
                         "ld.local.u32 %r0, [mine+4]; isspacep.local %p0, %l2; isspacep.global %p8, %l2;",
                         {}, kVariables)
                .r,
            5u);
  const Results is_shared =
      evaluate_all("mov.u64 %l1, tile; cvta.shared.u64 %l2, %l1; isspacep.shared %p0, %l2; mov.u64 %l3, bytes; isspacep.shared %p8, %l3;",
                   {}, kVariables);
  EXPECT_EQ(is_shared.p, 1u);
  EXPECT_EQ(is_shared.p8, 0u);
  // A 32-bit shared address whose register was computed with a borrow: its upper half is no part of it.
  EXPECT_EQ(
      evaluate_all("st.shared.b32 [tile+4], 3; mov.u32 %r1, tile; sub.s32 %r1, %r1, 4; ld.shared.b32 %r0, [%r1+8];", {}, kVariables).r, 3u);
}

TEST(Memory, MistakesStopTheLaunch) {
  const auto kind = [](const std::optional<Failure>& failure) { return failure ? name_of(failure->kind) : "no failure"; };
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, bytes; ld.global.u32 %r0, [%l1+2];")), name_of(FailureKind::kMisaligned));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, bytes; ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%l1+8];")), name_of(FailureKind::kMisaligned));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, bytes; ld.global.u32 %r0, [%l1+64];")), name_of(FailureKind::kOutOfBounds));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, table; ld.const.u32 %r0, [%l1+12];")), name_of(FailureKind::kOutOfBounds));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, tile; ld.shared.u32 %r0, [%l1+64];")), name_of(FailureKind::kOutOfBounds));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, tile; st.shared.u32 [%l1+-4], 1;")), name_of(FailureKind::kOutOfBounds));
  EXPECT_EQ(kind(failure_in("ld.shared.u32 %r0, [tile];")), name_of(FailureKind::kUninitialized));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, bytes; ld.shared.u32 %r0, [%l1];")), name_of(FailureKind::kOutOfBounds));
  EXPECT_EQ(kind(failure_in("mov.u64 %l1, bytes; ld.local.u32 %r0, [%l1];")), name_of(FailureKind::kOutOfBounds));
  EXPECT_EQ(kind(failure_in("ld.u32 %r0, [%l1];", {16})), name_of(FailureKind::kOutOfBounds));
  EXPECT_NE(complaint_about("ld.param.u64 %l0, [out+8];").find("beyond the end of out"), std::string::npos);
  EXPECT_NE(complaint_about("ld.global.v2.u32 %r0, [%l1];").find("as many registers"), std::string::npos);
  EXPECT_NE(complaint_about("ld.global.L1::evict_never.u32 %r0, [%l1];").find("unknown modifier .L1::evict_never"), std::string::npos);
  EXPECT_NE(complaint_about("st.global.nc.u32 [%l1], %r0;").find("unknown modifier .nc"), std::string::npos);
}

TEST(Atomics, ReturnTheOldValueAndStoreTheNew) {
  struct {
    const char* instruction;
    uint64_t old, operand, other, updated;
  } const cases[] = {
      {"atom.global.add.u32 %r0, [%l8], %r2;", 0xffffffff, 2, 0, 1},
      {"atom.add.s32 %r0, [%l8], %r2;", 5, uint32_t(-7), 0, uint32_t(-2)},
      {"atom.relaxed.gpu.global.add.u64 %l0, [%l8], %l2;", 0xffffffff, 2, 0, 0x100000001},
      {"atom.acq_rel.gpu.global.inc.u32 %r0, [%l8], %r2;", 4, 4, 0, 0},
      {"atom.global.inc.u32 %r0, [%l8], %r2;", 3, 4, 0, 4},
      {"atom.global.dec.u32 %r0, [%l8], %r2;", 0, 4, 0, 4},
      {"atom.global.dec.u32 %r0, [%l8], %r2;", 9, 4, 0, 4},
      {"atom.global.dec.u32 %r0, [%l8], %r2;", 3, 4, 0, 2},
      {"atom.global.min.s32 %r0, [%l8], %r2;", 3, 0xffffffff, 0, 0xffffffff},
      {"atom.global.min.u32 %r0, [%l8], %r2;", 3, 0xffffffff, 0, 3},
      {"atom.global.max.u64 %l0, [%l8], %l2;", 3, 1ull << 63, 0, 1ull << 63},
      {"atom.global.max.s64 %l0, [%l8], %l2;", 3, 1ull << 63, 0, 3},
      {"atom.global.and.b32 %r0, [%l8], %r2;", 6, 3, 0, 2},
      {"atom.global.or.b64 %l0, [%l8], %l2;", 6, 3, 0, 7},
      {"atom.global.xor.b32 %r0, [%l8], %r2;", 6, 3, 0, 5},
      {"atom.global.exch.b32 %r0, [%l8], %r2;", 6, 3, 0, 3},
      {"atom.acquire.cta.global.cas.b32 %r0, [%l8], %r2, %r3;", 6, 6, 9, 9},
      {"atom.global.cas.b64 %l0, [%l8], %l2, %l3;", 6, 7, 9, 6},
      {"atom.global.cas.b16 %h0, [%l8], %h2, %h3;", 6, 6, 9, 9},
      {"atom.global.add.f32 %r0, [%l8], %r2;", f(1), f(0.5f), 0, f(1.5f)},
      {"atom.global.add.f32 %r0, [%l8], %r2;", f(1e-40f), 0, 0, 0}, // on global memory subnormal numbers are flushed
      {"atom.global.add.f64 %l0, [%l8], %l2;", d(1), d(0.5), 0, d(1.5)},
      {"atom.global.add.noftz.f16 %h0, [%l8], %h2;", 0x3c00, 0x3c00, 0, 0x4000},
      {"atom.global.add.noftz.bf16 %h0, [%l8], %h2;", 0x3f80, 0x3f80, 0, 0x4000},
  };
  for (const auto& c : cases) {
    const DeviceArray<uint64_t> word(std::vector<uint64_t>{c.old});
    const uint64_t address = reinterpret_cast<uint64_t>(word.data());
    const uint64_t old = evaluate(std::string("mov.b64 %l8, %l1; ") + c.instruction, {address, c.operand, c.other});
    EXPECT_EQ(old, c.old) << c.instruction;
    EXPECT_EQ(word[0], c.updated) << c.instruction;
  }
}

TEST(Atomics, RedStoresWithoutAResultAndSharedMemoryKeepsSubnormalNumbers) {
  EXPECT_EQ(evaluate_all("red.relaxed.gpu.global.add.u32 [number], 2; red.global.max.u32 [number], 41; ld.global.u32 %r0, [number];", {},
                         kVariables)
                .r,
            42u);
  EXPECT_EQ(
      evaluate_all("st.shared.b32 [tile], %r1; red.shared.add.f32 [tile], 0f00000000; ld.shared.b32 %r0, [tile];", {f(1e-40f)}, kVariables)
          .r,
      f(1e-40f));
  EXPECT_EQ(
      evaluate_all("st.shared.b32 [tile+4], 1; atom.shared.add.u32 %r0, [tile+4], 5; ld.shared.b32 %r8, [tile+4];", {}, kVariables).r8, 6u);
  EXPECT_NE(complaint_about("red.global.cas.b32 [%l1], %r1, %r2;").find("without .add"), std::string::npos);
  EXPECT_NE(complaint_about("red.acquire.gpu.global.add.u32 [%l1], %r1;").find("combination"), std::string::npos);
  EXPECT_NE(complaint_about("atom.global.add.noftz.f16x2 %r0, [%l1], %r1;").find("atom.global.add.noftz.f16x2"), std::string::npos);
}

TEST(AsyncCopies, CopyAndFillWithZeros) {
  const auto copy = [](const std::string& instruction, uint64_t size = 0) {
    return evaluate_all("mov.u32 %r8, tile; mov.u64 %l8, bytes; " + instruction +
                            " cp.async.commit_group; cp.async.wait_group 0; cp.async.wait_all; ld.shared.b64 %l0, [tile+8];",
                        {size}, kVariables)
        .l;
  };
  EXPECT_EQ(copy("cp.async.cg.shared.global [%r8], [%l8], 16;"), 0x100f0e0d0c0b0a09u);
  EXPECT_EQ(copy("cp.async.ca.shared.global.L2::128B [%r8+8], [%l8+8], 8;"), 0x100f0e0d0c0b0a09u);
  EXPECT_EQ(copy("cp.async.cg.shared.global [%r8], [%l8], 16, %r1;", 10), 0x0a09u);
  EXPECT_EQ(copy("cp.async.cg.shared.global [%r8], [%l8], 16, %p1;", 1), 0u);
  EXPECT_NE(complaint_about("cp.async.bulk.commit_group;").find("cp.async.bulk"), std::string::npos);
}

} // namespace
} // namespace simt::ptx::testing
