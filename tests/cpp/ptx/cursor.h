// Where the readers of a PTX text are in it, and how they complain.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokens.h"

namespace simt::ptx {

class Cursor {
 public:
  Cursor(std::string_view text, std::string module_name);

  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(next_ + ahead, tokens_.size() - 1)]; }
  const Token& take() {
    const Token& token = peek();
    if (token.kind != TokenKind::kEnd) ++next_;
    return token;
  }
  bool at_end() const { return peek().kind == TokenKind::kEnd; }
  bool accept(std::string_view word) {
    if (!peek().is(word)) return false;
    take();
    return true;
  }
  void expect(std::string_view word);
  std::string take_word();  // fails at anything but a word
  uint64_t take_unsigned(); // fails at anything but an integer without sign
  void skip_braces();       // from { to its }

  // The text from a token on up to its ; or end of line, white space collapsed.
  std::string statement_at(const Token& first) const;
  // Throws Failure(kUnsupported).
  [[noreturn]] void fail(const Token& at, const std::string& why) const;
  const std::string& module_name() const { return module_name_; }

 private:
  std::string_view text_;
  std::string module_name_;
  std::vector<Token> tokens_;
  size_t next_ = 0;
};

// "12", "0x1F", "0b11", "017", each with or without U behind it.
std::optional<uint64_t> parse_integer(std::string_view text);

} // namespace simt::ptx
