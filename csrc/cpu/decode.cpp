#include "decode.h"

namespace compressed_ddp {

std::string check_groups(const Layout& layout, const int32_t* indices) {
  for (int64_t e = kPieceNumel; e < layout.selected_numel; e += kPieceNumel)
    if (indices[e - 1] >= indices[e]) return "its indices do not ascend strictly at entry " + std::to_string(e);
  for (size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    const Segment& last = layout.segments[static_cast<size_t>(group.last_segment)];
    const int64_t first_index = layout.segments[static_cast<size_t>(group.first_segment)].offset;
    const int64_t last_index = last.offset + last.numel - 1;
    if (indices[group.entry_offset] < first_index || indices[group.entry_offset + group.k - 1] > last_index)
      return "the indices of group " + std::to_string(g) + " are not in [" + std::to_string(first_index) + ", " +
             std::to_string(last_index) + "]";
  }
  return {};
}

} // namespace compressed_ddp
