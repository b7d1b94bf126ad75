#include "restore.h"

#include "float_types.h"

namespace compressed_ddp {

void restore(const Layout& layout, const Entries& entries, float* const* residuals, const uint32_t* returned) {
  size_t s = 0;
  for (size_t entry = 0; entry < static_cast<size_t>(layout.selected_numel); ++entry) {
    const int64_t index = entries.indices[entry];
    const float value = entries.values[entry];
    while (layout.segments[s].offset + layout.segments[s].numel <= index) ++s;
    const Segment& segment = layout.segments[s];
    if (returned != nullptr && (returned[entry / 32] >> (entry % 32) & 1u) != 0) continue;
    if (segment.group == kDenseGroup || value == 0 || !is_finite_key(selection_key(value))) continue;
    residuals[s][index - segment.offset] += value;
  }
}

} // namespace compressed_ddp
