// Byte layout of a payload, version 3. docs/wire_format.md is the same page for people. Torch-free.
//
//   section    bytes                                            content
//   header     8                                                PayloadHeader
//   high       8 * ceil((selected_numel + (numel - 1 >> 8)) / 64)   bit (index >> 8) + p is set for entry p; nothing without entries
//   directory  4 * ceil(selected_numel / 256)                   uint32: index >> 8 of entries 0, 256, 512, ..
//   scales     4 * number of groups                             fp32, value format sign only: what a value of that group counts
//   dense      4 * dense_numel                                  fp32, the dense segments in bucket order
//   values     4, 2 or 1/8 * selected_numel                     fp32, bf16, or a sign bit in uint32 words; in the order of the indices
//   low        selected_numel                                   uint8: index & 255
//
// Nothing lies between the sections, whose order aligns each to its elements; zeros follow up to a multiple of 8. Indices are positions in
// the bucket, strictly ascending: high and low are their Elias-Fano code with 8 low bits (Elias 1974, Fano 1971), which takes 9 + numel /
// (256 * selected_numel) bits per entry whatever the indices are. The directory lets a decoder begin anywhere.
//
// All numbers are little-endian. The size is a pure function of the layout: every rank knows it before any byte moves. The header is as
// short as it is because in an exchange among 1,024 ranks a payload has some two hundred bytes: what ranks have to agree on is compared
// in full before the first payload (agreement.h), and what is left here tells a payload that is out of place.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "layout.h"

namespace compressed_ddp {

static_assert(std::endian::native == std::endian::little, "payloads are written as they lie in memory: little-endian machines only");

inline constexpr uint8_t kWireVersion = 3;
inline constexpr uint8_t kFlagNonFinite = 1; // some compensated or dense entry of this rank is Inf or NaN
inline constexpr uint8_t kFlagRefused = 2;   // no payload: its rank has failed before, and says so in its place
inline constexpr int64_t kPayloadAlignment = 8;
inline constexpr int64_t kLowBits = 8;
inline constexpr int64_t kDirectoryStride = 256; // entries

struct alignas(8) PayloadHeader { // written and read as one word
  uint8_t version;
  uint8_t flags;
  uint16_t rank; // the last 16 bits, as of the step
  uint16_t step;
  uint16_t layout; // layout_check
};
static_assert(sizeof(PayloadHeader) == 8 && offsetof(PayloadHeader, flags) == 1 && offsetof(PayloadHeader, rank) == 2 &&
              offsetof(PayloadHeader, step) == 4 && offsetof(PayloadHeader, layout) == 6);

// Where the sections of a payload begin, in bytes.
struct PayloadSections {
  int64_t high;
  int64_t directory;
  int64_t scales;
  int64_t dense;
  int64_t values;
  int64_t low;
  int64_t used_bytes;    // zeros from here on
  int64_t payload_bytes; // a multiple of kPayloadAlignment
  int64_t directory_numel;
  int64_t high_bits; // that entries can set
  int64_t high_words() const { return (high_bits + 63) / 64; }
};
PayloadSections payload_sections(const Layout& layout);

// All that the sections of a payload depend on.
struct PayloadCounts {
  int64_t numel = 0, selected_numel = 0, dense_numel = 0, num_groups = 0;
  ValueFormat value_format = ValueFormat::kFloat32;
};
PayloadSections payload_sections(const PayloadCounts& counts);

inline int64_t payload_bytes(const Layout& layout) { return payload_sections(layout).payload_bytes; }

// 16 bits of Layout::hash, or of any other.
constexpr uint16_t layout_check(uint64_t hash) { return static_cast<uint16_t>(hash ^ hash >> 16 ^ hash >> 32 ^ hash >> 48); }

// The header that rank `rank` writes for `layout` at `step`.
PayloadHeader make_header(const Layout& layout, int64_t rank, int64_t step, bool non_finite);
PayloadHeader read_header(const uint8_t* payload);

// What check_header says of a payload with kFlagRefused.
inline constexpr const char* kRefusedWords = "its rank had nothing to send: its own error says why";

// Compares the header of a payload that came from outside with what this rank expects. Empty, or one line that says which field differs.
std::string check_header(const Layout& layout, const uint8_t* payload, int64_t rank, int64_t step);
// The same with the header that is expected; its flags are not compared.
std::string check_header(const PayloadHeader& expected, const uint8_t* payload);

// "fp32", "bf16", "sign"
const char* name_of(ValueFormat value_format);

// The other way round. Throws std::invalid_argument for any other name.
ValueFormat value_format_of(std::string_view name);

} // namespace compressed_ddp
