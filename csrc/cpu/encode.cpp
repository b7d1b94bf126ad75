#include "encode.h"

#include <algorithm>
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
  float* dense = reinterpret_cast<float*>(payload + payload_sections(layout).dense);
  return with_gradient_type(
      type, [&](auto of_type) { return copy_dense(layout, static_cast<const decltype(of_type)*>(gradient), unused, dense); });
}

void encode_scale(const Layout& layout, const EncodeSelectedArguments& a, int64_t g, const ExponentSums& sums) {
  auto* scales = reinterpret_cast<float*>(a.payload + payload_sections(layout).scales);
  scales[g] = a.non_finite ? 0.0f : sign_scale(sums, layout.groups[static_cast<size_t>(g)].k);
}

double encode_piece(const Layout& layout, const EncodeSelectedArguments& a, int64_t index) {
  const PayloadSections sections = payload_sections(layout);
  const Piece piece = piece_of(layout, index);
  encode_indices(sections, a.indices, piece, a.payload);
  alignas(64) float lost[kPieceNumel];
  const bool is_wanted = a.residuals != nullptr || layout.value_format == ValueFormat::kSign;
  const double lost_sq = encode_values(layout, sections, a.values, piece, a.payload, is_wanted ? lost : nullptr);
  if (a.residuals == nullptr || layout.value_format == ValueFormat::kFloat32) return lost_sq;
  auto segment = std::upper_bound(layout.segments.begin(), layout.segments.end(), int64_t{a.indices[piece.begin]},
                                  [](int64_t i, const Segment& s) { return i < s.offset; }) -
                 1; // of segments that begin there, the last: those before are empty
  for (int64_t e = piece.begin; e < piece.end; ++segment) {
    float* residual = a.residuals[segment - layout.segments.begin()];
    const int64_t end = segment->offset + segment->numel;
    for (; e < piece.end && a.indices[e] < end; ++e)
      if (lost[e - piece.begin] != 0) residual[a.indices[e] - segment->offset] += lost[e - piece.begin];
  }
  return lost_sq;
}

void encode_header(const Layout& layout, int64_t rank, int64_t step, bool non_finite, uint8_t* payload) {
  const PayloadHeader header = make_header(layout, rank, step, non_finite);
  std::memcpy(payload, &header, sizeof header);
  const PayloadSections sections = payload_sections(layout);
  std::fill(payload + sections.used_bytes, payload + sections.payload_bytes, uint8_t{0});
}

} // namespace compressed_ddp
