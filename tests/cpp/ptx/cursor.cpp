#include "cursor.h"

#include <cctype>
#include <charconv>

#include "simt.h"

namespace simt::ptx {

Cursor::Cursor(std::string_view text, std::string module_name)
    : text_(text), module_name_(std::move(module_name)), tokens_(tokens_of(text, module_name_)) {}

void Cursor::expect(std::string_view word) {
  if (!accept(word)) fail(peek(), "expected '" + std::string(word) + "' but got '" + std::string(peek().text) + "'");
}

std::string Cursor::take_word() {
  if (peek().kind != TokenKind::kWord) fail(peek(), "expected a name but got '" + std::string(peek().text) + "'");
  return std::string(take().text);
}

uint64_t Cursor::take_unsigned() {
  const auto value = peek().kind == TokenKind::kNumber ? parse_integer(peek().text) : std::nullopt;
  if (!value) fail(peek(), "expected an integer but got '" + std::string(peek().text) + "'");
  take();
  return *value;
}

void Cursor::skip_braces() {
  const Token& open = peek();
  expect("{");
  for (int depth = 1; depth > 0;) {
    if (at_end()) fail(open, "a { without its }");
    const Token& token = take();
    depth += token.is("{") ? 1 : token.is("}") ? -1 : 0;
  }
}

std::string Cursor::statement_at(const Token& first) const {
  const size_t semicolon = text_.find(';', first.begin), line_end = text_.find('\n', first.begin);
  // A call takes several lines up to its semicolon; a directive such as .loc ends with its line.
  const bool of_one_line = first.text.starts_with(".");
  const size_t end = of_one_line ? std::min(semicolon, line_end) : semicolon;
  std::string statement;
  for (const char c : text_.substr(first.begin, end == std::string_view::npos ? end : end - first.begin)) {
    const bool space = std::isspace(static_cast<unsigned char>(c)) != 0;
    if (!space) statement += c;
    if (space && !statement.empty() && statement.back() != ' ') statement += ' ';
    if (statement.size() > 300) break; // a table of initial values
  }
  while (!statement.empty() && statement.back() == ' ') statement.pop_back();
  return statement;
}

void Cursor::fail(const Token& at, const std::string& why) const {
  throw Failure(FailureKind::kUnsupported, module_name_ + ":" + std::to_string(at.line) + ": " + why + ": " + statement_at(at));
}

std::optional<uint64_t> parse_integer(std::string_view text) {
  if (text.ends_with("U")) text.remove_suffix(1);
  int base = 10;
  if (text.starts_with("0x") || text.starts_with("0X")) {
    base = 16;
    text.remove_prefix(2);
  } else if (text.starts_with("0b") || text.starts_with("0B")) {
    base = 2;
    text.remove_prefix(2);
  } else if (text.size() > 1 && text[0] == '0') {
    base = 8;
  }
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

} // namespace simt::ptx
