// Registers that share slots behave as if each had its own: random programs against a machine that gives them one.
#include <random>
#include <sstream>

#include "code_builder.h"
#include "instruction_testing.h"
#include "module_reader.h"

namespace simt::ptx::testing {
namespace {

constexpr size_t kRegisters = 40, kPredicates = 10, kInstructions = 100;
constexpr uint32_t kSteps = 200; // branches; then a program runs to its end

struct RandomInstruction {
  enum Kind { kAdd, kCompare, kBranch, kTable } kind;
  int guard; // of the predicates; negative: none
  bool negated;
  size_t to, a, b;           // registers; of kCompare `to` is a predicate
  size_t target[2] = {0, 0}; // of kTable, which looks at the low bit of a, both
};

std::vector<RandomInstruction> random_program(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](size_t end) { return random() % end; };
  std::vector<RandomInstruction> program;
  for (size_t n = 0; n < kInstructions; ++n) {
    // Each part of the program has its own registers, so that their lifetimes are short but for the branches.
    const auto near = [&](size_t end) { return (n * end / kInstructions + below(3)) % end; };
    const size_t kind = below(20);
    RandomInstruction i{kind < 14   ? RandomInstruction::kAdd
                        : kind < 18 ? RandomInstruction::kCompare
                        : kind < 19 ? RandomInstruction::kBranch
                                    : RandomInstruction::kTable,
                        below(3) == 0 ? static_cast<int>(near(kPredicates)) : -1,
                        below(2) == 0,
                        near(kRegisters),
                        near(kRegisters),
                        near(kRegisters),
                        {below(kInstructions), below(kInstructions)}};
    if (i.kind == RandomInstruction::kCompare) i.to = near(kPredicates);
    program.push_back(i);
  }
  return program;
}

std::string text_of(const std::vector<RandomInstruction>& program) {
  std::ostringstream text;
  text << ".reg .b32 %x<" << kRegisters << ">, %steps, %index;\n.reg .pred %q<" << kPredicates << ">, %go;\nmov.u32 %steps, 0;\n";
  for (size_t n = 0; n < program.size(); ++n) {
    const RandomInstruction& i = program[n];
    text << "L" << n << ": mad.lo.u32 %r0, %r0, 3, %x" << i.a << ";\n";
    const bool branches = i.kind == RandomInstruction::kBranch || i.kind == RandomInstruction::kTable;
    if (i.kind == RandomInstruction::kTable)
      text << "and.b32 %index, %x" << i.a << ", 1;\nT" << n << ": .branchtargets L" << i.target[0] << ", L" << i.target[1] << ";\n";
    if (branches) {
      text << "add.u32 %steps, %steps, 1;\nsetp.lt" << (i.guard < 0 ? "" : ".and") << ".u32 %go, %steps, " << kSteps;
      if (i.guard >= 0) text << (i.negated ? ", !%q" : ", %q") << i.guard;
      text << ";\n@%go ";
    } else if (i.guard >= 0) {
      text << (i.negated ? "@!%q" : "@%q") << i.guard << " ";
    }
    if (i.kind == RandomInstruction::kAdd)
      text << "add.u32 %x" << i.to << ", %x" << i.a << ", %x" << i.b << ";\n";
    else if (i.kind == RandomInstruction::kCompare)
      text << "setp.lt.u32 %q" << i.to << ", %x" << i.a << ", %x" << i.b << ";\n";
    else if (i.kind == RandomInstruction::kBranch)
      text << "bra L" << i.target[0] << ";\n";
    else
      text << "brx.idx %index, T" << n << ";\n";
  }
  return text.str();
}

uint32_t result_of(const std::vector<RandomInstruction>& program) {
  std::vector<uint32_t> x(kRegisters, 0xeeeeeeee); // what registers hold before they are written
  std::vector<bool> q(kPredicates, true);
  uint32_t steps = 0, result = 0;
  for (size_t at = 0; at < program.size();) {
    const RandomInstruction& i = program[at++];
    result = result * 3 + x[i.a];
    const bool executed = i.guard < 0 || q[static_cast<size_t>(i.guard)] != i.negated;
    if (i.kind == RandomInstruction::kBranch || i.kind == RandomInstruction::kTable) {
      if (++steps < kSteps && executed) at = i.target[i.kind == RandomInstruction::kTable ? x[i.a] & 1 : 0];
    } else if (executed && i.kind == RandomInstruction::kAdd) {
      x[i.to] = x[i.a] + x[i.b];
    } else if (executed) {
      q[i.to] = x[i.a] < x[i.b];
    }
  }
  return result;
}

TEST(SlotSharing, ChangesNoResult) {
  for (uint32_t seed = 0; seed < 1000; ++seed) {
    const std::vector<RandomInstruction> program = random_program(seed);
    ASSERT_EQ(evaluate_all(text_of(program), {}).r, result_of(program)) << "seed " << seed << "\n" << text_of(program);
  }
}

TEST(SlotSharing, GivesAChainOfResultsFewSlots) {
  std::string chain = ".reg .b32 %x<1000>;\nmov.u32 %x0, %r1;\n";
  for (int n = 1; n < 1000; ++n) chain += "add.u32 %x" + std::to_string(n) + ", %x" + std::to_string(n - 1) + ", %r1;\n";
  chain += "mov.u32 %r0, %x999;";
  EXPECT_EQ(evaluate(chain, {3}), 3000u);
  const Module module = read_module(ptx_around(chain, 1), "test");
  const std::vector<uint64_t> no_addresses;
  EXPECT_LT(CodeBuilder({module, no_addresses, {}}, module.functions[0], {0, 0}, 0).build().slots, 40u);
}

} // namespace
} // namespace simt::ptx::testing
