#include "module_reader.h"

#include "instruction_testing.h"

namespace simt::ptx::testing {
namespace {

const std::string kHeader = "//\n// Generated\n//\n.version 9.0\n.target sm_90\n.address_size 64\n";

Module read(const std::string& text) { return read_module(kHeader + text, "m"); }

std::string complaint(const std::string& text) {
  const auto failure = failure_of([&] { read(text); });
  if (!failure) return "reads";
  EXPECT_EQ(failure->kind, FailureKind::kUnsupported);
  return failure->what();
}

std::string body(const std::string& statements) { return ".visible .entry k()\n{\n" + statements + "\n}\n"; }

TEST(ModuleReader, ReadsVariablesWithAlignmentAndInitialValues) {
  const Module module = read(
      ".global .align 8 .b8 text[4] = {104, 105};\n.visible .const .align 4 .f32 half = 0f3F000000;\n"
      ".global .align 8 .u64 pointers[3] = {generic(text), text+2, 0};\n.extern .shared .align 16 .b8 dynamic[];\n"
      ".shared .align 4 .u32 counts[2][3];\n.weak .global .align 4 .s32 signs[2] = {-1, 0x10};\n.global .b32 a, b;\n");
  ASSERT_EQ(module.variables.size(), 8u);
  EXPECT_EQ(module.target, "sm_90");
  EXPECT_EQ(module.variables[0].alignment, 8u);
  EXPECT_EQ(module.variables[0].initial, (std::vector<uint8_t>{104, 105, 0, 0}));
  EXPECT_EQ(module.variables[1].space, StateSpace::kConst);
  EXPECT_EQ(module.variables[1].initial, (std::vector<uint8_t>{0, 0, 0, 0x3f}));
  EXPECT_EQ(module.variables[2].bytes, 24u);
  ASSERT_EQ(module.variables[2].addresses.size(), 2u);
  EXPECT_EQ(module.variables[2].addresses[1].offset, 8u);
  EXPECT_EQ(module.variables[2].addresses[1].symbol, "text");
  EXPECT_EQ(module.variables[2].addresses[1].displacement, 2);
  EXPECT_EQ(module.variables[3].space, StateSpace::kDynamicShared);
  EXPECT_EQ(module.variables[4].bytes, 24u);
  EXPECT_EQ(module.variables[5].initial, (std::vector<uint8_t>{255, 255, 255, 255, 16, 0, 0, 0}));
  EXPECT_EQ(module.variables[7].name, "b");
}

TEST(ModuleReader, ReadsParametersOfKernelsAndFunctions) {
  const Module module = read(
      ".visible .entry k(\n\t.param .u64 .ptr .global .align 4 k_param_0,\n\t.param .align 16 .b8 k_param_1[48],\n\t.param .f32 "
      "k_param_2\n)\n"
      ".maxntid 128, 2, 1\n.minnctapersm 4\n{\nret;\n}\n"
      ".func (.param .b32 func_retval0) _Z1fi(.param .b32 _Z1fi_param_0)\n{\nret;\n}\n.extern .func (.param .b32 r) vprintf(.param .b64 a, "
      ".param .b64 b)\n;\n.weak .func g()\n.noreturn\n;\n");
  ASSERT_EQ(module.functions.size(), 4u);
  const Function& kernel = module.functions[0];
  EXPECT_TRUE(kernel.is_kernel);
  EXPECT_EQ(kernel.max_threads, 256u);
  ASSERT_EQ(kernel.parameters.size(), 3u);
  EXPECT_EQ(kernel.variables[0].bytes, 8u);
  EXPECT_EQ(kernel.variables[0].alignment, 8u);
  EXPECT_EQ(kernel.variables[1].bytes, 48u);
  EXPECT_EQ(kernel.variables[1].alignment, 16u);
  EXPECT_EQ(module.functions[1].results.size(), 1u);
  EXPECT_FALSE(module.functions[2].is_defined);
  EXPECT_EQ(module.function("g"), &module.functions[3]);
  EXPECT_EQ(module.function("h"), nullptr);
}

TEST(ModuleReader, ResolvesOperands) {
  const Module module =
      read(body(".reg .b32 %r<3>, %r1<2>, %x;\n.reg .pred %p<2>;\n.shared .b32 s[4];\n"
                "@!%p1 ld.shared.v2.b32 {%r2, _}, [s+4];\nsetp.eq.and.b32 %p0|%p1, %r10, -3, !%p1;\nmov.b32 %x, %tid.x;\n"
                "atom.add.u32 _, [%x+-8], 0x1F;"));
  const Function& kernel = module.functions[0];
  ASSERT_EQ(kernel.instructions.size(), 4u);
  const ParsedInstruction& load = kernel.instructions[0];
  EXPECT_EQ(load.opcode, "ld");
  EXPECT_EQ(load.modifiers, (std::vector<std::string>{"shared", "v2", "b32"}));
  EXPECT_TRUE(load.guard->negated);
  EXPECT_EQ(kernel.registers[load.guard->index].name, "%p1");
  EXPECT_EQ(load.operands[0].elements[1].kind, OperandKind::kSink);
  EXPECT_EQ(load.operands[1].displacement, 4);
  EXPECT_EQ(load.operands[1].elements[0].kind, OperandKind::kVariable);
  const ParsedInstruction& compare = kernel.instructions[1];
  EXPECT_EQ(compare.operands[0].kind, OperandKind::kPair);
  EXPECT_EQ(kernel.registers[compare.operands[1].index].name, "%r10"); // of %r1<2>, not of %r<3>
  EXPECT_EQ(compare.operands[2].number, uint64_t(-3));
  EXPECT_TRUE(compare.operands[3].negated);
  EXPECT_EQ(kernel.instructions[2].operands[1].name, "%tid.x");
  EXPECT_EQ(kernel.instructions[3].operands[1].displacement, -8);
  EXPECT_EQ(kernel.instructions[3].operands[2].number, 31u);
}

TEST(ModuleReader, KnowsTheSourceLineOfEveryInstruction) {
  const Module module = read(body(".reg .b32 %r<3>;\n.loc 1 10 3\nmov.b32 %r1, 1;\n"
                                  ".loc\t2 120 5, function_name $L__info_string0, inlined_at 1 11 3\nmov.b32 %r1, 2;\n"
                                  ".loc 1 0 0\nmov.b32 %r1, 3;\n.loc 1 12 0, function_name $L__info_string0+7, inlined_at 1 9 1\nret;") +
                             ".file 1 \"kernel.cu\"\n.file\t2 \"/include/scan.cuh\", 1700000000, 345\n"
                             ".section .debug_str\n{\n$L__info_string0:\n.b8 95, 90\n.b8 0\n}\n.section\t.debug_loc\n{\n\t}\n");
  const auto& instructions = module.functions[0].instructions;
  EXPECT_EQ(module.files, (std::vector<std::string>{"", "kernel.cu", "/include/scan.cuh"}));
  EXPECT_EQ(instructions[0].source_line, 10u);
  EXPECT_EQ(instructions[1].source_file, 2u);
  EXPECT_EQ(instructions[1].source_line, 120u);
  EXPECT_EQ(instructions[2].source_line, 120u); // line 0 is the compiler's own
  EXPECT_EQ(instructions[3].source_line, 12u);
  EXPECT_EQ(instructions[0].ptx_line, 11u);
}

TEST(ModuleReader, LabelsBelongToTheirScope) {
  const Module module =
      read(body(".reg .b32 %r<2>;\nbra A;\n{\n.reg .b32 %r1;\nbra A;\nA:\nbra B;\n}\nA:\nB:\nT: .branchtargets\n A,\n B;\n"
                "brx.idx %r0, T;\n.pragma \"nounroll\";\nret;"));
  const Function& kernel = module.functions[0];
  EXPECT_EQ(kernel.registers.size(), 3u);
  const auto target = [&](size_t i) { return kernel.labels[kernel.instructions[i].operands[0].index]; };
  EXPECT_EQ(target(0), 3u);
  EXPECT_EQ(target(1), 2u);
  EXPECT_EQ(target(2), 3u);
  ASSERT_EQ(kernel.tables.size(), 1u);
  EXPECT_EQ(kernel.labels[kernel.tables[0][1]], 3u);
  EXPECT_EQ(kernel.instructions[3].operands[1].kind, OperandKind::kTargets);
}

TEST(ModuleReader, StopsAtWhatItDoesNotKnowWithTextAndLine) {
  EXPECT_NE(complaint(".surprise 1;").find("m:7: unknown directive '.surprise'"), std::string::npos) << complaint(".surprise 1;");
  EXPECT_NE(complaint(".global .u31 x;").find("unknown type '.u31'"), std::string::npos);
  EXPECT_NE(complaint(".visible .entry k()\n.reqnctapercluster 2\n{ }").find("m:8: "), std::string::npos);
  EXPECT_NE(complaint(".extern .global .u32 x;").find("a variable of another module"), std::string::npos);
  EXPECT_NE(complaint(".global .u32 x[2] = {1, 2, 3};").find("more initial values than elements"), std::string::npos);
  EXPECT_NE(complaint(body("bra L;")).find("m:9: unknown name 'L'"), std::string::npos) << complaint(body("bra L;"));
  EXPECT_NE(complaint(body("L: L: ret;")).find("a label twice"), std::string::npos);
  EXPECT_NE(complaint(body("P: .callprototype _ (.param .b32 _);")).find(".callprototype"), std::string::npos);
  EXPECT_NE(complaint(body("mov.b32 %r1, 1")).find("m:10: expected ';' but got '}'"), std::string::npos);
  EXPECT_NE(complaint(".visible .entry k() { ret;").find("a { without its }"), std::string::npos);
  EXPECT_NE(complaint("?").find("unknown character '?'"), std::string::npos);
  EXPECT_NE(complaint("/* never").find("a comment does not end"), std::string::npos);
  const auto of_32_bits = failure_of([] { read_module(".version 9.0\n.target sm_90\n.address_size 32\n", "m"); });
  EXPECT_NE(std::string(of_32_bits.value().what()).find("not of 64 bits"), std::string::npos);
}

TEST(Program, StopsAtUnknownInstructionsAndModifiersWithTextAndLine) {
  const std::string unknown = complaint_about("wgmma.fence.sync.aligned;", 0);
  EXPECT_NE(unknown.find("unknown instruction wgmma: wgmma.fence.sync.aligned"), std::string::npos) << unknown;
  EXPECT_NE(unknown.find("test:21: "), std::string::npos) << unknown;
  EXPECT_NE(complaint_about("add.fast.s32 %r0, %r1, %r2;").find("unknown modifier .fast: add.fast.s32 %r0, %r1, %r2"), std::string::npos);
  EXPECT_NE(complaint_about("add.s32 %r0, %r1, %r2, %r3;").find("too many operands"), std::string::npos);
  EXPECT_NE(complaint_about("add.s32 %r0, %r1;").find("too few operands"), std::string::npos);
  EXPECT_NE(complaint_about("add.s32 %r0, %r1, [%l1];").find("an operand of a kind that is not known here"), std::string::npos);
  EXPECT_NE(complaint_about("shl.u32 %r0, %r1, 1;").find("the type is missing"), std::string::npos);
  EXPECT_NE(complaint_about("mbarrier.init.shared.b64 [%r1], 1;").find("unknown instruction mbarrier"), std::string::npos);
}

} // namespace
} // namespace simt::ptx::testing
