// How a run of bytes stands for a payload that somebody sent: for the fuzzer, and for the CUDA decoder on what the fuzzer has found.
//
//   byte 0    which layout
//   byte 1    value format, and whether the header is set right, so that what lies behind it is reached
//   then      of a small layout, the payload: what is missing is zero, what is too much is left out; of a large one, whose payload no
//             fuzzer would find, edits of a right payload: three bytes say where, one is the new byte
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <vector>

#include "cpu/encode.h"
#include "wire_format.h"

namespace compressed_ddp::fuzz {

inline constexpr int64_t kRank = 0, kWorldSize = 1;
inline constexpr int64_t kStep = 3;

struct PayloadInput {
  Layout layout;
  std::vector<uint8_t> payload; // exactly payload_bytes(layout)
};

struct LayoutNumbers {
  std::vector<int64_t> segments, groups, k;
};

// Small, so that few bytes say all: one entry, dense parts between, one group around a dense part, entries far apart, several strides of
// the directory, everything sent, nothing sent. Then large ones: two pieces, three tiles of decode_apply.
inline constexpr size_t kFirstLargeLayout = 8;
inline const std::vector<LayoutNumbers>& layouts() {
  static const std::vector<LayoutNumbers> all = {{{1}, {0}, {1}},
                                                 {{6, 2, 4}, {0, -1, 1}, {2, 1}},
                                                 {{300, 50, 200, 77}, {0, -1, 0, 1}, {20, 9}},
                                                 {{9000}, {0}, {3}},
                                                 {{700}, {0}, {600}},
                                                 {{3000, 0, 300}, {0, -1, 1}, {300, 290}},
                                                 {{258}, {0}, {258}},
                                                 {{5, 0}, {-1, -1}, {}},
                                                 {{40000}, {0}, {17000}},
                                                 {{3 * 8192}, {0}, {1100}}};
  return all;
}

// Of a layout that is one group: entries spread over all of it, by fits and starts.
inline void write_right_payload(const Layout& layout, std::vector<uint8_t>& payload) {
  const int64_t k = layout.selected_numel, stretch = layout.numel / k;
  std::vector<int32_t> indices;
  std::vector<float> values;
  for (int64_t e = 0; e < k; ++e) {
    indices.push_back(static_cast<int32_t>(e * layout.numel / k + e * e % stretch));
    values.push_back(static_cast<float>(e % 7 - 3));
  }
  encode_selected(layout, {values.data(), indices.data(), nullptr, false, payload.data()},
                  [](int64_t count, auto&& run) { run(int64_t{0}, count); });
}

inline PayloadInput payload_input(std::span<const uint8_t> bytes) {
  const size_t which = bytes.empty() ? 0 : bytes[0], how = bytes.size() < 2 ? 0 : bytes[1];
  const LayoutNumbers& numbers = layouts()[which % layouts().size()];
  PayloadInput input{Layout::make(numbers.segments, numbers.groups, numbers.k, static_cast<ValueFormat>(how % 3)), {}};
  input.payload.resize(static_cast<size_t>(payload_bytes(input.layout)));
  if (which % layouts().size() >= kFirstLargeLayout) {
    write_right_payload(input.layout, input.payload);
    for (size_t i = 2; i + 4 <= bytes.size(); i += 4)
      input.payload[(bytes[i] | bytes[i + 1] << 8 | bytes[i + 2] << 16) % input.payload.size()] = bytes[i + 3];
  } else if (bytes.size() > 2) {
    std::memcpy(input.payload.data(), bytes.data() + 2, std::min(bytes.size() - 2, input.payload.size()));
  }
  if (how & 0x80) {
    const PayloadHeader header = make_header(input.layout, kRank, kStep, (how & 0x40) != 0);
    std::memcpy(input.payload.data(), &header, sizeof header);
  }
  return input;
}

} // namespace compressed_ddp::fuzz
