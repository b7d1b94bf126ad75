#include "encode.h"

#include <bit>
#include <cstring>

namespace compressed_ddp {
namespace {

template <typename gradient_t>
EncodeStatistics copy_dense(const Layout& layout, const gradient_t* gradient, const uint8_t* unused, float* dense) {
  EncodeStatistics sum;
  for (size_t s = 0; s < layout.segments.size(); ++s) {
    const Segment& segment = layout.segments[s];
    if (segment.group != kDenseGroup) continue;
    float* out = dense + segment.dense_offset;
    if (unused != nullptr && unused[s] != 0) {
      std::memset(out, 0, static_cast<size_t>(segment.numel) * sizeof(float));
      continue;
    }
    const gradient_t* in = gradient + segment.offset;
    double gradient_sq = 0;
    int64_t non_finite = 0;
    for (int64_t i = 0; i < segment.numel; ++i) {
      out[i] = to_float(in[i]);
      // One NaN on the wire: conversions from 16 bits differ in the NaN that they make.
      if (selection_key(out[i]) == kNanKey) [[unlikely]]
        out[i] = std::bit_cast<float>(kCanonicalNanBits);
      gradient_sq += static_cast<double>(out[i]) * out[i];
      non_finite += !is_finite_key(selection_key(out[i]));
    }
    sum.gradient_sq += gradient_sq;
    sum.non_finite += non_finite;
  }
  return sum;
}

} // namespace

EncodeStatistics encode_dense(const Layout& layout, const void* gradient, GradientType type, const uint8_t* unused, uint8_t* payload) {
  float* dense = reinterpret_cast<float*>(payload + dense_offset_bytes(layout));
  switch (type) {
    case GradientType::kFloat32:
      return copy_dense(layout, static_cast<const float*>(gradient), unused, dense);
    case GradientType::kFloat16:
      return copy_dense(layout, static_cast<const Float16*>(gradient), unused, dense);
    default:
      return copy_dense(layout, static_cast<const BFloat16*>(gradient), unused, dense);
  }
}

void encode_selected(const Layout& layout, const float* values, const int32_t* indices, uint8_t* payload) {
  const auto num_bytes = static_cast<size_t>(layout.selected_numel) * 4;
  if (num_bytes == 0) return;
  std::memcpy(payload + indices_offset_bytes(), indices, num_bytes);
  std::memcpy(payload + values_offset_bytes(layout), values, num_bytes);
}

void encode_header(const Layout& layout, uint32_t rank, uint32_t world_size, int64_t step, bool non_finite, uint8_t* payload) {
  const PayloadHeader header = make_header(layout, rank, world_size, step, non_finite);
  std::memcpy(payload, &header, sizeof header);
  const int64_t used_bytes = dense_offset_bytes(layout) + 4 * layout.dense_numel;
  std::memset(payload + used_bytes, 0, static_cast<size_t>(payload_bytes(layout) - used_bytes));
}

} // namespace compressed_ddp
