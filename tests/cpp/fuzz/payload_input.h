// How a run of bytes stands for a payload that somebody sent: for the fuzzer, and for the CUDA decoder on what the fuzzer has found.
//
//   byte 0    which layout
//   byte 1    value format, and whether the header is set right, so that what lies behind it is reached
//   then      the payload; what is missing is zero, what is too much is left out
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <vector>

#include "wire_format.h"

namespace compressed_ddp::fuzz {

inline constexpr uint32_t kRank = 0, kWorldSize = 1;
inline constexpr int64_t kStep = 3;

struct PayloadInput {
  Layout layout;
  std::vector<uint8_t> payload; // exactly payload_bytes(layout)
};

struct LayoutNumbers {
  std::vector<int64_t> segments, groups, k;
};

// Small, so that few bytes say all: one entry, dense parts between, one group around a dense part, entries far apart, several strides of
// the directory, everything sent, nothing sent.
inline const std::vector<LayoutNumbers>& layouts() {
  static const std::vector<LayoutNumbers> all = {{{1}, {0}, {1}},
                                                 {{6, 2, 4}, {0, -1, 1}, {2, 1}},
                                                 {{300, 50, 200, 77}, {0, -1, 0, 1}, {20, 9}},
                                                 {{9000}, {0}, {3}},
                                                 {{700}, {0}, {600}},
                                                 {{3000, 0, 300}, {0, -1, 1}, {300, 290}},
                                                 {{258}, {0}, {258}},
                                                 {{5, 0}, {-1, -1}, {}}};
  return all;
}

inline PayloadInput payload_input(std::span<const uint8_t> bytes) {
  const size_t which = bytes.empty() ? 0 : bytes[0], how = bytes.size() < 2 ? 0 : bytes[1];
  const LayoutNumbers& numbers = layouts()[which % layouts().size()];
  PayloadInput input{Layout::make(numbers.segments, numbers.groups, numbers.k, static_cast<ValueFormat>(how % 3)), {}};
  input.payload.resize(static_cast<size_t>(payload_bytes(input.layout)));
  if (bytes.size() > 2) std::memcpy(input.payload.data(), bytes.data() + 2, std::min(bytes.size() - 2, input.payload.size()));
  if (how & 0x80) {
    const PayloadHeader header = make_header(input.layout, kRank, kWorldSize, kStep, (how & 0x40) != 0);
    std::memcpy(input.payload.data(), &header, sizeof header);
  }
  return input;
}

} // namespace compressed_ddp::fuzz
