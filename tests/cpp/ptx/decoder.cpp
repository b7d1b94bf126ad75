#include "decoder.h"

#include <algorithm>
#include <iterator>

#include "code_builder.h"

namespace simt::ptx {
namespace {

struct SpecialName {
  std::string_view name;
  Special special;
};

constexpr SpecialName kSpecials[] = {
    {"%tid.x", Special::kTidX},
    {"%tid.y", Special::kTidY},
    {"%tid.z", Special::kTidZ},
    {"%ntid.x", Special::kNtidX},
    {"%ntid.y", Special::kNtidY},
    {"%ntid.z", Special::kNtidZ},
    {"%ctaid.x", Special::kCtaidX},
    {"%ctaid.y", Special::kCtaidY},
    {"%ctaid.z", Special::kCtaidZ},
    {"%nctaid.x", Special::kNctaidX},
    {"%nctaid.y", Special::kNctaidY},
    {"%nctaid.z", Special::kNctaidZ},
    {"%laneid", Special::kLaneId},
    {"%warpid", Special::kWarpId},
    {"%nwarpid", Special::kNwarpId},
    {"%lanemask_eq", Special::kLanemaskEq},
    {"%lanemask_lt", Special::kLanemaskLt},
    {"%lanemask_le", Special::kLanemaskLe},
    {"%lanemask_gt", Special::kLanemaskGt},
    {"%lanemask_ge", Special::kLanemaskGe},
    {"%smid", Special::kZero},
    {"%nsmid", Special::kOne},
    {"%gridid", Special::kZero},
    {"%cluster_ctarank", Special::kZero},
    {"%cluster_nctarank", Special::kOne},
    {"%total_smem_size", Special::kTotalSharedBytes},
    {"%dynamic_smem_size", Special::kDynamicSharedBytes},
    {"%clock", Special::kClock},
    {"%clock64", Special::kClock},
    {"%globaltimer", Special::kClock},
};

} // namespace

bool is_float(Type type) { return type >= Type::kF16 && type <= Type::kF64; }

bool names_float_type(const ParsedInstruction& parsed) {
  for (const std::string& modifier : parsed.modifiers)
    if (const auto type = type_named(modifier)) return is_float(*type);
  return false;
}

bool Decoder::take(std::string_view modifier) {
  for (size_t i = 0; i < parsed_.modifiers.size(); ++i) {
    if (taken_[i] || parsed_.modifiers[i] != modifier) continue;
    taken_[i] = true;
    return true;
  }
  return false;
}

void Decoder::require(std::string_view modifier) {
  if (!take(modifier)) fail("without ." + std::string(modifier));
}

std::optional<size_t> Decoder::take_one_of(std::initializer_list<std::string_view> modifiers) {
  size_t index = 0;
  for (const std::string_view modifier : modifiers) {
    if (take(modifier)) return index;
    ++index;
  }
  return std::nullopt;
}

size_t Decoder::require_one_of(std::initializer_list<std::string_view> modifiers) {
  const auto index = take_one_of(modifiers);
  if (!index) fail("without ." + std::string(*modifiers.begin()) + " or one like it");
  return *index;
}

std::optional<Type> Decoder::take_optional_type(std::initializer_list<Type> allowed) {
  for (size_t i = 0; i < parsed_.modifiers.size(); ++i) {
    const auto type = taken_[i] ? std::nullopt : type_named(parsed_.modifiers[i]);
    if (!type) continue;
    if (std::find(allowed.begin(), allowed.end(), *type) == allowed.end()) return std::nullopt;
    taken_[i] = true;
    return type;
  }
  return std::nullopt;
}

Type Decoder::take_type(std::initializer_list<Type> allowed) {
  const auto type = take_optional_type(allowed);
  if (!type) fail("the type is missing or none that is known here");
  return *type;
}

const Operand& Decoder::peek_operand() const {
  if (operands_left() == 0) fail("too few operands");
  return parsed_.operands[next_operand_];
}

const Operand& Decoder::take_operand() {
  const Operand& operand = peek_operand();
  ++next_operand_;
  return operand;
}

void Decoder::add_destination(Slot slot) {
  if (next_to_ == std::size(result.to)) fail("too many destinations");
  result.to[next_to_++] = slot;
}

void Decoder::add_source(Slot slot) {
  if (next_from_ == std::size(result.from)) fail("too many sources");
  result.from[next_from_++] = slot;
}

Slot Decoder::slot_of_destination(const Operand& operand, Type type) {
  if (operand.kind == OperandKind::kSink) return kSink;
  if (operand.kind != OperandKind::kRegister || operand.negated) fail("a destination that is no register");
  const Register& reg = register_of(operand);
  if ((reg.type == Type::kPredicate) != (type == Type::kPredicate) || bytes_of(reg.type) < bytes_of(type))
    fail("register " + reg.name + " does not fit the type");
  return builder_.slot_of_register(operand.index);
}

Slot Decoder::slot_of_source(const Operand& operand, Type type) {
  const size_t bytes = bytes_of(type);
  if (operand.negated) fail("a ! where none is known");
  switch (operand.kind) {
    case OperandKind::kRegister:
      return slot_of_destination(operand, type);
    case OperandKind::kNumber:
      if (type == Type::kPredicate) return builder_.slot_of_constant(operand.number != 0 ? 1 : 0);
      if ((operand.number_kind == NumberKind::kFloat32 && bytes != 4) || (operand.number_kind == NumberKind::kFloat64 && bytes != 8) ||
          bytes > 8)
        fail("a number that does not fit the type");
      return builder_.slot_of_constant(operand.number);
    case OperandKind::kSpecial: {
      const auto* found = std::find_if(std::begin(kSpecials), std::end(kSpecials), [&](const auto& s) { return s.name == operand.name; });
      if (found == std::end(kSpecials)) fail("unknown special register " + operand.name);
      return builder_.slot_of_special(found->special);
    }
    case OperandKind::kVariable:
      if (bytes != 4 && bytes != 8) fail("an address that does not fit the type");
      return builder_.slot_of_variable(operand.variable, operand.displacement);
    default:
      fail("an operand of a kind that is not known here");
  }
}

Slot Decoder::slot_of_number(uint64_t number) { return builder_.slot_of_constant(number); }

const Register& Decoder::register_of(const Operand& operand) const { return builder_.function().registers[operand.index]; }

void Decoder::destination(Type type) { add_destination(slot_of_destination(take_operand(), type)); }

void Decoder::optional_predicate_destination(Type type) {
  const Operand& operand = take_operand();
  if (operand.kind != OperandKind::kPair) {
    add_destination(slot_of_destination(operand, type));
    add_destination(kSink);
    return;
  }
  add_destination(slot_of_destination(operand.elements[0], type));
  add_destination(slot_of_destination(operand.elements[1], Type::kPredicate));
}

void Decoder::source(Type type) { add_source(slot_of_source(take_operand(), type)); }

void Decoder::operands(Type type, size_t sources) {
  destination(type);
  for (size_t n = 0; n < sources; ++n) source(type);
}

void Decoder::predicate_source() {
  Operand operand = take_operand();
  result.negated_predicate = operand.negated;
  operand.negated = false;
  add_source(slot_of_source(operand, Type::kPredicate));
}

void Decoder::vector_destination(Type type, size_t count) {
  const Operand& operand = take_operand();
  if (operand.kind != OperandKind::kVector || operand.elements.size() != count) fail("not as many registers as the vector has elements");
  for (const Operand& element : operand.elements) add_destination(slot_of_destination(element, type));
}

void Decoder::vector_source(Type type, size_t count) {
  const Operand& operand = take_operand();
  if (operand.kind != OperandKind::kVector || operand.elements.size() != count) fail("not as many registers as the vector has elements");
  for (const Operand& element : operand.elements) add_source(slot_of_source(element, type));
}

void Decoder::address() {
  const Operand& operand = take_operand();
  if (operand.kind != OperandKind::kAddress) fail("expected an address in brackets");
  const Operand& base = operand.elements[0];
  const bool narrow = base.kind == OperandKind::kRegister && bytes_of(register_of(base).type) == 4;
  add_source(slot_of_source(base, narrow ? Type::kB32 : Type::kB64));
  result.narrow_address = narrow;
  result.displacement = operand.displacement;
}

uint64_t Decoder::immediate() {
  const Operand& operand = take_operand();
  if (operand.kind != OperandKind::kNumber || operand.number_kind != NumberKind::kInteger) fail("expected a number");
  return operand.number;
}

void Decoder::finish() {
  for (size_t i = 0; i < taken_.size(); ++i)
    if (!taken_[i]) fail("unknown modifier ." + parsed_.modifiers[i]);
  if (operands_left() != 0) fail("too many operands");
}

void Decoder::fail(const std::string& why) const {
  throw Failure(FailureKind::kUnsupported,
                builder_.module().name + ":" + std::to_string(parsed_.ptx_line) + ": " + why + ": " + parsed_.text);
}

} // namespace simt::ptx
