#include "wire_format.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

namespace compressed_ddp {
namespace {

constexpr int64_t kSectionAlignment = 8;

int64_t aligned(int64_t bytes, int64_t alignment) { return (bytes + alignment - 1) / alignment * alignment; }

int64_t scales_bytes(const Layout& layout) {
  return layout.value_format == ValueFormat::kSign ? 4 * static_cast<int64_t>(layout.groups.size()) : 0;
}
int64_t values_bytes(const Layout& layout) {
  switch (layout.value_format) {
    case ValueFormat::kFloat32:
      return 4 * layout.selected_numel;
    case ValueFormat::kBFloat16:
      return 2 * layout.selected_numel;
    default:
      return (layout.selected_numel + 31) / 32 * 4;
  }
}

std::string differs(const char* field, int64_t expected, int64_t got) {
  return std::string(field) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got);
}

std::string hex(uint32_t number) {
  char digits[11];
  std::snprintf(digits, sizeof digits, "0x%08x", number);
  return digits;
}

} // namespace

PayloadSections payload_sections(const Layout& layout) {
  PayloadSections s{};
  s.directory_numel = (layout.selected_numel + kDirectoryStride - 1) / kDirectoryStride;
  s.high_bits = layout.selected_numel == 0 ? 0 : layout.selected_numel + ((layout.numel - 1) >> kLowBits);
  s.directory = static_cast<int64_t>(sizeof(PayloadHeader));
  s.high = aligned(s.directory + 4 * s.directory_numel, kSectionAlignment);
  s.scales = s.high + 8 * s.high_words();
  s.dense = aligned(s.scales + scales_bytes(layout), kSectionAlignment);
  s.values = aligned(s.dense + 4 * layout.dense_numel, kSectionAlignment);
  s.low = aligned(s.values + values_bytes(layout), kSectionAlignment);
  s.payload_bytes = aligned(s.low + layout.selected_numel, kPayloadAlignment);
  return s;
}

std::array<Gap, kPayloadGaps> payload_gaps(const Layout& layout) {
  const PayloadSections s = payload_sections(layout);
  return {{{s.directory + 4 * s.directory_numel, s.high},
           {s.scales + scales_bytes(layout), s.dense},
           {s.dense + 4 * layout.dense_numel, s.values},
           {s.values + values_bytes(layout), s.low},
           {s.low + layout.selected_numel, s.payload_bytes}}};
}

PayloadHeader make_header(const Layout& layout, uint32_t rank, uint32_t world_size, int64_t step, bool non_finite) {
  return {kPayloadMagic,
          kWireVersion,
          non_finite ? kFlagNonFinite : uint8_t{0},
          layout.value_format,
          rank,
          world_size,
          layout.hash,
          step,
          layout.numel,
          layout.selected_numel,
          layout.dense_numel,
          payload_bytes(layout)};
}

PayloadHeader read_header(const uint8_t* payload) {
  PayloadHeader header;
  std::memcpy(&header, payload, sizeof header);
  return header;
}

std::string check_header(const Layout& layout, const uint8_t* payload, uint32_t rank, uint32_t world_size, int64_t step) {
  return check_header(make_header(layout, rank, world_size, step, false), payload);
}

std::string check_header(const PayloadHeader& expected, const uint8_t* payload) {
  const PayloadHeader got = read_header(payload);
  if (got.magic != expected.magic) return "magic: expected " + hex(expected.magic) + ", got " + hex(got.magic);
  if (got.version != expected.version)
    return differs("wire format version", expected.version, got.version) + "; install the same compressed_ddp on every rank";
  if ((got.flags & kFlagRefused) != 0) return "it had received a payload that it could not use: its own error says which";
  if ((got.flags & ~kFlagNonFinite) != 0) return differs("flags beyond the non-finite one", 0, got.flags & ~kFlagNonFinite);
  if (got.value_format != expected.value_format)
    return std::string("value_format: expected ") + name_of(expected.value_format) + ", got " + name_of(got.value_format);
  if (got.world_size != expected.world_size) return differs("world_size", expected.world_size, got.world_size);
  if (got.rank != expected.rank) return differs("rank", expected.rank, got.rank);
  if (got.step != expected.step) return differs("step", expected.step, got.step);
  if (got.numel != expected.numel) return differs("numel", expected.numel, got.numel);
  if (got.selected_numel != expected.selected_numel) return differs("selected entries", expected.selected_numel, got.selected_numel);
  if (got.dense_numel != expected.dense_numel) return differs("dense entries", expected.dense_numel, got.dense_numel);
  if (got.payload_bytes != expected.payload_bytes) return differs("payload_bytes", expected.payload_bytes, got.payload_bytes);
  if (got.layout_hash != expected.layout_hash) return "layout_hash differs: other segments, groups or k";
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
  return "an unknown one"; // of a hostile header
}

ValueFormat value_format_of(std::string_view name) {
  for (const ValueFormat value_format : {ValueFormat::kFloat32, ValueFormat::kBFloat16, ValueFormat::kSign})
    if (name == name_of(value_format)) return value_format;
  throw std::invalid_argument("value_format must be one of ('fp32', 'bf16', 'sign'), got '" + std::string(name) + "'");
}

} // namespace compressed_ddp
