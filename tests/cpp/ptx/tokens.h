// PTX text cut into words, numbers and punctuation.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace simt::ptx {

enum class TokenKind : uint8_t {
  kWord,        // ld.global.f32, %r1, %tid.x, $L__BB0_1, .reg
  kNumber,      // 12, 0x1F, 0f3F800000
  kText,        // "..." (without the quotes)
  kPunctuation, // one character
  kEnd,
};

struct Token {
  TokenKind kind;
  std::string_view text;
  uint32_t line;
  size_t begin, end; // in the whole text

  bool is(std::string_view punctuation_or_word) const {
    return (kind == TokenKind::kPunctuation || kind == TokenKind::kWord) && text == punctuation_or_word;
  }
};

// The last token is always kEnd. Throws Failure(kUnsupported) at a character that no PTX has.
std::vector<Token> tokens_of(std::string_view text, const std::string& module_name);

} // namespace simt::ptx
