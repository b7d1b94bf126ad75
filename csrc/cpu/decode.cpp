#include "decode.h"

namespace compressed_ddp {
namespace {

struct Span { // of a group; the group's dense segments may lie in it
  int64_t first_index, last_index;
};
Span span_of(const Layout& layout, const Group& group) {
  const Segment& last = layout.segments[static_cast<size_t>(group.last_segment)];
  return {layout.segments[static_cast<size_t>(group.first_segment)].offset, last.offset + last.numel - 1};
}

// Asks index_of for entries in ascending order.
template <typename IndexOf>
int64_t first_group_outside(const Layout& layout, IndexOf&& index_of) {
  for (size_t g = 0; g < layout.groups.size(); ++g) {
    const Group& group = layout.groups[g];
    const Span span = span_of(layout, group);
    if (index_of(group.entry_offset) < span.first_index || index_of(group.entry_offset + group.k - 1) > span.last_index)
      return static_cast<int64_t>(g);
  }
  return -1;
}

} // namespace

std::string check_groups(const Layout& layout, const int32_t* indices) {
  const int64_t wrong = first_group_outside(layout, [&](int64_t entry) { return int64_t{indices[entry]}; });
  return wrong < 0 ? std::string{} : describe_wrong_group(layout, wrong);
}

int64_t first_wrong_group(const Layout& layout, const uint8_t* payload) {
  IndexCursor cursor(payload_sections(layout), payload, layout.selected_numel);
  return first_group_outside(layout, [&](int64_t entry) { return cursor.go_to_entry(entry); });
}

std::string describe_wrong_group(const Layout& layout, int64_t group) {
  const Span span = span_of(layout, layout.groups[static_cast<size_t>(group)]);
  return "the indices of group " + std::to_string(group) + " are not in [" + std::to_string(span.first_index) + ", " +
         std::to_string(span.last_index) + "]";
}

void expand_piece(const Layout& layout, const uint8_t* payload, Piece piece, Entries& entries) {
  const PayloadSections sections = payload_sections(layout);
  IndexCursor cursor(sections, payload, layout.selected_numel);
  cursor.go_to_entry(piece.begin);
  cursor.walk(piece.end, std::numeric_limits<int64_t>::max(),
              [&](int64_t entry, int64_t index) { entries.indices[static_cast<size_t>(entry)] = static_cast<int32_t>(index); });
  with_value_reader(layout, sections, payload, [&](auto values) {
    for_each_value(values, piece.begin, piece.end, [&](int64_t entry, float value) { entries.values[static_cast<size_t>(entry)] = value; });
  });
}

} // namespace compressed_ddp
