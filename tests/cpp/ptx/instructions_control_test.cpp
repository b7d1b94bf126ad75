#include "counters.h"
#include "instruction_testing.h"

namespace simt::ptx::testing {
namespace {

TEST(Move, CopiesNumbersSpecialRegistersAndAddresses) {
  expect({
      {"mov.u32 %r0, 0xFFFFFFFF;", {}, 0xffffffff},
      {"mov.b32 %r0, -5;", {}, uint32_t(-5)},
      {"mov.f32 %r0, 0f3F800000;", {}, f(1)},
      {"mov.f64 %l0, 0d3FF0000000000000;", {}, d(1)},
      {"mov.b16 %h0, 0x3C00;", {}, 0x3c00},
      {"mov.pred %p0, %p1;", {7}, 1},
      {"mov.u32 %r0, %ntid.x;", {}, 1},
      {"mov.u32 %r0, WARP_SZ;", {}, 32},
      {"mov.u32 %r0, %lanemask_ge;", {}, 0xffffffff},
      {"mov.u32 %r0, %lanemask_lt;", {}, 0},
      {"mov.u32 %r0, %lanemask_le;", {}, 1},
      {"add.s32 %r0, %laneid, 5;", {}, 5},
      {"mov.u32 %r1, %clock; mov.u32 %r2, %clock; setp.lt.u32 %p0, %r1, %r2;", {}, 1},
  });
  EXPECT_NE(complaint_about("mov.u32 %r0, %envreg1;").find("unknown special register %envreg1"), std::string::npos);
  EXPECT_NE(complaint_about("mov.u64 %r0, %l1;").find("does not fit the type"), std::string::npos);
  EXPECT_NE(complaint_about("mov.f64 %l0, 0f3F800000;").find("does not fit the type"), std::string::npos);
}

TEST(Move, JoinsAndSplitsVectors) {
  expect({
      {"mov.b32 %r0, {%h1, %h2};", {0x1234, 0x5678}, 0x56781234},
      {"mov.b64 %l0, {%r1, %r2};", {0x12345678, 0x9abcdef0}, 0x9abcdef012345678},
      {"mov.b64 %l0, {%h1, %h2, %h3, %h4};", {1, 2, 3, 4}, 0x0004000300020001},
      {"mov.b32 {%h1, %h0}, %r1;", {0x56781234}, 0x5678},
      {"mov.b64 {_, %r0}, %l1;", {0x9abcdef012345678}, 0x9abcdef0},
      {"mov.b64 {%h5, %h6, %h0, %h7}, %l1;", {0x0004000300020001}, 3},
  });
}

TEST(Control, GuardsAndBranches) {
  expect({
      {"@%p1 mov.u32 %r0, 5;", {1}, 5},
      {"@!%p1 mov.u32 %r0, 5;", {1}, 0},
      {"mov.u32 %r0, 0; LOOP: add.u32 %r0, %r0, 3; sub.u32 %r1, %r1, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra LOOP;", {4}, 12},
      {"bra.uni END; mov.u32 %r0, 5; END:", {}, 0},
      {"TABLE: .branchtargets A, B, C; brx.idx %r1, TABLE; A: mov.u32 %r0, 10; bra END; B: mov.u32 %r0, 20; bra END; C: mov.u32 %r0, 30; "
       "END:",
       {1},
       20},
      // Scopes: a register and a label of the inner one hide those of the outer one.
      {"mov.u32 %r0, 1; { .reg .u32 %r0; mov.u32 %r0, 7; bra DONE; DONE: } bra DONE; mov.u32 %r0, 9; DONE:", {}, 1},
      {"nanosleep.u32 100; griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 %r0, 1;", {}, 1},
      {"membar.gl; membar.cta; membar.sys; fence.sc.gpu; fence.acq_rel.cta; fence.proxy.async; mov.u32 %r0, 1;", {}, 1},
      {"bar.sync 0; barrier.sync 1, 32; barrier.cta.sync.aligned 2; bar.cta.sync 3; bar.red.popc.u32 %r0, 0, %p1;", {1}, 1},
      {"barrier.cta.red.and.aligned.pred %p0, 0, !%p1;", {1}, 0},
      {"bar.red.or.pred %p0, 0, 32, %p1;", {1}, 1},
  });
}

TEST(Control, MistakesStopTheLaunch) {
  const auto failure_in = [](const std::string& instructions) {
    const auto failure = failure_of([&] { evaluate_all(instructions, {3}); });
    return failure ? failure->kind : FailureKind::kUnsupported;
  };
  EXPECT_EQ(failure_in("trap;"), FailureKind::kTrap);
  EXPECT_EQ(failure_in("brkpt;"), FailureKind::kTrap);
  EXPECT_EQ(failure_in("TABLE: .branchtargets A, A; brx.idx %r1, TABLE; A:"), FailureKind::kOutOfBounds);
  EXPECT_EQ(failure_in("bar.sync 16;"), FailureKind::kBarrier);
  EXPECT_NE(complaint_about("bar.arrive 1, 64;").find("bar.arrive"), std::string::npos);
  EXPECT_NE(complaint_about("fence.gpu.everything;").find("unknown modifier .everything"), std::string::npos);
  EXPECT_NE(complaint_about("bra NOWHERE;").find("unknown name 'NOWHERE'"), std::string::npos);
  EXPECT_NE(complaint_about("call nothing;").find("unknown function nothing"), std::string::npos);
}

TEST(Control, AnEndlessLoopRunsOutOfItsBudget) {
  const Program program = Program::from_ptx(ptx_around("LOOP: bra LOOP;", 0), "test");
  const DeviceArray<uint64_t> in(std::vector<uint64_t>(1)), out(7);
  LaunchOptions options;
  options.instruction_budget = 3000000;
  const auto failure = failure_of([&] { launch(program, "k", {{1}, {1}}, options, in, out); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kHang);
}

// A function with parameters in .param, called with arguments in .param of a scope of its own.
const std::string kFunctions = R"(
.func (.param .align 8 .b8 result[16]) swap(.param .b64 first, .param .align 8 .b8 second[8]) {
  .reg .b64 %a;
  ld.param.b64 %a, [first];
  st.param.b64 [result+8], %a;
  ld.param.b64 %a, [second];
  st.param.b64 [result], %a;
}
.func (.param .b32 sum) sum_to(.param .b32 n) {
  .reg .b32 %n, %rest;
  .reg .pred %done;
  .local .align 4 .b8 mine[4];
  ld.param.u32 %n, [n];
  st.local.u32 [mine], %n;
  setp.eq.u32 %done, %n, 0;
  @%done bra END;
  sub.u32 %n, %n, 1;
  { .param .b32 a; .param .b32 r; st.param.b32 [a], %n; call.uni (r), sum_to, (a); ld.param.b32 %rest, [r]; }
  ld.local.u32 %n, [mine];
  add.u32 %n, %n, %rest;
END:
  st.param.b32 [sum], %n;
  ret.uni;
}
.func leave() { exit; }
.extern .func elsewhere();
)";

TEST(Calls, PassArgumentsAndResultsByValue) {
  const Results swapped = evaluate_all(
      "{ .param .b64 a; .param .align 8 .b8 b[8]; .param .align 8 .b8 r[16]; st.param.b64 [a], %l1; st.param.b64 [b+0], %l2;\n"
      "call (r), swap, (a, b); ld.param.v2.b64 {%l0, %l8}, [r]; }",
      {5, 6}, kFunctions);
  EXPECT_EQ(swapped.l, 6u);
  EXPECT_EQ(swapped.l8, 5u);
}

TEST(Calls, MayRecurse) {
  const std::string call = "{ .param .b32 a; .param .b32 r; st.param.b32 [a], %r1; call (r), sum_to, (a); ld.param.b32 %r0, [r]; }";
  EXPECT_EQ(evaluate_all(call, {100}, kFunctions).r, 5050u);
  const auto failure = failure_of([&] { evaluate_all(call, {1000000}, kFunctions); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kOutOfBounds) << failure->what();
}

TEST(Calls, ExitEndsTheThreadAndNotOnlyTheFunction) {
  const Program program = Program::from_ptx(ptx_around("mov.u32 %r0, 1; call leave;", 0, kFunctions), "test");
  const DeviceArray<uint64_t> in(1), out(std::vector<uint64_t>(7, 99));
  launch(program, "k", {{1}, {1}}, LaunchOptions{}, in, out);
  EXPECT_EQ(out[1], 99u);
}

TEST(Calls, MustFitTheDeclaration) {
  const auto complaint = [](const std::string& call) {
    return failure_of([&] { Program::from_ptx(ptx_around(call, 1, kFunctions), "test"); }).value().what() + std::string();
  };
  EXPECT_NE(complaint("{ .param .b32 a; call swap, (a, a); }").find("differ from the declaration of swap"), std::string::npos);
  EXPECT_NE(complaint("call elsewhere;").find("only declared"), std::string::npos);
  EXPECT_NE(complaint("call %l1;").find("no function known by name"), std::string::npos);
}

} // namespace
} // namespace simt::ptx::testing
