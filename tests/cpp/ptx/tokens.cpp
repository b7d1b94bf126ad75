#include "tokens.h"

#include <cctype>

#include "simt.h"

namespace simt::ptx {
namespace {

bool is_word_character(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' || c == '.'; }

} // namespace

std::vector<Token> tokens_of(std::string_view text, const std::string& module_name) {
  std::vector<Token> tokens;
  uint32_t line = 1;
  const auto fail = [&](const std::string& what) {
    throw Failure(FailureKind::kUnsupported, module_name + ":" + std::to_string(line) + ": " + what);
  };
  size_t i = 0;
  while (i < text.size()) {
    const char c = text[i];
    const size_t begin = i;
    if (c == '\n') {
      ++line;
      ++i;
    } else if (std::isspace(static_cast<unsigned char>(c)) != 0 || c == '\0') {
      ++i;
    } else if (text.compare(i, 2, "//") == 0) {
      while (i < text.size() && text[i] != '\n') ++i;
    } else if (text.compare(i, 2, "/*") == 0) {
      const size_t close = text.find("*/", i + 2);
      if (close == std::string_view::npos) fail("a comment does not end");
      for (; i < close + 2; ++i) line += text[i] == '\n' ? 1 : 0;
    } else if (c == '"') {
      i = text.find_first_of("\"\n", i + 1);
      if (i == std::string_view::npos || text[i] == '\n') fail("a string does not end");
      ++i;
      tokens.push_back({TokenKind::kText, text.substr(begin + 1, i - begin - 2), line, begin, i});
    } else if (is_word_character(c)) {
      // L1::no_allocate is one word; the colon of a label is not part of it.
      while (i < text.size() && (is_word_character(text[i]) || text.compare(i, 2, "::") == 0)) i += text[i] == ':' ? 2 : 1;
      const TokenKind kind = std::isdigit(static_cast<unsigned char>(c)) != 0 ? TokenKind::kNumber : TokenKind::kWord;
      tokens.push_back({kind, text.substr(begin, i - begin), line, begin, i});
    } else if (std::string_view("{}()[]<>,;:|!@+-=*").find(c) != std::string_view::npos) {
      ++i;
      tokens.push_back({TokenKind::kPunctuation, text.substr(begin, 1), line, begin, i});
    } else {
      fail(std::string("unknown character '") + c + "'");
    }
  }
  tokens.push_back({TokenKind::kEnd, "", line, text.size(), text.size()});
  return tokens;
}

} // namespace simt::ptx
