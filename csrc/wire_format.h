// Byte layout of a payload, version 1. docs/wire_format.md is the same page for people. Torch-free.
//
//   offset                          bytes                 field
//   0                               64                    PayloadHeader
//   64                              4 * selected_numel    indices   int32, positions in the bucket, strictly ascending
//   64 + 4 * selected_numel         4 * selected_numel    values    fp32, in the order of the indices
//   64 + 8 * selected_numel         4 * dense_numel       dense     fp32, the dense segments in bucket order
//   ..                              0 .. 60               zeros up to a multiple of 64
//
// All numbers are little-endian. The size is a pure function of the layout: every rank knows it before any byte moves.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "layout.h"

namespace compressed_ddp {

static_assert(std::endian::native == std::endian::little, "payloads are written as they lie in memory: little-endian machines only");

inline constexpr uint32_t kPayloadMagic = 0x50444443; // "CDDP" in the file
inline constexpr uint16_t kWireVersion = 1;
inline constexpr uint16_t kFlagNonFinite = 1; // some compensated or dense entry of this rank is Inf or NaN
inline constexpr int64_t kPayloadAlignment = 64;

struct PayloadHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t flags;
  uint32_t rank;
  uint32_t world_size;
  uint64_t layout_hash;
  int64_t step;
  int64_t numel;
  int64_t selected_numel;
  int64_t dense_numel;
  int64_t payload_bytes;
};
static_assert(sizeof(PayloadHeader) == 64 && offsetof(PayloadHeader, layout_hash) == 16 && offsetof(PayloadHeader, payload_bytes) == 56);

inline int64_t indices_offset_bytes() { return static_cast<int64_t>(sizeof(PayloadHeader)); }
inline int64_t values_offset_bytes(const Layout& layout) { return indices_offset_bytes() + 4 * layout.selected_numel; }
inline int64_t dense_offset_bytes(const Layout& layout) { return values_offset_bytes(layout) + 4 * layout.selected_numel; }
inline int64_t payload_bytes(const Layout& layout) {
  const int64_t used_bytes = dense_offset_bytes(layout) + 4 * layout.dense_numel;
  return (used_bytes + kPayloadAlignment - 1) / kPayloadAlignment * kPayloadAlignment;
}

inline const int32_t* payload_indices(const Layout&, const uint8_t* payload) {
  return reinterpret_cast<const int32_t*>(payload + indices_offset_bytes());
}
inline const float* payload_values(const Layout& layout, const uint8_t* payload) {
  return reinterpret_cast<const float*>(payload + values_offset_bytes(layout));
}
inline const float* payload_dense(const Layout& layout, const uint8_t* payload) {
  return reinterpret_cast<const float*>(payload + dense_offset_bytes(layout));
}

// The header that rank `rank` writes for `layout` at `step`.
PayloadHeader make_header(const Layout& layout, uint32_t rank, uint32_t world_size, int64_t step, bool non_finite);

// Checks a payload that came from outside: header against what this rank expects, then every index against its group.
// Returns an empty string when it is safe and meant for (layout, rank, world_size, step); otherwise one line that says which field differs.
// Reads payload_bytes(layout) bytes from a pointer aligned to 4. Never reads further, whatever the bytes say.
std::string check_payload(const Layout& layout, const uint8_t* payload, uint32_t rank, uint32_t world_size, int64_t step);

PayloadHeader read_header(const uint8_t* payload);

} // namespace compressed_ddp
