// Stage 2, encode: the selected entries and the dense segments of one bucket as one payload (wire_format.h). Torch-free.
#pragma once

#include "../wire_format.h"
#include "float_types.h"

namespace compressed_ddp {

struct EncodeStatistics { // over the dense segments
  double gradient_sq = 0;
  int64_t non_finite = 0;
};

// Writes the dense segments of `gradient` [numel] as fp32 into their place in `payload`; `unused` as in CompensateSelectArguments
// (such a segment travels as zeros).
EncodeStatistics encode_dense(const Layout& layout, const void* gradient, GradientType type, const uint8_t* unused, uint8_t* payload);

// Writes values and indices [selected_numel] into their place in `payload`. compensate_select can write there directly
// (payload_entries below); then this call is not needed.
void encode_selected(const Layout& layout, const float* values, const int32_t* indices, uint8_t* payload);

// Writes the header and clears the padding. Last, because only now is it known whether anything is non-finite.
void encode_header(const Layout& layout, uint32_t rank, uint32_t world_size, int64_t step, bool non_finite, uint8_t* payload);

struct PayloadEntries {
  int32_t* indices;
  float* values;
};
inline PayloadEntries payload_entries(const Layout& layout, uint8_t* payload) {
  return {reinterpret_cast<int32_t*>(payload + indices_offset_bytes()), reinterpret_cast<float*>(payload + values_offset_bytes(layout))};
}

} // namespace compressed_ddp
