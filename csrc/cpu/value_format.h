// The values of selected entries in the three formats of wire_format.h. Torch-free.
//
//   fp32   as they are
//   bf16   wire_bfloat16 (float_types.h): 8 bits of significand; acc - decoded is exact, so the residual keeps it all
//   sign   one bit, and one scale per group, the mean magnitude of what the group sends (Seide et al. 2014; Bernstein et al. 2018:
//          the best scale of a sign vector in the square norm); acc - decoded is rounded once
// Every NaN travels as one NaN; of sign values a non-finite bucket travels with scales of zero, so that nothing leaves the residual.
#pragma once

#include <array>
#include <bit>

#include "../wire_format.h"
#include "elias_fano.h"
#include "float_types.h"

namespace compressed_ddp {

// Magnitudes added as whole numbers, one sum per exponent: parts of a group may be added in any order.
using ExponentSums = std::array<uint64_t, 256>;
void add_magnitudes(const float* values, int64_t count, ExponentSums& sums);

// The scale of a group of `count` values: their mean magnitude, Inf and NaN counting as 0. The sums are added in one fixed order
// (docs/wire_format.md): the same bits wherever it is computed.
float sign_scale(const ExponentSums& sums, int64_t count);

// Writes the values of entries [piece.begin, piece.end); what decoding will not give back goes to `lost` [piece.end - piece.begin]:
// fl(value - decoded), 0 for non-finite values; nothing with fp32, which loses nothing. Scales are in the payload already. Pieces may be
// written at the same time. Returns the sum of lost^2. With bf16 values `lost` may be nullptr.
double encode_values(const Layout& layout, const PayloadSections& sections, const float* values, Piece piece, uint8_t* payload,
                     float* lost);

// Reads them back as fp32 into `values` [selected_numel].
void decode_values(const Layout& layout, const PayloadSections& sections, const uint8_t* payload, Piece piece, float* values);

} // namespace compressed_ddp
