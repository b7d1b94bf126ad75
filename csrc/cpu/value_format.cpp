#include "value_format.h"

#include <cmath>

#include "encode_kernels.h"

namespace compressed_ddp {
namespace {

static_assert(kPieceNumel % 32 == 0, "pieces share no word of signs");

constexpr size_t kExponents = std::tuple_size_v<ExponentSums>;
constexpr size_t kPartials = 32; // as many as a warp has lanes: cuda/encode.cuh adds in the same order

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

} // namespace

float sign_scale(const ExponentSums& sums, int64_t count) {
  std::array<double, kPartials> partial{};
  for (size_t p = 0; p < kPartials; ++p)
    for (size_t e = p * kExponents / kPartials; e < (p + 1) * kExponents / kPartials; ++e)
      if (e + 1 < kExponents) // the last is that of Inf and NaN
        partial[p] += std::ldexp(static_cast<double>(sums[e]), std::max(static_cast<int>(e), 1) - 150);
  for (size_t distance = 1; distance < kPartials; distance *= 2) {
    const auto before = partial;
    for (size_t p = 0; p < kPartials; ++p) partial[p] = before[p] + before[p ^ distance];
  }
  return static_cast<float>(partial[0] * (1.0 / static_cast<double>(count)));
}

double encode_values(const Layout& layout, const PayloadSections& sections, const float* values, Piece piece, uint8_t* payload,
                     float* lost) {
  uint8_t* out = payload + sections.values;
  const int64_t count = piece.end - piece.begin;
  values += piece.begin;
  switch (layout.value_format) {
    case ValueFormat::kFloat32: {
      auto* coded = reinterpret_cast<uint32_t*>(out) + piece.begin;
      for (int64_t i = 0; i < count; ++i) coded[i] = canonical_bits(values[i]);
      return 0;
    }
    case ValueFormat::kBFloat16:
      return best_encode().bfloat16(values, count, reinterpret_cast<uint16_t*>(out) + piece.begin, lost);
    case ValueFormat::kSign:
      break;
  }
  best_encode().signs(values, count, reinterpret_cast<uint32_t*>(out) + piece.begin / 32);
  double lost_sq = 0;
  for_each_group(layout, reinterpret_cast<const float*>(payload + sections.scales), piece, [&](int64_t begin, int64_t end, float scale) {
    const int64_t at = begin - piece.begin;
    lost_sq += best_encode().lost_by_signs(values + at, end - begin, scale, lost + at);
  });
  return lost_sq;
}

} // namespace compressed_ddp
