// A layout as the kernels see it: tables in device memory, and the scratch that one selection needs. Torch-free, CUDA-free.
//
// Groups that fit one block (and one segment) are selected by one block each. The others are cut into tiles of one segment, the
// tiles into runs of up to kRunTiles of one group: the unit of work of a block in all but the filter kernel, whose unit is a tile.
// Dense segments are cut into tiles of their own. All tables are built on the host once per layout and copied once.
#pragma once

#include <cstdint>
#include <vector>

#include "../cpu/float_types.h"
#include "../wire_format.h"

namespace compressed_ddp::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kItems = 16; // entries per thread of a tile: the filter holds them in 64 registers, four blocks per multiprocessor
inline constexpr int kTileNumel = kThreads * kItems;
inline constexpr int kRunTiles = kWarps;         // refine and emit give a warp to each tile
inline constexpr int kHistogramBins = 2048;      // of the histogram pass and of the filter: 8 per thread
inline constexpr int kGroupHistogramBins = 8192; // in memory, per group: guess and refine need more
inline constexpr int kExponents = 256;
inline constexpr int kSectorNumel = 8; // 32 bytes of fp32, what the memory moves at least

// Positions fit 32 bits, as indices on the wire do; small tables are what every warp of every tile reads.
struct Tile {             // at most kTileNumel entries of one segment
  int32_t offset;         // in the bucket
  int32_t segment_offset; // in its segment
  int32_t slot;           // compressed tiles: where its candidates lie; dense tiles: where it begins among the payload's dense entries
  int32_t numel;
  int32_t segment;
  int32_t group;   // index into the large groups
  int32_t sectors; // that the guess samples
};

struct Run { // of tiles
  int32_t first_tile;
  int32_t num_tiles;
  int32_t group;
  int32_t first_of_group; // 1: its entries are the first of the group
};

struct LargeGroup {
  int64_t k;
  int64_t numel;
  int64_t entry_offset;
  int32_t num_tiles;
  int32_t num_runs;
  int32_t slot_numel; // candidates per tile
  int32_t group;      // of the layout: its scale
};

struct SmallGroup {
  int64_t offset; // in the bucket
  int64_t entry_offset;
  int32_t numel;
  int32_t k;
  int32_t segment;
  int32_t group; // of the layout: its scale
};

struct GroupRange { // what the decoder checks of every rank's entries of a group
  int64_t entry_offset;
  int64_t k;
  int64_t first_index;
  int64_t last_index;
  double inverse_k; // a mean is the sum times this
};

// What a value is rounded to before it travels, so that sending a finite one leaves value - rounded in the residual: bf16 to nearest even;
// fp32 not at all; sign to 0, because there the scale, known only later, is taken out by a pass of its own.
struct Rounding {
  uint32_t mask; // of the bits that stay
  uint32_t half; // added before, and
  uint32_t tie;  // 1: one more if the last bit that stays is set
};

// What is known of a large group so far. Zero at the start of a step; the emit kernel leaves it so.
struct GroupState {
  uint32_t low;       // candidates are keys >= low
  uint32_t mid;       // the filter has taken keys >= mid out of the residual (a guess of the threshold; never wrong, only costly)
  uint32_t high;      // keys >= high are selected for sure
  uint32_t shift;     // bins of the filter's histogram are 2^shift keys wide
  uint32_t above;     // candidates with keys >= high
  uint32_t base;      // refine: the k-th key lies in [base, base + 2^shift)
  uint32_t remaining; // entries to take from there
  uint32_t threshold; // key of the k-th entry; 0: fewer than k entries are non-zero, and zeros must travel
  int32_t ties;       // entries with that key to take, lowest index first
  uint32_t again;     // the histogram pass (set by the filter) or the second filter (set by the histogram pass) must run
  uint32_t sampled;
  uint32_t ticket;
};

// Of one launch sequence; cleared like GroupState.
struct StepState {
  uint32_t non_finite; // some acc or dense entry of this rank is Inf or NaN
  uint32_t next_run;   // emit: order in which blocks take runs
  uint32_t finished;   // emit: blocks that are done
};

struct Plan {
  explicit Plan(const Layout& layout);

  // Tables
  std::vector<Tile> tiles; // of large groups, in bucket order
  std::vector<Run> runs;
  std::vector<LargeGroup> large_groups;
  std::vector<SmallGroup> small_groups;
  std::vector<Tile> dense_tiles;
  std::vector<GroupRange> group_ranges;
  std::vector<int64_t> segment_offsets; // of every segment, and the bucket's numel behind them

  int64_t num_segments = 0, numel = 0, selected_numel = 0;
  PayloadSections sections;
  ValueFormat value_format;
  int64_t slots_numel = 0; // candidates of all tiles

  int64_t table_bytes() const;
  // Writes table_bytes() bytes; the same offsets hold for the copy in device memory.
  void write_tables(uint8_t* out) const;
  int64_t workspace_bytes() const;         // scratch of one selection
  int64_t workspace_cleared_bytes() const; // of it, from the start: zero before the first selection, and left zero by every one
};

// Pointers into the tables and the workspace, as kernels get them.
struct DevicePlan {
  const Tile* tiles;
  const Run* runs;
  const LargeGroup* large_groups;
  const SmallGroup* small_groups;
  const Tile* dense_tiles;
  const GroupRange* group_ranges;
  const int64_t* segment_offsets;
  int32_t num_tiles, num_runs, num_large_groups, num_small_groups, num_dense_tiles, num_groups, num_segments;
  int64_t numel, selected_numel, high_words;
  PayloadSections sections;
  ValueFormat value_format;
  Rounding rounding;
  // workspace
  GroupState* states;
  StepState* step;
  uint64_t* look_back;              // per run
  uint32_t* histograms;             // [large groups][kGroupHistogramBins]
  unsigned long long* significands; // [large groups][kExponents], value format sign only: sums of what is selected (encode.cuh)
  uint32_t* tile_states;            // per tile: TileState
  float* sums;                      // [num_sums][3]: gradient^2, acc^2, sent^2 of a tile, a small group or a dense tile
  float* slot_values;
  uint16_t* slot_indices; // in the tile
};
DevicePlan device_plan(const Plan& plan, const void* tables, void* workspace);

} // namespace compressed_ddp::cuda
