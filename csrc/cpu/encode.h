// Stage 2, encode: the selected entries and the dense segments of one bucket as one payload (wire_format.h). Torch-free.
//
// What rounding loses of a finite value goes back to the residual: residual = fl(residual + fl(value - decoded)) wherever that
// difference is not 0. compensate_select has left 0 there, so that fp32 and bf16 values lose nothing at all.
#pragma once

#include <vector>

#include "../wire_format.h"
#include "elias_fano.h"
#include "float_types.h"

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

// The two halves of encode_selected below: scales of groups [begin, end), then one piece of the entries, which returns its |lost|^2.
void encode_scales(const Layout& layout, const EncodeSelectedArguments& arguments, int64_t begin, int64_t end);
double encode_piece(const Layout& layout, const EncodeSelectedArguments& arguments, int64_t piece);

// Writes the header and clears what lies between the sections. Last, because only now is it known whether anything is non-finite.
void encode_header(const Layout& layout, uint32_t rank, uint32_t world_size, int64_t step, bool non_finite, uint8_t* payload);

// Writes the selected entries into their place in `payload`. parallel_for as in compensate_select.h. Returns the sum of lost^2.
template <typename ParallelFor>
double encode_selected(const Layout& layout, const EncodeSelectedArguments& arguments, ParallelFor&& parallel_for) {
  clear_high_bits(payload_sections(layout), arguments.payload);
  if (layout.value_format == ValueFormat::kSign)
    parallel_for(static_cast<int64_t>(layout.groups.size()),
                 [&](int64_t begin, int64_t end) { encode_scales(layout, arguments, begin, end); });
  std::vector<double> lost_sq(static_cast<size_t>(num_pieces(layout)));
  parallel_for(num_pieces(layout), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) lost_sq[static_cast<size_t>(piece)] = encode_piece(layout, arguments, piece);
  });
  double sum = 0;
  for (const double of_piece : lost_sq) sum += of_piece;
  return sum;
}

} // namespace compressed_ddp
