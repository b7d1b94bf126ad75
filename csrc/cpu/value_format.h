// The values of selected entries in the three formats of wire_format.h. Torch-free.
//
//   fp32   as they are
//   bf16   wire_bfloat16 (float_types.h): 8 bits of significand; acc - decoded is exact, so the residual keeps it all
//   sign   one bit, and one scale per group, the mean magnitude of what the group sends (Seide et al. 2014; Bernstein et al. 2018:
//          the best scale of a sign vector in the square norm); acc - decoded is rounded once
// Every NaN travels as one NaN; of sign values a non-finite bucket travels with scales of zero, so that nothing leaves the residual.
#pragma once

#include <array>
#include <bit>
#include <limits>
#include <span>

#include "../wire_format.h"
#include "elias_fano.h"
#include "encode_kernels.h"
#include "float_types.h"

namespace compressed_ddp {

// The scale of a group of `count` values: their mean magnitude, Inf and NaN counting as 0. The sums are added in one fixed order
// (docs/wire_format.md): the same bits wherever it is computed.
float sign_scale(const ExponentSums& sums, int64_t count);

// Writes the values of entries [piece.begin, piece.end); what decoding will not give back goes to `lost` [piece.end - piece.begin]:
// fl(value - decoded), 0 for non-finite values; nothing with fp32, which loses nothing. Scales are in the payload already. Pieces may be
// written at the same time. Returns the sum of lost^2. With bf16 values `lost` may be nullptr.
double encode_values(const Layout& layout, const PayloadSections& sections, const float* values, Piece piece, uint8_t* payload,
                     float* lost);

// The values of a payload as fp32. Before the value of an entry is read, prepare(entry) says how far one may read from there on without
// another call; entries ascend from call to call.
template <ValueFormat format>
class ValueReader;

template <>
class ValueReader<ValueFormat::kFloat32> {
 public:
  ValueReader(const Layout&, const PayloadSections& sections, const uint8_t* payload)
      : values_(reinterpret_cast<const float*>(payload + sections.values)) {}
  int64_t prepare(int64_t) { return std::numeric_limits<int64_t>::max(); }
  float operator[](int64_t entry) const { return values_[entry]; }

 private:
  const float* values_;
};

template <>
class ValueReader<ValueFormat::kBFloat16> {
 public:
  ValueReader(const Layout&, const PayloadSections& sections, const uint8_t* payload)
      : values_(reinterpret_cast<const uint16_t*>(payload + sections.values)) {}
  int64_t prepare(int64_t) { return std::numeric_limits<int64_t>::max(); }
  float operator[](int64_t entry) const { return to_float(BFloat16{values_[entry]}); }

 private:
  const uint16_t* values_;
};

template <>
class ValueReader<ValueFormat::kSign> { // group by group
 public:
  ValueReader(const Layout& layout, const PayloadSections& sections, const uint8_t* payload)
      : words_(reinterpret_cast<const uint32_t*>(payload + sections.values)),
        scales_(reinterpret_cast<const uint32_t*>(payload + sections.scales)),
        groups_(layout.groups) {}
  int64_t prepare(int64_t entry) {
    if (entry < group_end_) return group_end_;
    const auto group = std::upper_bound(groups_.begin() + group_, groups_.end(), entry,
                                        [](int64_t e, const Group& g) { return e < g.entry_offset + g.k; });
    group_ = group - groups_.begin();
    group_end_ = group->entry_offset + group->k;
    scale_ = scales_[group_];
    return group_end_;
  }
  float operator[](int64_t entry) const { return std::bit_cast<float>(scale_ ^ (words_[entry / 32] >> (entry % 32)) << 31); }

 private:
  const uint32_t* words_;
  const uint32_t* scales_;
  std::span<const Group> groups_;
  int64_t group_ = 0;
  int64_t group_end_ = 0; // entries before it have this scale
  uint32_t scale_ = 0;
};

// Calls function(entry, value) for entries [begin, end).
template <ValueFormat format, typename Function>
void for_each_value(ValueReader<format>& values, int64_t begin, int64_t end, Function&& function) {
  while (begin < end) {
    const int64_t prepared = std::min(end, values.prepare(begin));
    const ValueReader<format> reader = values; // a copy, which no store of the function can change
    for (; begin < prepared; ++begin) function(begin, reader[begin]);
  }
}

// Calls function(ValueReader) with a reader of the layout's format.
template <typename Function>
auto with_value_reader(const Layout& layout, const PayloadSections& sections, const uint8_t* payload, Function&& function) {
  switch (layout.value_format) {
    case ValueFormat::kFloat32:
      return function(ValueReader<ValueFormat::kFloat32>(layout, sections, payload));
    case ValueFormat::kBFloat16:
      return function(ValueReader<ValueFormat::kBFloat16>(layout, sections, payload));
    default:
      return function(ValueReader<ValueFormat::kSign>(layout, sections, payload));
  }
}

} // namespace compressed_ddp
