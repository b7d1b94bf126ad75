#include "declarations.h"

#include <charconv>
#include <cstring>

namespace simt::ptx {
namespace {

StateSpace read_space(Cursor& cursor, bool is_extern) {
  if (cursor.accept(".global")) return StateSpace::kGlobal;
  if (cursor.accept(".const")) return StateSpace::kConst;
  if (cursor.accept(".shared")) return is_extern ? StateSpace::kDynamicShared : StateSpace::kShared;
  if (cursor.accept(".local")) return StateSpace::kLocal;
  if (cursor.accept(".param")) return StateSpace::kParam;
  cursor.fail(cursor.peek(), "unknown directive '" + std::string(cursor.peek().text) + "'");
}

// ".align 16" and the type, in any order of what may stand between.
struct Layout {
  uint64_t alignment = 0; // 0: that of the type
  Type type = Type::kB8;
};

Layout read_layout(Cursor& cursor) {
  Layout layout;
  if (cursor.accept(".align")) layout.alignment = cursor.take_unsigned();
  layout.type = read_type(cursor);
  if (cursor.accept(".ptr")) { // what the pointer points to: says nothing about the parameter itself
    for (const char* space : {".global", ".const", ".shared", ".local"})
      if (cursor.accept(space)) break;
    if (cursor.accept(".align")) cursor.take_unsigned();
  }
  if (layout.alignment == 0) layout.alignment = bytes_of(layout.type);
  return layout;
}

// "[4][2]" behind a name: how many elements; 0 for "[]".
uint64_t read_extent(Cursor& cursor) {
  uint64_t count = 1;
  while (cursor.accept("[")) {
    if (cursor.accept("]")) return 0;
    count *= cursor.take_unsigned();
    cursor.expect("]");
  }
  return count;
}

class InitialReader {
 public:
  InitialReader(Cursor& cursor, Type type, Variable& variable) : cursor_(cursor), element_bytes_(bytes_of(type)), variable_(variable) {}

  void read() {
    variable_.initial.assign(variable_.bytes, 0);
    read_group();
  }

 private:
  void read_group() {
    if (!cursor_.accept("{")) return read_element();
    if (cursor_.accept("}")) return;
    do {
      read_group();
    } while (cursor_.accept(","));
    cursor_.expect("}");
  }

  void read_element() {
    const Token& at = cursor_.peek();
    if (offset_ + element_bytes_ > variable_.bytes) cursor_.fail(at, "more initial values than elements");
    if (const auto number = accept_number(cursor_)) {
      std::memcpy(variable_.initial.data() + offset_, &number->bits, element_bytes_);
    } else {
      read_address();
    }
    offset_ += element_bytes_;
  }

  // sym, sym+4, generic(sym), generic(sym)+4
  void read_address() {
    const Token& at = cursor_.peek();
    AddressInInitial address{offset_, cursor_.take_word(), 0};
    if (address.symbol == "generic") {
      cursor_.expect("(");
      address.symbol = cursor_.take_word();
      cursor_.expect(")");
    }
    if (cursor_.accept("+")) address.displacement = static_cast<int64_t>(cursor_.take_unsigned());
    if (element_bytes_ != 8) cursor_.fail(at, "an address in an element that is not 8 bytes long");
    variable_.addresses.push_back(address);
  }

  Cursor& cursor_;
  size_t element_bytes_;
  Variable& variable_;
  size_t offset_ = 0;
};

} // namespace

Type read_type(Cursor& cursor) {
  const Token& at = cursor.peek();
  const std::string word = cursor.take_word();
  const auto type = word.starts_with(".") ? type_named(std::string_view(word).substr(1)) : std::nullopt;
  if (!type) cursor.fail(at, "unknown type '" + word + "'");
  return *type;
}

std::optional<Number> accept_number(Cursor& cursor) {
  const bool negative = cursor.peek().is("-");
  const Token& token = cursor.peek(negative ? 1 : 0);
  if (token.kind != TokenKind::kNumber) return std::nullopt;
  const std::string_view text = token.text;
  const auto hexadecimal = [&](size_t digits) {
    uint64_t bits = 0;
    const auto [end, error] = std::from_chars(text.data() + 2, text.data() + text.size(), bits, 16);
    if (negative || text.size() != 2 + digits || error != std::errc() || end != text.data() + text.size())
      cursor.fail(token, "malformed number '" + std::string(text) + "'");
    return bits;
  };
  Number number{};
  if (text.starts_with("0f") || text.starts_with("0F")) {
    number = {hexadecimal(8), NumberKind::kFloat32};
  } else if (text.starts_with("0d") || text.starts_with("0D")) {
    number = {hexadecimal(16), NumberKind::kFloat64};
  } else {
    const auto value = parse_integer(text);
    if (!value) cursor.fail(token, "malformed number '" + std::string(text) + "'");
    number = {negative ? ~*value + 1 : *value, NumberKind::kInteger};
  }
  if (negative) cursor.take();
  cursor.take();
  return number;
}

std::vector<Variable> read_variables(Cursor& cursor, bool is_extern) {
  const StateSpace space = read_space(cursor, is_extern);
  const Layout layout = read_layout(cursor);
  std::vector<Variable> variables;
  do {
    const Token& at = cursor.peek();
    Variable variable;
    variable.name = cursor.take_word();
    variable.space = space;
    variable.alignment = layout.alignment;
    const uint64_t count = read_extent(cursor);
    variable.bytes = count * bytes_of(layout.type);
    if (count == 0 && space != StateSpace::kDynamicShared) cursor.fail(at, "an array of unknown length");
    if (cursor.accept("=")) {
      if (space != StateSpace::kGlobal && space != StateSpace::kConst) cursor.fail(at, "an initial value in this state space");
      InitialReader(cursor, layout.type, variable).read();
    }
    variables.push_back(std::move(variable));
  } while (cursor.accept(","));
  cursor.expect(";");
  return variables;
}

std::vector<Variable> read_parameters(Cursor& cursor) {
  std::vector<Variable> variables;
  cursor.expect("(");
  if (cursor.accept(")")) return variables;
  do {
    if (!cursor.accept(".param")) cursor.fail(cursor.peek(), "a parameter that is not in .param");
    Variable variable;
    variable.space = StateSpace::kParam;
    const Layout layout = read_layout(cursor);
    variable.name = cursor.take_word();
    variable.alignment = layout.alignment;
    variable.bytes = read_extent(cursor) * bytes_of(layout.type);
    variables.push_back(std::move(variable));
  } while (cursor.accept(","));
  cursor.expect(")");
  return variables;
}

} // namespace simt::ptx
