#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace compressed_ddp::cuda {
namespace {

constexpr int64_t kAlignment = 256;

// Sampled entries of a group: n of them cost 12 bytes each, and leave kMarginSigmas * numel * sqrt(density / n) candidates too many, at
// about 20 bytes each for writing and reading them twice. The sum is least near n = (3.3 * numel * sqrt(density))^(2/3).
constexpr int64_t kMinSampleNumel = 4096;
constexpr int64_t kMaxSampleNumel = 1 << 20;
int64_t sample_numel(int64_t numel, int64_t k) {
  const auto n = static_cast<double>(numel);
  const auto best = static_cast<int64_t>(std::pow(3.3 * n * std::sqrt(static_cast<double>(k) / n), 2.0 / 3));
  return std::clamp(best, kMinSampleNumel, kMaxSampleNumel);
}

// Candidates of a tile: eight times what uniformly spread entries would fill.
constexpr int64_t kSlotFactor = 8;
constexpr int64_t kMinSlotNumel = 64;
constexpr int64_t kMaxSlotNumel = kTileNumel / 2;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Places of parts that lie one after another.
struct Offsets {
  int64_t at = 0;
  int64_t next(int64_t bytes) {
    const int64_t here = at;
    at += aligned(bytes);
    return here;
  }
};

template <typename T>
int64_t bytes_of(const std::vector<T>& table) {
  return static_cast<int64_t>(table.size() * sizeof(T));
}

// Calls function(table) for every table; the order is the order in memory.
template <typename Plan, typename Function>
void for_each_table(Plan& plan, Function&& function) {
  function(plan.tiles);
  function(plan.runs);
  function(plan.large_groups);
  function(plan.small_groups);
  function(plan.dense_tiles);
  function(plan.group_ranges);
  function(plan.segment_offsets);
}

struct Workspace {
  int64_t states, step, look_back, histograms, significands, cleared, tile_states, sums, slot_values, slot_indices, total;
};

Workspace workspace_of(const Plan& plan) {
  Offsets offsets;
  Workspace w{};
  const auto groups = static_cast<int64_t>(plan.large_groups.size());
  const auto tiles = static_cast<int64_t>(plan.tiles.size());
  const auto sums = tiles + static_cast<int64_t>(plan.small_groups.size() + plan.dense_tiles.size());
  w.states = offsets.next(groups * static_cast<int64_t>(sizeof(GroupState)));
  w.step = offsets.next(sizeof(StepState));
  w.look_back = offsets.next(static_cast<int64_t>(plan.runs.size() * sizeof(uint64_t)));
  w.histograms = offsets.next(groups * kGroupHistogramBins * static_cast<int64_t>(sizeof(uint32_t)));
  w.significands = offsets.next(plan.value_format == ValueFormat::kSign ? groups * kExponents * static_cast<int64_t>(sizeof(uint64_t)) : 0);
  w.cleared = offsets.at;
  w.tile_states = offsets.next(tiles * static_cast<int64_t>(sizeof(uint32_t)));
  w.sums = offsets.next(sums * 3 * static_cast<int64_t>(sizeof(float)));
  w.slot_values = offsets.next(plan.slots_numel * static_cast<int64_t>(sizeof(float)));
  w.slot_indices = offsets.next(plan.slots_numel * static_cast<int64_t>(sizeof(uint16_t)));
  w.total = offsets.at;
  return w;
}

} // namespace

Plan::Plan(const Layout& layout)
    : num_segments(static_cast<int64_t>(layout.segments.size())),
      numel(layout.numel),
      selected_numel(layout.selected_numel),
      sections(payload_sections(layout)),
      value_format(layout.value_format) {
  const auto cut = [](const Segment& segment, int32_t index, auto&& append) {
    for (int64_t at = 0; at < segment.numel; at += kTileNumel) {
      Tile tile{};
      tile.offset = static_cast<int32_t>(segment.offset + at);
      tile.segment_offset = static_cast<int32_t>(at);
      tile.numel = static_cast<int32_t>(std::min<int64_t>(kTileNumel, segment.numel - at));
      tile.segment = index;
      append(tile);
    }
  };
  for (int32_t s = 0; s < num_segments; ++s) {
    const Segment& segment = layout.segments[static_cast<size_t>(s)];
    segment_offsets.push_back(segment.offset);
    if (segment.group != kDenseGroup) continue;
    cut(segment, s, [&](Tile tile) {
      tile.slot = static_cast<int32_t>(segment.dense_offset + tile.segment_offset);
      dense_tiles.push_back(tile);
    });
  }
  segment_offsets.push_back(layout.numel);

  for (size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    const Segment& first = layout.segments[static_cast<size_t>(group.first_segment)];
    const Segment& last = layout.segments[static_cast<size_t>(group.last_segment)];
    group_ranges.push_back({group.entry_offset, group.k, first.offset, last.offset + last.numel - 1, 1.0 / static_cast<double>(group.k)});
    if (group.first_segment == group.last_segment && group.numel <= kTileNumel) {
      small_groups.push_back({first.offset, group.entry_offset, static_cast<int32_t>(group.numel), static_cast<int32_t>(group.k),
                              group.first_segment, static_cast<int32_t>(g)});
      continue;
    }
    LargeGroup large{};
    large.k = group.k;
    large.numel = group.numel;
    large.entry_offset = group.entry_offset;
    large.group = static_cast<int32_t>(g);
    const auto first_run = static_cast<int32_t>(runs.size());
    large.slot_numel =
        static_cast<int32_t>(std::clamp(kSlotFactor * kTileNumel * group.k / group.numel / 64 * 64, kMinSlotNumel, kMaxSlotNumel));
    const auto index = static_cast<int32_t>(large_groups.size());
    const auto first_tile = static_cast<int32_t>(tiles.size());
    for (int32_t s = group.first_segment; s <= group.last_segment; ++s) {
      const Segment& segment = layout.segments[static_cast<size_t>(s)];
      if (segment.group != static_cast<int32_t>(g)) continue;
      cut(segment, s, [&](Tile tile) {
        tile.group = index;
        tile.slot = static_cast<int32_t>(slots_numel);
        slots_numel += std::min(large.slot_numel, tile.numel);
        tiles.push_back(tile);
      });
    }
    large.num_tiles = static_cast<int32_t>(tiles.size()) - first_tile;
    const int64_t wanted = sample_numel(group.numel, group.k);
    for (int32_t t = first_tile; t < first_tile + large.num_tiles; ++t) {
      Tile& tile = tiles[static_cast<size_t>(t)];
      tile.sectors = static_cast<int32_t>(std::max<int64_t>(1, wanted * tile.numel / group.numel / kSectorNumel));
      if (t == first_tile || runs.back().num_tiles == kRunTiles) runs.push_back({t, 0, index, t == first_tile ? 1 : 0});
      ++runs.back().num_tiles;
    }
    large.num_runs = static_cast<int32_t>(runs.size()) - first_run;
    large_groups.push_back(large);
  }
}

int64_t Plan::table_bytes() const {
  int64_t bytes = 0;
  for_each_table(*this, [&](const auto& table) { bytes += aligned(bytes_of(table)); });
  return bytes;
}

void Plan::write_tables(uint8_t* out) const {
  for_each_table(*this, [&](const auto& table) {
    if (!table.empty()) std::memcpy(out, table.data(), static_cast<size_t>(bytes_of(table)));
    out += aligned(bytes_of(table));
  });
}

int64_t Plan::workspace_bytes() const { return workspace_of(*this).total; }
int64_t Plan::workspace_cleared_bytes() const { return workspace_of(*this).cleared; }

DevicePlan device_plan(const Plan& plan, const void* tables, void* workspace) {
  DevicePlan device{};
  const auto* at = static_cast<const uint8_t*>(tables);
  const auto take = [&](const auto& table, auto& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += aligned(bytes_of(table));
  };
  take(plan.tiles, device.tiles);
  take(plan.runs, device.runs);
  take(plan.large_groups, device.large_groups);
  take(plan.small_groups, device.small_groups);
  take(plan.dense_tiles, device.dense_tiles);
  take(plan.group_ranges, device.group_ranges);
  take(plan.segment_offsets, device.segment_offsets);
  device.num_tiles = static_cast<int32_t>(plan.tiles.size());
  device.num_runs = static_cast<int32_t>(plan.runs.size());
  device.num_large_groups = static_cast<int32_t>(plan.large_groups.size());
  device.num_small_groups = static_cast<int32_t>(plan.small_groups.size());
  device.num_dense_tiles = static_cast<int32_t>(plan.dense_tiles.size());
  device.num_groups = static_cast<int32_t>(plan.group_ranges.size());
  device.num_segments = static_cast<int32_t>(plan.num_segments);
  device.numel = plan.numel;
  device.selected_numel = plan.selected_numel;
  device.high_words = plan.sections.high_words();
  device.sections = plan.sections;
  device.value_format = plan.value_format;
  device.rounding = plan.value_format == ValueFormat::kFloat32    ? Rounding{0xffffffffu, 0, 0}
                    : plan.value_format == ValueFormat::kBFloat16 ? Rounding{0xffff0000u, 0x7fff, 1}
                                                                  : Rounding{0, 0, 0};
  const Workspace w = workspace_of(plan);
  auto* base = static_cast<uint8_t*>(workspace);
  device.states = reinterpret_cast<GroupState*>(base + w.states);
  device.step = reinterpret_cast<StepState*>(base + w.step);
  device.look_back = reinterpret_cast<uint64_t*>(base + w.look_back);
  device.histograms = reinterpret_cast<uint32_t*>(base + w.histograms);
  device.significands = reinterpret_cast<unsigned long long*>(base + w.significands);
  device.tile_states = reinterpret_cast<uint32_t*>(base + w.tile_states);
  device.sums = reinterpret_cast<float*>(base + w.sums);
  device.slot_values = reinterpret_cast<float*>(base + w.slot_values);
  device.slot_indices = reinterpret_cast<uint16_t*>(base + w.slot_indices);
  return device;
}

} // namespace compressed_ddp::cuda
