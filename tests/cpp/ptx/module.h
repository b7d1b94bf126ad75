// What a PTX text says, before anything is executed: functions, variables and instructions whose operands are resolved to the
// register, variable, label or number they name. Opcode and modifiers stay words: instructions.h gives them a meaning.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "simt.h"

namespace simt::ptx {

enum class Type : uint8_t {
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kF16,
  kF16x2,
  kBF16,
  kBF16x2,
  kF32,
  kF64,
  kPredicate,
};

inline constexpr const char* kTypeNames[] = {"u8",  "u16", "u32",  "u64", "s8",    "s16",  "s32",    "s64", "b8",  "b16",
                                             "b32", "b64", "b128", "f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "pred"};
std::optional<Type> type_named(std::string_view name); // "u32", without the dot
size_t bytes_of(Type type);                            // 1 for a predicate

// State space of a variable.
enum class StateSpace : uint8_t { kGlobal, kConst, kShared, kDynamicShared, kLocal, kParam };

// One word of an initial value whose bits are the address of another variable.
struct AddressInInitial {
  size_t offset = 0; // in bytes, in the variable that holds it
  std::string symbol;
  int64_t displacement = 0;
};

struct Variable {
  std::string name;
  StateSpace space = StateSpace::kGlobal;
  uint64_t alignment = 1;
  uint64_t bytes = 0;           // 0: an array of unknown length, as dynamic shared memory is
  std::vector<uint8_t> initial; // empty: zero
  std::vector<AddressInInitial> addresses;
};

// A variable of the module or of a function.
struct VariableId {
  bool of_module = false;
  uint32_t index = 0;
};

struct Register {
  std::string name;
  Type type;
};

enum class OperandKind : uint8_t {
  kRegister, // %r1, !%p1
  kSpecial,  // %tid.x
  kNumber,   // 7, -1, 0f3F800000 (its bits)
  kVariable, // the address of a variable, sym+4
  kAddress,  // [base+displacement]; `elements` holds the base
  kVector,   // {%r1, %r2}
  kPair,     // %r1|%p1
  kList,     // (a, b) of a call
  kLabel,
  kFunction,
  kTargets, // the table of a brx.idx: `index` in Function::tables
  kSink,    // _
};

enum class NumberKind : uint8_t { kInteger, kFloat32, kFloat64 };

struct Operand {
  OperandKind kind = OperandKind::kSink;
  NumberKind number_kind = NumberKind::kInteger;
  bool negated = false;
  uint32_t index = 0; // of the register, label or table
  VariableId variable;
  uint64_t number = 0;      // bits; integers sign-extended
  int64_t displacement = 0; // kVariable, kAddress
  std::string name;         // kSpecial, kFunction
  std::vector<Operand> elements;
};

struct ParsedInstruction {
  std::string opcode;                 // "ld"
  std::vector<std::string> modifiers; // "global", "v4", "f32"
  std::vector<Operand> operands;
  std::optional<Operand> guard; // @%p1, @!%p1
  std::string text;             // as written, white space collapsed
  uint32_t ptx_line = 0;
  uint32_t source_file = 0; // number of .file; 0: none
  uint32_t source_line = 0;
};

struct Function {
  std::string name;
  bool is_kernel = false;
  bool is_defined = false; // false: only declared
  std::vector<Register> registers;
  std::vector<Variable> variables;  // of the spaces shared, local and param, nested scopes included
  std::vector<uint32_t> parameters; // which of the variables
  std::vector<uint32_t> results;
  std::vector<ParsedInstruction> instructions;
  std::vector<uint32_t> labels;              // index of the instruction behind each label
  std::vector<std::vector<uint32_t>> tables; // .branchtargets: labels
  uint64_t max_threads = 0;                  // .maxntid; 0: not given
};

struct Module {
  std::string name;
  std::string target; // "sm_90"
  std::vector<Variable> variables;
  std::vector<Function> functions;
  std::vector<std::string> files; // by number of .file

  const Function* function(const std::string& name) const;
};

} // namespace simt::ptx
