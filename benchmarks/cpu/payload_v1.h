// Payload version 1 as it was: int32 indices and fp32 values as plain lists, 8 bytes an entry. For bench_payload_cost alone, which asks
// what version 3 costs beside it; float32 buckets only.
//
//   offset                          bytes                 field
//   0                               64                    header
//   64                              4 * selected_numel    indices   int32, positions in the bucket, strictly ascending
//   64 + 4 * selected_numel         4 * selected_numel    values    fp32, in the order of the indices
//   64 + 8 * selected_numel         4 * dense_numel       dense     fp32, the dense segments in bucket order
#pragma once

#include "wire_format.h"

namespace compressed_ddp::v1 {

int64_t num_payload_bytes(const Layout& layout);

// compensate_select writes its entries straight there: encoding them is no work.
struct PayloadEntries {
  int32_t* indices;
  float* values;
};
PayloadEntries payload_entries(const Layout& layout, uint8_t* payload);

void encode_header(const Layout& layout, int64_t rank, int64_t step, bool non_finite, uint8_t* payload);

// Headers, and that the indices of every group ascend strictly inside its span. True when they do.
bool check_gathered(const Layout& layout, const uint8_t* gathered, int64_t world_size, int64_t step);

// The sums of checked payloads, tile by tile, into `bucket` [numel]. Returns whether every result is finite.
bool decode_apply(const Layout& layout, const uint8_t* gathered, int64_t world_size, float* bucket);

} // namespace compressed_ddp::v1
