#include "restore.h"

#include "float_types.h"

namespace compressed_ddp {

void restore(const Layout& layout, const uint8_t* payload, const uint8_t* unused, float* const* residuals) {
  const int32_t* indices = payload_indices(layout, payload);
  const float* values = payload_values(layout, payload);
  size_t s = 0;
  for (int64_t entry = 0; entry < layout.selected_numel; ++entry) {
    const int64_t index = indices[entry];
    while (s < layout.segments.size() && layout.segments[s].offset + layout.segments[s].numel <= index) ++s;
    if (s == layout.segments.size()) return;
    const Segment& segment = layout.segments[s];
    if (index < segment.offset || segment.group == kDenseGroup || (unused != nullptr && unused[s] != 0)) continue;
    if (is_finite_key(selection_key(values[entry]))) residuals[s][index - segment.offset] += values[entry];
  }
}

} // namespace compressed_ddp
