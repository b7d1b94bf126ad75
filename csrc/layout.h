// How one bucket is cut into selections. Torch-free; shared by every stage, so that all of them agree on it.
//
// A bucket is a flat run of `numel` entries made of segments, in order, without gaps. A segment is either dense (all of it
// travels as fp32) or belongs to a group. A group is one selection: exactly k of its entries travel. Groups are numbered
// 0, 1, 2, .. in bucket order, so that writing the groups one after another gives indices that ascend over the whole bucket.
//
//   scope "tensor"   one group per compressed parameter
//   scope "chunk"    one segment and group per 4096 entries of a compressed parameter
//   scope "bucket"   one group over all compressed segments of the bucket (dense segments may lie between them)
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace compressed_ddp {

inline constexpr int32_t kDenseGroup = -1;

// How the values of selected entries travel (wire_format.h). What rounding loses goes back to the residual.
enum class ValueFormat : uint8_t { kFloat32 = 0, kBFloat16 = 1, kSign = 2 };

struct Segment {
  int64_t offset; // position of its first entry in the bucket
  int64_t numel;
  int32_t group;        // kDenseGroup, or the index of its group
  int64_t dense_offset; // dense segments: position of its first entry among the payload's dense entries
};

struct Group {
  int64_t k;             // entries that travel
  int64_t numel;         // entries to choose from
  int64_t entry_offset;  // position of its first entry among the payload's selected entries
  int32_t first_segment; // its segments lie in [first_segment, last_segment], possibly with dense ones between
  int32_t last_segment;
};

struct Layout {
  std::vector<Segment> segments;
  std::vector<Group> groups;
  int64_t numel = 0;          // of the bucket
  int64_t selected_numel = 0; // sum of k
  int64_t dense_numel = 0;    // sum of the dense segments
  ValueFormat value_format = ValueFormat::kFloat32;
  uint64_t hash = 0; // FNV-1a over segments, groups, k and value format; equal layouts have equal hashes on every machine

  // Throws std::invalid_argument, naming the segment or group, when the description is not a layout (see the checks there).
  static Layout make(std::span<const int64_t> segment_numels, std::span<const int64_t> segment_groups, std::span<const int64_t> group_k,
                     ValueFormat value_format = ValueFormat::kFloat32);
};

// k of a selection: max(1, ceil(density * numel)) in double, at most numel; 0 when numel is 0. density in (0, 1].
int64_t selection_k(double density, int64_t numel);

// FNV-1a, continued from `seed`, over bytes; the one hash of the project (agreement, layouts, names).
inline constexpr uint64_t kHashSeed = 0xcbf29ce484222325ull;
uint64_t hash_bytes(const void* data, uint64_t num_bytes, uint64_t seed = kHashSeed);

} // namespace compressed_ddp
