#include "wire_format.h"

#include <cstring>
#include <stdexcept>

namespace compressed_ddp {
namespace {

constexpr const char* kModulo = " (modulo 65536)";

int64_t values_bytes(const PayloadCounts& c) {
  switch (c.value_format) {
    case ValueFormat::kFloat32:
      return 4 * c.selected_numel;
    case ValueFormat::kBFloat16:
      return 2 * c.selected_numel;
    default:
      return (c.selected_numel + 31) / 32 * 4;
  }
}

std::string differs(const char* field, int64_t expected, int64_t got) {
  return std::string(field) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got);
}

} // namespace

PayloadSections payload_sections(const Layout& layout) {
  return payload_sections(PayloadCounts{layout.numel, layout.selected_numel, layout.dense_numel, static_cast<int64_t>(layout.groups.size()),
                                        layout.value_format});
}

PayloadSections payload_sections(const PayloadCounts& c) {
  PayloadSections s{};
  s.directory_numel = (c.selected_numel + kDirectoryStride - 1) / kDirectoryStride;
  s.high_bits = c.selected_numel == 0 ? 0 : c.selected_numel + ((c.numel - 1) >> kLowBits);
  s.high = static_cast<int64_t>(sizeof(PayloadHeader));
  s.directory = s.high + 8 * s.high_words();
  s.scales = s.directory + 4 * s.directory_numel;
  s.dense = s.scales + (c.value_format == ValueFormat::kSign ? 4 * c.num_groups : 0);
  s.values = s.dense + 4 * c.dense_numel;
  s.low = s.values + values_bytes(c);
  s.used_bytes = s.low + c.selected_numel;
  s.payload_bytes = (s.used_bytes + kPayloadAlignment - 1) / kPayloadAlignment * kPayloadAlignment;
  return s;
}

PayloadHeader make_header(const Layout& layout, int64_t rank, int64_t step, bool non_finite) {
  return {kWireVersion, non_finite ? kFlagNonFinite : uint8_t{0}, static_cast<uint16_t>(rank), static_cast<uint16_t>(step),
          layout_check(layout.hash)};
}

PayloadHeader read_header(const uint8_t* payload) {
  PayloadHeader header;
  std::memcpy(&header, payload, sizeof header);
  return header;
}

std::string check_header(const Layout& layout, const uint8_t* payload, int64_t rank, int64_t step) {
  return check_header(make_header(layout, rank, step, false), payload);
}

std::string check_header(const PayloadHeader& expected, const uint8_t* payload) {
  const PayloadHeader got = read_header(payload);
  if (got.version != expected.version)
    return differs("wire format version", expected.version, got.version) + "; install the same compressed_ddp on every rank";
  if ((got.flags & kFlagRefused) != 0) return kRefusedWords;
  if ((got.flags & ~kFlagNonFinite) != 0) return differs("flags beyond the non-finite one", 0, got.flags & ~kFlagNonFinite);
  if (got.rank != expected.rank) return differs("rank", expected.rank, got.rank) + kModulo;
  if (got.step != expected.step) return differs("step", expected.step, got.step) + kModulo;
  if (got.layout != expected.layout) return "layout differs: other segments, groups, k or value_format";
  return {};
}

const char* name_of(ValueFormat value_format) {
  switch (value_format) {
    case ValueFormat::kFloat32:
      return "fp32";
    case ValueFormat::kBFloat16:
      return "bf16";
    case ValueFormat::kSign:
      return "sign";
  }
  return "an unknown one"; // of a rank with a later version
}

ValueFormat value_format_of(std::string_view name) {
  for (const ValueFormat value_format : {ValueFormat::kFloat32, ValueFormat::kBFloat16, ValueFormat::kSign})
    if (name == name_of(value_format)) return value_format;
  throw std::invalid_argument("value_format must be one of ('fp32', 'bf16', 'sign'), got '" + std::string(name) + "'");
}

} // namespace compressed_ddp
