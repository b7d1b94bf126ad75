#include "function_reader.h"

#include <charconv>

#include "declarations.h"

namespace simt::ptx {

FunctionReader::FunctionReader(Cursor& cursor, const Module& module, Function& function)
    : cursor_(cursor), module_(module), function_(function), scopes_(1) {
  for (uint32_t i = 0; i < function.variables.size(); ++i) scopes_.back().variables[function.variables[i].name] = i;
}

void FunctionReader::read() {
  const Token& open = cursor_.peek();
  cursor_.expect("{");
  scopes_.emplace_back();
  while (scopes_.size() > 1) {
    if (cursor_.at_end()) cursor_.fail(open, "a { without its }");
    if (cursor_.accept("{"))
      scopes_.emplace_back();
    else if (cursor_.accept("}"))
      close_scope();
    else
      read_statement();
  }
  // What no scope knows as a label can only be a function, or a mistake: a call says which functions exist.
  for (const Reference& reference : scopes_.back().references) {
    if (reference.in_table) cursor_.fail(*reference.at, "unknown label '" + reference.name + "'");
    Operand& operand = function_.instructions[reference.outer].operands[reference.inner];
    if (function_.instructions[reference.outer].opcode != "call") cursor_.fail(*reference.at, "unknown name '" + reference.name + "'");
    operand.kind = OperandKind::kFunction;
    operand.name = reference.name;
  }
}

void FunctionReader::read_statement() {
  const Token& token = cursor_.peek();
  if (token.kind == TokenKind::kPunctuation && !token.is("@")) {
    if (!cursor_.accept(";")) cursor_.fail(token, "unexpected '" + std::string(token.text) + "'");
    return;
  }
  if (token.is(".reg")) return read_registers();
  if (token.is(".loc")) return read_location();
  if (cursor_.accept(".pragma")) { // hints to ptxas, such as "nounroll"
    while (!cursor_.accept(";")) cursor_.take();
    return;
  }
  if (token.text.starts_with(".")) return read_function_variables();
  if (cursor_.peek(1).is(":")) return read_label();
  read_instruction();
}

void FunctionReader::read_registers() {
  cursor_.expect(".reg");
  const Type type = read_type(cursor_);
  do {
    const std::string name = cursor_.take_word();
    RegisterRange range{static_cast<uint32_t>(function_.registers.size()), 1, false};
    if (cursor_.accept("<")) {
      range.count = static_cast<uint32_t>(cursor_.take_unsigned());
      range.numbered = true;
      cursor_.expect(">");
    }
    for (uint32_t i = 0; i < range.count; ++i) function_.registers.push_back({range.numbered ? name + std::to_string(i) : name, type});
    scopes_.back().registers[name] = range;
  } while (cursor_.accept(","));
  cursor_.expect(";");
}

// .loc file line column {, function_name label {+ offset}} {, inlined_at file line column}
// The first position is where the instruction stands, in whatever function it was inlined from: that is what a report should name.
void FunctionReader::read_location() {
  cursor_.expect(".loc");
  const auto file = static_cast<uint32_t>(cursor_.take_unsigned());
  const auto line = static_cast<uint32_t>(cursor_.take_unsigned());
  cursor_.take_unsigned();
  if (line != 0) { // 0: the compiler's own; the line before says more
    source_file_ = file;
    source_line_ = line;
  }
  while (cursor_.accept(",")) {
    if (cursor_.accept("function_name")) {
      cursor_.take_word();
      if (cursor_.accept("+")) cursor_.take_unsigned();
    } else {
      cursor_.expect("inlined_at");
      for (int i = 0; i < 3; ++i) cursor_.take_unsigned();
    }
  }
}

void FunctionReader::read_label() {
  const Token& at = cursor_.peek();
  const std::string name = cursor_.take_word();
  cursor_.expect(":");
  if (cursor_.accept(".branchtargets")) return read_table(name);
  Scope& scope = scopes_.back();
  if (!scope.labels.emplace(name, static_cast<uint32_t>(function_.labels.size())).second) cursor_.fail(at, "a label twice in one scope");
  function_.labels.push_back(static_cast<uint32_t>(function_.instructions.size()));
}

void FunctionReader::read_table(const std::string& name) {
  const auto table = static_cast<uint32_t>(function_.tables.size());
  function_.tables.emplace_back();
  scopes_.back().tables[name] = table;
  do {
    const Token& at = cursor_.peek();
    const auto entry = static_cast<uint32_t>(function_.tables.back().size());
    scopes_.back().references.push_back({cursor_.take_word(), &at, true, table, entry});
    function_.tables.back().push_back(0);
  } while (cursor_.accept(","));
  cursor_.expect(";");
}

void FunctionReader::read_function_variables() {
  const Token& at = cursor_.peek();
  for (const Variable& variable : read_variables(cursor_, false)) {
    if (variable.space == StateSpace::kGlobal || variable.space == StateSpace::kConst)
      cursor_.fail(at, "a global variable inside a function");
    declare_variable(variable);
  }
}

void FunctionReader::declare_variable(const Variable& variable) {
  scopes_.back().variables[variable.name] = static_cast<uint32_t>(function_.variables.size());
  function_.variables.push_back(variable);
}

void FunctionReader::read_instruction() {
  const Token& at = cursor_.peek();
  ParsedInstruction instruction;
  instruction.text = cursor_.statement_at(at);
  instruction.ptx_line = at.line;
  instruction.source_file = source_file_;
  instruction.source_line = source_line_;
  if (cursor_.accept("@")) {
    instruction.guard = read_single_operand();
    if (instruction.guard->kind != OperandKind::kRegister) cursor_.fail(at, "a guard that is no register");
  }
  const std::string mnemonic = cursor_.take_word();
  size_t end = mnemonic.find('.');
  instruction.opcode = mnemonic.substr(0, end);
  while (end != std::string::npos) {
    const size_t begin = end + 1;
    end = mnemonic.find('.', begin);
    instruction.modifiers.push_back(mnemonic.substr(begin, end == std::string::npos ? end : end - begin));
  }
  function_.instructions.push_back(std::move(instruction));
  if (cursor_.accept(";")) return;
  do {
    Operand operand = read_operand();
    function_.instructions.back().operands.push_back(std::move(operand));
  } while (cursor_.accept(","));
  cursor_.expect(";");
}

Operand FunctionReader::read_operand() {
  Operand operand = read_single_operand();
  if (!cursor_.accept("|")) return operand;
  Operand pair;
  pair.kind = OperandKind::kPair;
  pair.elements = {std::move(operand), read_single_operand()};
  return pair;
}

Operand FunctionReader::read_single_operand() {
  Operand operand;
  if (cursor_.accept("_")) return operand;
  if (cursor_.accept("[")) return read_address();
  if (cursor_.accept("{")) {
    operand.kind = OperandKind::kVector;
    operand.elements = read_list_until("}");
    return operand;
  }
  if (cursor_.accept("(")) {
    operand.kind = OperandKind::kList;
    operand.elements = read_list_until(")");
    return operand;
  }
  if (const auto number = accept_number(cursor_)) {
    operand.kind = OperandKind::kNumber;
    operand.number = number->bits;
    operand.number_kind = number->kind;
    return operand;
  }
  const Token& at = cursor_.peek();
  const bool negated = cursor_.accept("!");
  operand = read_word();
  operand.negated = negated;
  if (negated && operand.kind != OperandKind::kRegister) cursor_.fail(at, "a ! before something that is no register");
  return operand;
}

std::vector<Operand> FunctionReader::read_list_until(const char* close) {
  std::vector<Operand> elements;
  if (cursor_.accept(close)) return elements;
  do {
    elements.push_back(read_single_operand());
  } while (cursor_.accept(","));
  cursor_.expect(close);
  return elements;
}

int64_t FunctionReader::read_displacement() {
  if (!cursor_.accept("+")) return 0;
  const Token& at = cursor_.peek();
  const auto number = accept_number(cursor_);
  if (!number || number->kind != NumberKind::kInteger) cursor_.fail(at, "a displacement that is no integer");
  return static_cast<int64_t>(number->bits);
}

Operand FunctionReader::read_address() {
  const Token& at = cursor_.peek();
  Operand operand;
  operand.kind = OperandKind::kAddress;
  Operand base = read_single_operand();
  operand.displacement = base.displacement + read_displacement();
  base.displacement = 0;
  if (base.kind != OperandKind::kRegister && base.kind != OperandKind::kVariable && base.kind != OperandKind::kNumber)
    cursor_.fail(at, "an address that is neither register, variable nor number");
  operand.elements.push_back(std::move(base));
  cursor_.expect("]");
  return operand;
}

Operand FunctionReader::read_word() {
  const Token& at = cursor_.peek();
  Operand operand;
  const std::string name = cursor_.take_word();
  if (const auto index = register_named(name)) {
    operand.kind = OperandKind::kRegister;
    operand.index = *index;
  } else if (const auto variable = variable_named(name)) {
    operand.kind = OperandKind::kVariable;
    operand.variable = *variable;
    operand.displacement = read_displacement();
  } else if (name == "WARP_SZ") {
    operand.kind = OperandKind::kNumber;
    operand.number = 32;
  } else if (name.starts_with("%")) {
    operand.kind = OperandKind::kSpecial;
    operand.name = name;
  } else {
    operand.kind = OperandKind::kLabel;
    const auto& instructions = function_.instructions;
    scopes_.back().references.push_back(
        {name, &at, false, static_cast<uint32_t>(instructions.size() - 1), static_cast<uint32_t>(instructions.back().operands.size())});
  }
  return operand;
}

std::optional<uint32_t> FunctionReader::register_named(const std::string& name) const {
  const size_t digits = name.find_last_not_of("0123456789") + 1;
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto whole = scope->registers.find(name);
    if (whole != scope->registers.end() && !whole->second.numbered) return whole->second.first;
    // The number of %r12 is 12, but of a declaration "%r1<5>" it is what follows %r1.
    for (size_t split = digits; split < name.size(); ++split) {
      const auto range = scope->registers.find(name.substr(0, split));
      if (range == scope->registers.end() || !range->second.numbered) continue;
      uint32_t number = 0;
      std::from_chars(name.data() + split, name.data() + name.size(), number);
      if (number < range->second.count) return range->second.first + number;
    }
  }
  return std::nullopt;
}

std::optional<VariableId> FunctionReader::variable_named(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->variables.find(name);
    if (found != scope->variables.end()) return VariableId{false, found->second};
  }
  for (uint32_t i = 0; i < module_.variables.size(); ++i)
    if (module_.variables[i].name == name) return VariableId{true, i};
  return std::nullopt;
}

bool FunctionReader::bind(const Scope& scope, const Reference& reference) {
  const auto label = scope.labels.find(reference.name);
  if (label != scope.labels.end()) {
    if (reference.in_table)
      function_.tables[reference.outer][reference.inner] = label->second;
    else
      function_.instructions[reference.outer].operands[reference.inner].index = label->second;
    return true;
  }
  const auto table = scope.tables.find(reference.name);
  if (table == scope.tables.end() || reference.in_table) return false;
  Operand& operand = function_.instructions[reference.outer].operands[reference.inner];
  operand.kind = OperandKind::kTargets;
  operand.index = table->second;
  return true;
}

void FunctionReader::close_scope() {
  const Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (const Reference& reference : scope.references)
    if (!bind(scope, reference)) scopes_.back().references.push_back(reference);
}

} // namespace simt::ptx
