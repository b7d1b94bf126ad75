// What the tests of the core share: seeded data, buffers with guards, comparison by bits, and ways to cut a range.
// Everything is made from a seed that SCOPED_TRACE prints, so a failure can be repeated.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cpu/decode.h"
#include "cpu/encode.h"
#include "cpu/float_types.h"
#include "layout.h"
#include "wire_format.h"

namespace compressed_ddp::testing {

inline constexpr std::array kGradientTypes = {GradientType::kFloat32, GradientType::kFloat16, GradientType::kBFloat16};

inline constexpr std::array kValueFormats = {ValueFormat::kFloat32, ValueFormat::kBFloat16, ValueFormat::kSign};

inline const char* name_of(GradientType type) {
  constexpr const char* kNames[] = {"float32", "float16", "bfloat16"};
  return kNames[static_cast<int>(type)];
}

// ---- numbers

// mt19937_64 itself is fixed by the standard, its distributions are not: these are.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint64_t bits() { return engine_(); }
  // In [begin, end).
  int64_t integer(int64_t begin, int64_t end) { return begin + static_cast<int64_t>(engine_() % static_cast<uint64_t>(end - begin)); }
  bool one_in(int64_t n) { return integer(0, n) == 0; }
  // Bell-shaped around 0, standard deviation 1, within +-3.5: the sum of four uniform numbers of 24 bits.
  float normal() {
    uint32_t sum = 0;
    for (int i = 0; i < 2; ++i) {
      const uint64_t two = engine_();
      sum += static_cast<uint32_t>(two >> 40) + static_cast<uint32_t>(two & 0xffffff);
    }
    return (static_cast<float>(sum) * 0x1p-24f - 2.0f) * 1.7320508f;
  }

 private:
  std::mt19937_64 engine_;
};

inline std::vector<float> normal_values(int64_t numel, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<size_t>(numel));
  for (float& value : values) value = random.normal();
  return values;
}

inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

inline std::string show_float(float value) {
  char text[48];
  std::snprintf(text, sizeof text, "%.9g (0x%08x)", static_cast<double>(value), bits_of(value));
  return text;
}

// Equal bit for bit, so that -0 differs from +0 and a NaN equals itself; names the first difference.
inline ::testing::AssertionResult same_bits(std::span<const float> expected, std::span<const float> actual) {
  if (expected.size() != actual.size())
    return ::testing::AssertionFailure() << "expected " << expected.size() << " values, got " << actual.size();
  for (size_t i = 0; i < expected.size(); ++i)
    if (bits_of(expected[i]) != bits_of(actual[i]))
      return ::testing::AssertionFailure() << "value " << i << " of " << expected.size() << ": expected " << show_float(expected[i])
                                           << ", got " << show_float(actual[i]);
  return ::testing::AssertionSuccess();
}

inline ::testing::AssertionResult same_integers(std::span<const int32_t> expected, std::span<const int32_t> actual) {
  if (expected.size() != actual.size())
    return ::testing::AssertionFailure() << "expected " << expected.size() << " integers, got " << actual.size();
  for (size_t i = 0; i < expected.size(); ++i)
    if (expected[i] != actual[i])
      return ::testing::AssertionFailure() << "integer " << i << " of " << expected.size() << ": expected " << expected[i] << ", got "
                                           << actual[i];
  return ::testing::AssertionSuccess();
}

// ---- buffers

// Numbers of a gradient type, as a flat bucket holds them. `misalignment` elements lie in front, so that the first one is not
// where a vector load would like it; a guard lies on both sides, and guards_intact() tells whether somebody wrote there.
class TypedBuffer {
 public:
  TypedBuffer(GradientType type, int64_t numel, int64_t misalignment = 0)
      : type_(type),
        numel_(numel),
        begin_bytes_(static_cast<size_t>(kGuardBytes + misalignment * element_bytes(type))),
        bytes_(begin_bytes_ + static_cast<size_t>(numel * element_bytes(type) + kGuardBytes), kGuard) {}

  TypedBuffer(GradientType type, std::span<const float> values, int64_t misalignment = 0)
      : TypedBuffer(type, static_cast<int64_t>(values.size()), misalignment) {
    for (size_t i = 0; i < values.size(); ++i) set(static_cast<int64_t>(i), values[i]);
  }

  GradientType type() const { return type_; }
  int64_t numel() const { return numel_; }
  void* data() { return bytes_.data() + begin_bytes_; }
  const void* data() const { return bytes_.data() + begin_bytes_; }

  float at(int64_t i) const {
    switch (type_) {
      case GradientType::kFloat32:
        return static_cast<const float*>(data())[i];
      case GradientType::kFloat16:
        return to_float(static_cast<const Float16*>(data())[i]);
      default:
        return to_float(static_cast<const BFloat16*>(data())[i]);
    }
  }
  // As bits of the type, in the low end.
  uint32_t bits_at(int64_t i) const {
    return type_ == GradientType::kFloat32 ? static_cast<const uint32_t*>(data())[i] : static_cast<const uint16_t*>(data())[i];
  }
  void set(int64_t i, float value) {
    switch (type_) {
      case GradientType::kFloat32:
        static_cast<float*>(data())[i] = value;
        break;
      case GradientType::kFloat16:
        from_float(value, static_cast<Float16*>(data())[i]);
        break;
      default:
        from_float(value, static_cast<BFloat16*>(data())[i]);
        break;
    }
  }
  std::vector<float> values() const {
    std::vector<float> all(static_cast<size_t>(numel_));
    for (int64_t i = 0; i < numel_; ++i) all[static_cast<size_t>(i)] = at(i);
    return all;
  }
  bool guards_intact() const {
    const auto is_guard = [](uint8_t byte) { return byte == kGuard; };
    const auto end_bytes = begin_bytes_ + static_cast<size_t>(numel_ * element_bytes(type_));
    return std::all_of(bytes_.begin(), bytes_.begin() + static_cast<int64_t>(begin_bytes_), is_guard) &&
           std::all_of(bytes_.begin() + static_cast<int64_t>(end_bytes), bytes_.end(), is_guard);
  }

 private:
  static constexpr int64_t kGuardBytes = 64;
  static constexpr uint8_t kGuard = 0xa5;

  GradientType type_;
  int64_t numel_;
  size_t begin_bytes_;
  std::vector<uint8_t> bytes_;
};

// The flat bucket's residual cut into one pointer per segment, as the stages take it.
inline std::vector<float*> segment_pointers(const Layout& layout, float* residual) {
  std::vector<float*> pointers;
  for (const Segment& segment : layout.segments) pointers.push_back(residual + segment.offset);
  return pointers;
}

// One tensor group of all `numel` entries.
inline Layout one_group(int64_t numel, int64_t k) {
  return Layout::make(std::vector<int64_t>{numel}, std::vector<int64_t>{0}, std::vector<int64_t>{k});
}

// ---- payloads

inline constexpr auto in_one_go = [](int64_t count, auto&& run) { run(int64_t{0}, count); }; // a parallel_for

// A payload of these entries [selected_numel], in whatever value format the layout has, with a dense part from `gradient` [numel] (nullptr:
// zeros). The vector has exactly payload_bytes(layout) bytes, so that AddressSanitizer sees any step beyond.
inline std::vector<uint8_t> payload_of_entries(const Layout& layout, const std::vector<int32_t>& indices, const std::vector<float>& values,
                                               const float* gradient, int64_t rank, int64_t step, bool non_finite = false) {
  std::vector<uint8_t> payload(static_cast<size_t>(payload_bytes(layout)), 0xff);
  const std::vector<float> zeros(static_cast<size_t>(layout.numel));
  encode_dense(layout, gradient == nullptr ? zeros.data() : gradient, GradientType::kFloat32, nullptr, payload.data());
  encode_selected(layout, {values.data(), indices.data(), nullptr, non_finite, payload.data()}, in_one_go);
  encode_header(layout, rank, step, non_finite, payload.data());
  return payload;
}

// In every group k positions drawn at random.
inline std::vector<int32_t> random_indices(const Layout& layout, Random& random) {
  std::vector<int32_t> indices;
  for (size_t g = 0; g < layout.groups.size(); ++g) {
    int64_t wanted = layout.groups[g].k, left = layout.groups[g].numel;
    for (const Segment& segment : layout.segments) {
      if (segment.group != static_cast<int32_t>(g)) continue;
      for (int64_t i = 0; i < segment.numel; ++i, --left) { // Knuth 3.4.2, algorithm S
        if (random.integer(0, left) >= wanted) continue;
        indices.push_back(static_cast<int32_t>(segment.offset + i));
        --wanted;
      }
    }
  }
  return indices;
}

// What one rank could have sent: random entries and a dense part. Receivers accept it.
inline std::vector<uint8_t> random_payload(const Layout& layout, int64_t rank, int64_t step, uint64_t seed, bool non_finite = false) {
  Random random(seed * 1000 + static_cast<uint64_t>(rank));
  const std::vector<int32_t> indices = random_indices(layout, random);
  const std::vector<float> values = normal_values(layout.selected_numel, random.bits());
  return payload_of_entries(layout, indices, values, normal_values(layout.numel, random.bits()).data(), rank, step, non_finite);
}

inline Entries entries_of(const Layout& layout, const uint8_t* payload) {
  Entries entries;
  EXPECT_EQ(decode_own(layout, payload, entries, in_one_go), "");
  return entries;
}

// Empty, or why a receiver refuses the payloads.
inline std::string refusal_of(const Layout& layout, const std::vector<uint8_t>& gathered, int64_t world_size, int64_t step) {
  return check_payloads(layout, gathered.data(), world_size, {0}, step, in_one_go);
}
// The same of one payload, without the words around it.
inline std::string refusal_of_one(const Layout& layout, const std::vector<uint8_t>& payload, int64_t rank, int64_t step) {
  const std::string problem = check_header(layout, payload.data(), rank, step);
  return problem.empty() ? check_entries(layout, payload.data(), 1, in_one_go).why : problem;
}

inline std::vector<uint8_t> random_gathered(const Layout& layout, int64_t world_size, int64_t step, uint64_t seed) {
  std::vector<uint8_t> gathered;
  gathered.reserve(static_cast<size_t>(world_size * payload_bytes(layout)));
  for (int64_t rank = 0; rank < world_size; ++rank) {
    const auto payload = random_payload(layout, rank, step, seed);
    gathered.insert(gathered.end(), payload.begin(), payload.end());
  }
  return gathered;
}

// ---- parallel_for

using Range = std::function<void(int64_t, int64_t)>;

// Stand-ins for a thread pool: the same work, cut and ordered in different ways.
struct Cut {
  const char* name;
  std::function<void(int64_t, const Range&)> parallel_for;
};

inline const std::vector<Cut>& all_cuts() {
  static const std::vector<Cut> cuts = {
      {"whole", [](int64_t count, const Range& run) { run(0, count); }},
      {"one by one",
       [](int64_t count, const Range& run) {
         for (int64_t i = 0; i < count; ++i) run(i, i + 1);
       }},
      {"one by one, last first",
       [](int64_t count, const Range& run) {
         for (int64_t i = count; i > 0; --i) run(i - 1, i);
       }},
      {"two halves, second first",
       [](int64_t count, const Range& run) {
         run(count / 2, count);
         run(0, count / 2);
       }},
      {"random pieces in random order",
       [](int64_t count, const Range& run) {
         Random random(static_cast<uint64_t>(count));
         std::vector<std::pair<int64_t, int64_t>> pieces;
         for (int64_t begin = 0; begin < count;) {
           const int64_t end = std::min(count, begin + random.integer(1, 5));
           pieces.emplace_back(begin, end);
           begin = end;
         }
         for (size_t i = pieces.size(); i > 1; --i)
           std::swap(pieces[i - 1], pieces[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i)))]);
         for (const auto& [begin, end] : pieces) run(begin, end);
       }},
  };
  return cuts;
}

} // namespace compressed_ddp::testing
