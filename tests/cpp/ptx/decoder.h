// Gives one parsed instruction its meaning. A decode function takes the modifiers that it knows and the operands in their order;
// what is left over at the end stops the program from loading, so that nothing is ever skipped.
#pragma once

#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "code.h"
#include "module.h"

namespace simt::ptx {

class CodeBuilder;

class Decoder {
 public:
  Decoder(const ParsedInstruction& parsed, CodeBuilder& builder) : parsed_(parsed), builder_(builder), taken_(parsed.modifiers.size()) {}

  // ---- modifiers; in any order but for types, which come as the destination's and then the source's

  bool take(std::string_view modifier); // true if it is there
  void require(std::string_view modifier);
  std::optional<size_t> take_one_of(std::initializer_list<std::string_view> modifiers); // which of them is there
  size_t require_one_of(std::initializer_list<std::string_view> modifiers);
  Type take_type(std::initializer_list<Type> allowed);
  std::optional<Type> take_optional_type(std::initializer_list<Type> allowed);

  // ---- operands, each call takes the next one

  size_t operands_left() const { return parsed_.operands.size() - next_operand_; }
  const Operand& peek_operand() const;
  const Operand& take_operand();
  void destination(Type type);                    // into result.to
  void optional_predicate_destination(Type type); // %r|%p or %r alone: two of result.to
  void source(Type type);                         // into result.from
  void operands(Type type, size_t sources);       // a destination and sources of one type
  void predicate_source();                        // %p or !%p: into result.from and result.negated_predicate
  void vector_destination(Type type, size_t count);
  void vector_source(Type type, size_t count);
  void address(); // [base+displacement], into result.from and result.displacement
  // The next source must be a number known now.
  uint64_t immediate();

  // For operands of a special shape.
  Slot slot_of_source(const Operand& operand, Type type);
  Slot slot_of_destination(const Operand& operand, Type type);
  Slot slot_of_number(uint64_t number);
  const Register& register_of(const Operand& operand) const;
  void add_destination(Slot slot);
  void add_source(Slot slot);

  [[noreturn]] void fail(const std::string& why) const; // with the text and its line
  void finish();                                        // fails if a modifier or an operand is left
  const std::string& opcode() const { return parsed_.opcode; }
  const ParsedInstruction& parsed() const { return parsed_; }
  CodeBuilder& builder() { return builder_; }

  Instruction result;

 private:
  const ParsedInstruction& parsed_;
  CodeBuilder& builder_;
  std::vector<bool> taken_;
  size_t next_operand_ = 0, next_to_ = 0, next_from_ = 0;
};

using Decode = Execute (*)(Decoder&);

struct Opcode {
  std::string_view name;
  Decode decode;
};

std::span<const Opcode> integer_opcodes();
std::span<const Opcode> bit_opcodes();
std::span<const Opcode> float_opcodes();
std::span<const Opcode> convert_opcodes();
std::span<const Opcode> compare_opcodes();
std::span<const Opcode> memory_opcodes();
std::span<const Opcode> atomic_opcodes();
std::span<const Opcode> control_opcodes();
std::span<const Opcode> warp_opcodes();

// Some opcodes have integer and floating point forms; the file of the integers decodes those names and asks this first.
bool is_float(Type type);
bool names_float_type(const ParsedInstruction& parsed); // the first type among the modifiers

inline constexpr std::initializer_list<Type> kIntegers16To64 = {Type::kU16, Type::kU32, Type::kU64, Type::kS16, Type::kS32, Type::kS64};
inline constexpr std::initializer_list<Type> kIntegers32To64 = {Type::kU32, Type::kU64, Type::kS32, Type::kS64};
inline constexpr std::initializer_list<Type> kSigned16To64 = {Type::kS16, Type::kS32, Type::kS64};
inline constexpr std::initializer_list<Type> kBits16To64 = {Type::kB16, Type::kB32, Type::kB64};
inline constexpr std::initializer_list<Type> kBits32To64 = {Type::kB32, Type::kB64};

// Calls make(T{}) with the C++ type of an integer or bit type.
template <typename Make>
Execute with_integer(Type type, Make make) {
  switch (type) {
    case Type::kU8:
    case Type::kB8:
      return make(uint8_t{});
    case Type::kU16:
    case Type::kB16:
      return make(uint16_t{});
    case Type::kU32:
    case Type::kB32:
      return make(uint32_t{});
    case Type::kU64:
    case Type::kB64:
      return make(uint64_t{});
    case Type::kS8:
      return make(int8_t{});
    case Type::kS16:
      return make(int16_t{});
    case Type::kS32:
      return make(int32_t{});
    case Type::kS64:
      return make(int64_t{});
    default:
      return nullptr;
  }
}

// ---- the shapes that most instructions have

template <auto operation, typename T>
void execute_unary(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], operation(thread.read<T>(i.from[0])));
}

template <auto operation, typename A, typename B>
void execute_binary(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], operation(thread.read<A>(i.from[0]), thread.read<B>(i.from[1])));
}

template <auto operation, typename A, typename B, typename C>
void execute_ternary(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], operation(thread.read<A>(i.from[0]), thread.read<B>(i.from[1]), thread.read<C>(i.from[2])));
}

} // namespace simt::ptx
