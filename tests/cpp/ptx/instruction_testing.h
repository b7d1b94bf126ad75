// Runs one instruction: evaluate("add.u32 %r0, %r1, %r2;", {1, 2}).
//
// Input n is in %hn, %rn, %ln (its low 16, 32 and 64 bits) and in %pn (whether it is not 0). The result is what the instruction puts
// into %h0, %r0, %l0, %p0; a second result into %r8, %l8 or %p8. The text may be several instructions, with labels and scopes.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "program_testing.h"

namespace simt::ptx::testing {

struct Results {
  uint64_t h = 0, r = 0, l = 0, p = 0, r8 = 0, l8 = 0, p8 = 0;
};

inline std::string ptx_around(const std::string& instructions, size_t num_inputs, const std::string& declarations = "") {
  std::string text = ".version 8.0\n.target sm_90\n.address_size 64\n" + declarations +
                     ".visible .entry k(.param .u64 in, .param .u64 out)\n{\n.reg .b16 %h<10>;\n.reg .b32 %r<10>;\n.reg .b64 %l<10>;\n"
                     ".reg .pred %p<10>;\n.reg .b64 %in, %out;\n.reg .b32 %flag;\nld.param.u64 %in, [in];\nld.param.u64 %out, [out];\n";
  for (const char* first : {"mov.b16 %h0, 0;\nmov.b32 %r0, 0;\nmov.b64 %l0, 0;\nsetp.ne.u32 %p0, 0, 0;\n",
                            "mov.b32 %r8, 0;\nmov.b64 %l8, 0;\nsetp.ne.u32 %p8, 0, 0;\n"})
    text += first;
  for (size_t n = 1; n <= num_inputs; ++n) {
    const std::string i = std::to_string(n);
    text += "ld.global.b64 %l" + i + ", [%in+" + std::to_string(8 * (n - 1)) + "];\ncvt.u16.u64 %h" + i + ", %l" + i + ";\ncvt.u32.u64 %r" +
            i + ", %l" + i + ";\nsetp.ne.u64 %p" + i + ", %l" + i + ", 0;\n";
  }
  text += instructions + "\n";
  text +=
      "st.global.b16 [%out], %h0;\nst.global.b32 [%out+8], %r0;\nst.global.b64 [%out+16], %l0;\nselp.b32 %flag, 1, 0, %p0;\n"
      "st.global.b32 [%out+24], %flag;\nst.global.b32 [%out+32], %r8;\nst.global.b64 [%out+40], %l8;\nselp.b32 %flag, 1, 0, %p8;\n"
      "st.global.b32 [%out+48], %flag;\nret;\n}\n";
  return text;
}

inline Results evaluate_all(const std::string& instructions, const std::vector<uint64_t>& inputs, const std::string& declarations = "") {
  const Program program = Program::from_ptx(ptx_around(instructions, inputs.size(), declarations), "test");
  const DeviceArray<uint64_t> in(inputs), out(std::vector<uint64_t>(7, 0));
  launch(program, "k", {{1}, {1}}, LaunchOptions{}, in, out);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

// The result in the register that the text names.
inline uint64_t evaluate(const std::string& instructions, const std::vector<uint64_t>& inputs) {
  const Results results = evaluate_all(instructions, inputs);
  if (instructions.find("%h0") != std::string::npos) return results.h;
  if (instructions.find("%l0") != std::string::npos) return results.l;
  return instructions.find("%p0") != std::string::npos ? results.p : results.r;
}

struct Case {
  const char* instruction;
  std::vector<uint64_t> inputs;
  uint64_t expected;
};

inline void expect(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    std::string inputs;
    for (const uint64_t input : c.inputs) {
      char text[32];
      std::snprintf(text, sizeof text, " %#llx", static_cast<unsigned long long>(input));
      inputs += text;
    }
    const uint64_t result = evaluate(c.instruction, c.inputs);
    EXPECT_EQ(result, c.expected) << std::hex << result << " instead of " << c.expected << " from" << inputs << " by " << c.instruction;
  }
}

inline uint64_t f(float value) { return std::bit_cast<uint32_t>(value); }
inline uint64_t d(double value) { return std::bit_cast<uint64_t>(value); }

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr uint64_t kQuietNan = 0x7fc00000, kOtherNan = 0xffc12345, kSignalingNan = 0x7f800001, kCanonicalNan = 0x7fffffff;
inline constexpr uint64_t kCanonicalNan64 = 0x7ff8000000000000;

// The message with which a text does not load, or "loads".
inline std::string complaint_about(const std::string& instructions, size_t num_inputs = 4) {
  const auto failure = failure_of([&] { Program::from_ptx(ptx_around(instructions, num_inputs), "test"); });
  if (!failure) return "loads";
  EXPECT_EQ(failure->kind, FailureKind::kUnsupported);
  return failure->what();
}

} // namespace simt::ptx::testing
