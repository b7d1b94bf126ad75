#include "wire_format.h"

#include <cstring>

namespace compressed_ddp {
namespace {

std::string differs(const char* field, int64_t expected, int64_t got) {
  return std::string(field) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got);
}

// Strictly ascending, and inside [first, last]. One sweep without branches: the compiler turns it into vector code.
bool ascending_within(const int32_t* indices, int64_t count, int64_t first, int64_t last) {
  if (count == 0) return true;
  if (indices[0] < first || indices[count - 1] > last) return false;
  bool ascending = true;
  for (int64_t i = 1; i < count; ++i) ascending &= indices[i - 1] < indices[i];
  return ascending;
}

std::string check_indices(const Layout& layout, const int32_t* indices) {
  for (size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    const Segment& last = layout.segments[static_cast<size_t>(group.last_segment)];
    const int64_t first_index = layout.segments[static_cast<size_t>(group.first_segment)].offset;
    const int64_t last_index = last.offset + last.numel - 1;
    if (!ascending_within(indices + group.entry_offset, group.k, first_index, last_index))
      return "the indices of group " + std::to_string(g) + " are not strictly ascending in [" + std::to_string(first_index) + ", " +
             std::to_string(last_index) + "]";
  }
  return {};
}

} // namespace

PayloadHeader make_header(const Layout& layout, uint32_t rank, uint32_t world_size, int64_t step, bool non_finite) {
  return {kPayloadMagic,
          kWireVersion,
          non_finite ? kFlagNonFinite : uint16_t{0},
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

std::string check_payload(const Layout& layout, const uint8_t* payload, uint32_t rank, uint32_t world_size, int64_t step) {
  const PayloadHeader got = read_header(payload);
  if (got.magic != kPayloadMagic) return differs("magic", kPayloadMagic, got.magic);
  if (got.version != kWireVersion)
    return differs("wire format version", kWireVersion, got.version) + "; install the same compressed_ddp on every rank";
  if ((got.flags & ~kFlagNonFinite) != 0) return differs("flags beyond the non-finite one", 0, got.flags & ~kFlagNonFinite);
  if (got.world_size != world_size) return differs("world_size", world_size, got.world_size);
  if (got.rank != rank) return differs("rank", rank, got.rank);
  if (got.step != step) return differs("step", step, got.step);
  if (got.numel != layout.numel) return differs("numel", layout.numel, got.numel);
  if (got.selected_numel != layout.selected_numel) return differs("selected entries", layout.selected_numel, got.selected_numel);
  if (got.dense_numel != layout.dense_numel) return differs("dense entries", layout.dense_numel, got.dense_numel);
  if (got.payload_bytes != payload_bytes(layout)) return differs("payload_bytes", payload_bytes(layout), got.payload_bytes);
  if (got.layout_hash != layout.hash) return "layout_hash differs: other segments, groups or k";
  return check_indices(layout, payload_indices(layout, payload));
}

} // namespace compressed_ddp
