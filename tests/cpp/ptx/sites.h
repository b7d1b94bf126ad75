// Places in the program as small numbers, for whoever keeps many of them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "simt.h"

namespace simt {

class Sites {
 public:
  uint32_t number_of(const Location& at) {
    Recent& recent = recent_[at.pc % recent_.size()];
    if (!recent.known || recent.at.pc != at.pc || recent.at.line != at.line || recent.at.file != at.file) recent = {true, at, insert(at)};
    return recent.number;
  }
  const Location& operator[](uint32_t number) const { return places_[number]; }

 private:
  struct Recent {
    bool known = false;
    Location at;
    uint32_t number = 0;
  };

  uint32_t insert(const Location& at) {
    const auto [place, is_new] = numbers_.try_emplace({at.pc, at.line, at.file}, static_cast<uint32_t>(places_.size()));
    if (is_new) places_.push_back(at);
    return place->second;
  }

  std::array<Recent, 1024> recent_;
  std::map<std::tuple<uint32_t, uint32_t, const char*>, uint32_t> numbers_;
  std::vector<Location> places_;
};

} // namespace simt
