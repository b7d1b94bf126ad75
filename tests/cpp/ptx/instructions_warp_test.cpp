#include "instruction_testing.h"

namespace simt::ptx::testing {
namespace {

// One warp; each lane starts with its number in %r1, in[lane] in %r2 and %l2, and stores %r0 and whether %p0 holds.
struct LaneResults {
  std::vector<uint32_t> r;
  uint32_t p = 0; // bit i: of lane i
};

LaneResults run_warp(const std::string& instructions, const std::vector<uint64_t>& inputs) {
  const std::string text =
      ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out)\n{\n"
      ".reg .b32 %r<10>;\n.reg .b64 %l<10>;\n.reg .pred %p<4>;\n.reg .b64 %in, %out;\nmov.u32 %r1, %laneid;\n"
      "mul.wide.u32 %l1, %r1, 8;\nld.param.u64 %in, [in];\nadd.u64 %in, %in, %l1;\nld.global.b64 %l2, [%in];\n"
      "cvt.u32.u64 %r2, %l2;\nmov.u32 %r0, 0;\nsetp.ne.u32 %p0, 0, 0;\n" +
      instructions +
      "\nselp.b32 %r9, 1, 0, %p0;\nld.param.u64 %out, [out];\nadd.u64 %out, %out, %l1;\n"
      "st.global.v2.b32 [%out], {%r0, %r9};\nret;\n}\n";
  const Program program = Program::from_ptx(text, "test");
  const DeviceArray<uint64_t> in(inputs), out(32);
  launch(program, "k", {{1}, {32}}, LaunchOptions{}, in, out);
  LaneResults results;
  for (size_t lane = 0; lane < 32; ++lane) {
    results.r.push_back(static_cast<uint32_t>(out[lane]));
    results.p |= static_cast<uint32_t>(out[lane] >> 32) << lane;
  }
  return results;
}

std::vector<uint64_t> numbers(uint64_t factor) {
  std::vector<uint64_t> values(32);
  for (size_t i = 0; i < 32; ++i) values[i] = i * factor;
  return values;
}

TEST(Warp, VotesCountTheLanesOfTheMask) {
  const std::string odd = "and.b32 %r3, %r1, 1; setp.ne.u32 %p1, %r3, 0; ";
  EXPECT_EQ(run_warp(odd + "vote.sync.ballot.b32 %r0, %p1, 0xffffffff;", numbers(1)).r, std::vector<uint32_t>(32, 0xaaaaaaaa));
  EXPECT_EQ(run_warp(odd + "vote.sync.ballot.b32 %r0, !%p1, -1;", numbers(1)).r[3], 0x55555555u);
  EXPECT_EQ(run_warp(odd + "vote.sync.any.pred %p0, %p1, -1;", numbers(1)).p, 0xffffffffu);
  EXPECT_EQ(run_warp(odd + "vote.sync.all.pred %p0, %p1, -1;", numbers(1)).p, 0u);
  EXPECT_EQ(run_warp(odd + "vote.sync.uni.pred %p0, %p1, -1;", numbers(1)).p, 0u);
  EXPECT_EQ(run_warp("setp.ne.u32 %p1, 0, 0; vote.sync.uni.pred %p0, %p1, -1;", numbers(1)).p, 0xffffffffu);
  EXPECT_EQ(run_warp(odd + "@%p1 vote.sync.all.pred %p0, %p1, 0xaaaaaaaa;", numbers(1)).p, 0xaaaaaaaau);
}

TEST(Warp, ShufflesStayWithinTheirSegments) {
  for (uint32_t width : {32u, 8u}) {
    const uint32_t segment = (32 - width) << 8;
    const auto shuffle = [&](const std::string& mode, uint32_t b, uint32_t clamp) {
      return run_warp("shfl.sync." + mode + ".b32 %r0|%p0, %r2, " + std::to_string(b) + ", " + std::to_string(segment | clamp) + ", -1;",
                      numbers(10));
    };
    const LaneResults up = shuffle("up", 3, 0), down = shuffle("down", 3, 31), butterfly = shuffle("bfly", 5, 31),
                      index = shuffle("idx", 6, 31);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t in_segment = lane % width, first = lane - in_segment;
      EXPECT_EQ(up.r[lane], 10 * (in_segment >= 3 ? lane - 3 : lane));
      EXPECT_EQ(up.p >> lane & 1, in_segment >= 3);
      EXPECT_EQ(down.r[lane], 10 * (in_segment + 3 < width ? lane + 3 : lane));
      EXPECT_EQ(down.p >> lane & 1, in_segment + 3 < width);
      EXPECT_EQ(butterfly.r[lane], 10 * (lane ^ 5));
      EXPECT_EQ(index.r[lane], 10 * (first + 6));
    }
  }
}

TEST(Warp, ReductionsMatchesAndElections) {
  EXPECT_EQ(run_warp("redux.sync.add.u32 %r0, %r2, -1;", numbers(2)).r[7], 31u * 32);
  EXPECT_EQ(run_warp("redux.sync.add.s32 %r0, %r2, -1;", numbers(~uint64_t{0})).r[0], uint32_t(-31 * 16));
  EXPECT_EQ(run_warp("redux.sync.min.s32 %r0, %r2, -1;", numbers(~uint64_t{0})).r[0], uint32_t(-31));
  EXPECT_EQ(run_warp("redux.sync.max.u32 %r0, %r2, -1;", numbers(~uint64_t{0})).r[0], uint32_t(-1));
  EXPECT_EQ(run_warp("redux.sync.or.b32 %r0, %r2, -1;", numbers(1)).r[0], 31u);
  EXPECT_EQ(run_warp("redux.sync.xor.b32 %r0, %r2, -1;", numbers(1)).r[0], 0u);
  EXPECT_EQ(run_warp("redux.sync.and.b32 %r0, %r2, -1;", numbers(1)).r[0], 0u);
  EXPECT_EQ(run_warp("shr.u32 %r3, %r1, 3; match.any.sync.b32 %r0, %r3, -1;", numbers(1)).r[9], 0x0000ff00u);
  EXPECT_EQ(run_warp("match.any.sync.b64 %r0, %l2, -1;", numbers(1ull << 32)).r[9], 1u << 9);
  const LaneResults differ = run_warp("match.all.sync.b32 %r0|%p0, %r2, -1;", numbers(1));
  EXPECT_EQ(differ.r[0], 0u);
  EXPECT_EQ(differ.p, 0u);
  const LaneResults equal = run_warp("match.all.sync.b64 %r0|%p0, %l2, -1;", numbers(0));
  EXPECT_EQ(equal.r[31], 0xffffffffu);
  EXPECT_EQ(equal.p, 0xffffffffu);
  const LaneResults elected = run_warp("setp.ge.u32 %p1, %r1, 4; @%p1 elect.sync %r0|%p0, 0xfffffff0;", numbers(1));
  EXPECT_EQ(elected.r[20], 4u);
  EXPECT_EQ(elected.p, 1u << 4);
  EXPECT_EQ(run_warp("activemask.b32 %r0; bar.warp.sync -1;", numbers(1)).r[5] >> 5 & 1, 1u);
}

TEST(Warp, AMaskWithoutTheLaneItselfIsWrong) {
  const auto failure = failure_of([] { run_warp("vote.sync.ballot.b32 %r0, %p0, 0xffff;", numbers(1)); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kWrongMask);
  EXPECT_NE(complaint_about("shfl.down.b32 %r0, %r1, 1, 31;").find("without .sync"), std::string::npos);
  EXPECT_NE(complaint_about("redux.sync.add.f32 %r0, %r1, -1;").find("redux.sync.add.f32"), std::string::npos);
}

} // namespace
} // namespace simt::ptx::testing
