// Stage 2, encode: the selected entries and the dense segments of one bucket as one payload (wire_format.h). Torch-free.
//
// What rounding loses of a finite value goes back to the residual: residual = fl(residual + fl(value - decoded)) wherever that
// difference is not 0. compensate_select has left 0 there, so that fp32 and bf16 values lose nothing at all.
#pragma once

#include <algorithm>
#include <array>

#include "../wire_format.h"
#include "elias_fano.h"
#include "float_types.h"
#include "value_format.h"

namespace compressed_ddp {

struct EncodeStatistics { // over the dense segments
  double gradient_sq = 0;
  int64_t non_finite = 0;
};

// Writes the dense segments of `gradient` [numel] as fp32 into their place in `payload`; `unused` as in CompensateSelectArguments
// (such a segment travels as zeros).
EncodeStatistics encode_dense(const Layout& layout, const void* gradient, GradientType type, const uint8_t* unused, uint8_t* payload);

struct EncodeSelectedArguments {
  const float* values;     // [selected_numel], from compensate_select
  const int32_t* indices;  // same
  float* const* residuals; // as in CompensateSelectArguments; nullptr: what rounding loses is lost, or compensate_select has kept it
  bool non_finite;         // of compensate_select or encode_dense: the flag that encode_header will set
  uint8_t* payload;
};

// The parts of encode_selected below: the scale of one group from the sum of its magnitudes, and one piece of the entries, which returns
// its |lost|^2.
void encode_scale(const Layout& layout, const EncodeSelectedArguments& arguments, int64_t group, const ExponentSums& sums);
double encode_piece(const Layout& layout, const EncodeSelectedArguments& arguments, int64_t piece);

// Writes the header and clears what lies behind the sections. Last, because only now is it known whether anything is non-finite.
void encode_header(const Layout& layout, int64_t rank, int64_t step, bool non_finite, uint8_t* payload);

// The scales of sign values. A group that is larger than a piece is added up in parts: scope "bucket" has one group only.
template <typename ParallelFor>
void encode_scales(const Layout& layout, const EncodeSelectedArguments& arguments, ParallelFor&& parallel_for) {
  constexpr int64_t kParts = 16; // of 2 KiB each
  parallel_for(static_cast<int64_t>(layout.groups.size()), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Group& group = layout.groups[static_cast<size_t>(g)];
      if (group.k > kPieceNumel) continue;
      ExponentSums sums{};
      best_encode().add_magnitudes(arguments.values + group.entry_offset, group.k, sums);
      encode_scale(layout, arguments, g, sums);
    }
  });
  for (size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    if (group.k <= kPieceNumel) continue;
    std::array<ExponentSums, kParts> parts{};
    parallel_for(kParts, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t from = group.k * p / kParts, to = group.k * (p + 1) / kParts;
        best_encode().add_magnitudes(arguments.values + group.entry_offset + from, to - from, parts[static_cast<size_t>(p)]);
      }
    });
    for (size_t p = 1; p < parts.size(); ++p)
      for (size_t e = 0; e < parts[p].size(); ++e) parts[0][e] += parts[p][e];
    encode_scale(layout, arguments, static_cast<int64_t>(g), parts[0]);
  }
}

// Writes the selected entries into their place in `payload`. parallel_for as in compensate_select.h. Returns the sum of lost^2. Allocates
// nothing: selection has taken the entries out of the residual, and an exception here would lose them.
template <typename ParallelFor>
double encode_selected(const Layout& layout, const EncodeSelectedArguments& arguments, ParallelFor&& parallel_for) {
  clear_high_bits(payload_sections(layout), arguments.payload);
  if (layout.value_format == ValueFormat::kSign) encode_scales(layout, arguments, parallel_for);
  // Runs of pieces have a sum each, so that the result does not depend on the number of threads.
  constexpr int64_t kRuns = 256;
  std::array<double, kRuns> lost_sq{};
  const int64_t pieces = num_pieces(layout), runs = std::min(kRuns, pieces);
  parallel_for(runs, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run)
      for (int64_t piece = pieces * run / runs; piece < pieces * (run + 1) / runs; ++piece)
        lost_sq[static_cast<size_t>(run)] += encode_piece(layout, arguments, piece);
  });
  double sum = 0;
  for (const double of_run : lost_sq) sum += of_run;
  return sum;
}

} // namespace compressed_ddp
