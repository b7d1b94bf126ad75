#include "layout.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace compressed_ddp {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("layout: " + what); }

uint64_t hash_number(int64_t number, uint64_t seed) {
  // Byte by byte from the low end, so that the hash does not depend on the machine's byte order.
  unsigned char bytes[8];
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<unsigned char>(static_cast<uint64_t>(number) >> (8 * i));
  return hash_bytes(bytes, sizeof bytes, seed);
}

} // namespace

uint64_t hash_bytes(const void* data, uint64_t num_bytes, uint64_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t hash = seed;
  for (uint64_t i = 0; i < num_bytes; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

int64_t selection_k(double density, int64_t numel) {
  if (!(density > 0.0 && density <= 1.0)) throw std::invalid_argument("density must be in (0, 1], got " + std::to_string(density));
  if (numel <= 0) return 0;
  const auto k = static_cast<int64_t>(std::ceil(density * static_cast<double>(numel)));
  return std::clamp<int64_t>(k, 1, numel);
}

Layout Layout::make(std::span<const int64_t> segment_numels, std::span<const int64_t> segment_groups, std::span<const int64_t> group_k,
                    ValueFormat value_format) {
  if (segment_numels.size() != segment_groups.size())
    refuse("expected one group per segment but got " + std::to_string(segment_numels.size()) + " segments and " +
           std::to_string(segment_groups.size()) + " groups");
  Layout layout;
  layout.value_format = value_format;
  layout.segments.reserve(segment_numels.size());
  for (size_t s = 0; s < segment_numels.size(); ++s) {
    const int64_t numel = segment_numels[s];
    const int64_t group = segment_groups[s];
    if (numel < 0) refuse("segment " + std::to_string(s) + " has a negative numel " + std::to_string(numel));
    // Indices travel as int32; the limit also keeps every byte count below far inside int64.
    if (numel > std::numeric_limits<int32_t>::max() - layout.numel)
      refuse("a bucket holds at most 2147483647 entries, segment " + std::to_string(s) +
             " goes beyond; use dense_steps >= 1 (the first DDP bucket holds the whole model) or a smaller bucket_cap_mb");
    Segment segment{layout.numel, numel, kDenseGroup, 0};
    if (group == kDenseGroup) {
      segment.dense_offset = layout.dense_numel;
      layout.dense_numel += numel;
    } else {
      const auto num_groups = static_cast<int64_t>(layout.groups.size());
      if (group != num_groups && group != num_groups - 1)
        refuse("groups must be numbered 0, 1, 2, .. in bucket order (-1 = dense), segment " + std::to_string(s) + " has group " +
               std::to_string(group));
      if (group == num_groups) layout.groups.push_back(Group{0, 0, 0, static_cast<int32_t>(s), static_cast<int32_t>(s)});
      layout.groups.back().numel += numel;
      layout.groups.back().last_segment = static_cast<int32_t>(s);
      segment.group = static_cast<int32_t>(group);
    }
    layout.segments.push_back(segment);
    layout.numel += numel;
  }
  if (layout.groups.size() != group_k.size())
    refuse("expected one k per group but got " + std::to_string(layout.groups.size()) + " groups and " + std::to_string(group_k.size()) +
           " k");
  for (size_t g = 0; g < group_k.size(); ++g) {
    Group& group = layout.groups[g];
    if (group_k[g] < 1 || group_k[g] > group.numel)
      refuse("k of group " + std::to_string(g) + " must be in [1, " + std::to_string(group.numel) + "], got " + std::to_string(group_k[g]));
    group.k = group_k[g];
    group.entry_offset = layout.selected_numel;
    layout.selected_numel += group.k;
  }
  layout.hash = hash_number(static_cast<int64_t>(layout.segments.size()), kHashSeed);
  for (const Segment& segment : layout.segments) layout.hash = hash_number(segment.group, hash_number(segment.numel, layout.hash));
  for (const Group& group : layout.groups) layout.hash = hash_number(group.k, layout.hash);
  layout.hash = hash_number(static_cast<int64_t>(value_format), layout.hash);
  return layout;
}

} // namespace compressed_ddp
