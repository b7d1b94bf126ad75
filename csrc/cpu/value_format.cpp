#include "value_format.h"

#include <array>
#include <cmath>
#include <cstring>

#include "float_types.h"

namespace compressed_ddp {
namespace {

static_assert(kPieceNumel % 32 == 0, "pieces share no word of signs");

constexpr int kExponents = 256;
constexpr int kPartials = 32; // as many as a warp has lanes: cuda/encode.cuh adds in the same order

// Calls function(begin, end, scale) for the entries of a piece, group by group.
template <typename Function>
void for_each_group(const Layout& layout, const float* scales, Piece piece, Function&& function) {
  auto group = std::upper_bound(layout.groups.begin(), layout.groups.end(), piece.begin,
                                [](int64_t entry, const Group& g) { return entry < g.entry_offset; }) -
               1;
  for (int64_t begin = piece.begin; begin < piece.end; ++group) {
    const int64_t end = std::min(piece.end, group->entry_offset + group->k);
    function(begin, end, scales[group - layout.groups.begin()]);
    begin = end;
  }
}

uint32_t canonical_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits & 0x7fffffffu) > kInfinityKey ? kCanonicalNanBits : bits;
}

float with_sign(float magnitude, uint32_t negative) { return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) ^ negative << 31); }

} // namespace

float sign_scale(const float* values, int64_t count) {
  std::array<uint64_t, kExponents> sums{};
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    const uint32_t exponent = bits >> 23 & 0xffu; // the sum of 255, Inf and NaN, is left out below
    sums[exponent] += (bits & 0x7fffffu) | static_cast<uint32_t>(exponent != 0) << 23;
  }
  sums[kExponents - 1] = 0;
  std::array<double, kPartials> partial{};
  for (int p = 0; p < kPartials; ++p)
    for (int e = p * kExponents / kPartials; e < (p + 1) * kExponents / kPartials; ++e)
      partial[static_cast<size_t>(p)] += std::ldexp(static_cast<double>(sums[static_cast<size_t>(e)]), std::max(e, 1) - 150);
  for (size_t distance = 1; distance < kPartials; distance *= 2) {
    const auto before = partial;
    for (size_t p = 0; p < kPartials; ++p) partial[p] = before[p] + before[p ^ distance];
  }
  return static_cast<float>(partial[0] * (1.0 / static_cast<double>(count)));
}

void encode_values(const Layout& layout, const PayloadSections& sections, const float* values, Piece piece, uint8_t* payload, float* lost) {
  uint8_t* out = payload + sections.values;
  const int64_t count = piece.end - piece.begin;
  values += piece.begin;
  switch (layout.value_format) {
    case ValueFormat::kFloat32: {
      auto* coded = reinterpret_cast<uint32_t*>(out) + piece.begin;
      for (int64_t i = 0; i < count; ++i) coded[i] = canonical_bits(values[i]);
      return;
    }
    case ValueFormat::kBFloat16: {
      auto* coded = reinterpret_cast<uint16_t*>(out) + piece.begin;
      for (int64_t i = 0; i < count; ++i) coded[i] = wire_bfloat16(values[i]);
      for (int64_t i = 0; i < count; ++i) {
        const float difference = values[i] - to_float(BFloat16{coded[i]});
        lost[i] = is_finite_key(selection_key(values[i])) ? difference : 0.0f;
      }
      return;
    }
    case ValueFormat::kSign: {
      auto* words = reinterpret_cast<uint32_t*>(out);
      for (int64_t e = piece.begin; e < piece.end; e += 32) {
        uint32_t word = 0;
        for (int64_t i = e; i < std::min(e + 32, piece.end); ++i) word |= (canonical_bits(values[i - piece.begin]) >> 31) << (i % 32);
        words[e / 32] = word;
      }
      const auto* scales = reinterpret_cast<const float*>(payload + sections.scales);
      for_each_group(layout, scales, piece, [&](int64_t begin, int64_t end, float scale) {
        for (int64_t i = begin - piece.begin; i < end - piece.begin; ++i) {
          const float difference = values[i] - with_sign(scale, std::bit_cast<uint32_t>(values[i]) >> 31);
          lost[i] = is_finite_key(selection_key(values[i])) ? difference : 0.0f;
        }
      });
      return;
    }
  }
}

void decode_values(const Layout& layout, const PayloadSections& sections, const uint8_t* payload, Piece piece, float* values) {
  const uint8_t* in = payload + sections.values;
  switch (layout.value_format) {
    case ValueFormat::kFloat32:
      std::memcpy(values + piece.begin, in + 4 * piece.begin, static_cast<size_t>(4 * (piece.end - piece.begin)));
      return;
    case ValueFormat::kBFloat16: {
      const auto* coded = reinterpret_cast<const uint16_t*>(in);
      for (int64_t e = piece.begin; e < piece.end; ++e) values[e] = to_float(BFloat16{coded[e]});
      return;
    }
    case ValueFormat::kSign: {
      const auto* words = reinterpret_cast<const uint32_t*>(in);
      const auto* scales = reinterpret_cast<const float*>(payload + sections.scales);
      for_each_group(layout, scales, piece, [&](int64_t begin, int64_t end, float scale) {
        for (int64_t e = begin; e < end; ++e) values[e] = with_sign(scale, words[e / 32] >> (e % 32) & 1u);
      });
      return;
    }
  }
}

} // namespace compressed_ddp
