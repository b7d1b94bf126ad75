#include "return_dropped.h"

#include <algorithm>

namespace compressed_ddp {
namespace {

// Calls function(entry, index, residual) for every entry in a compressed segment.
template <typename Function>
void for_each_residual(const Layout& layout, const Entries& entries, float* const* residuals, Function&& function) {
  size_t s = 0;
  for (int64_t entry = 0; entry < layout.selected_numel; ++entry) {
    const int64_t index = entries.indices[static_cast<size_t>(entry)];
    while (layout.segments[s].offset + layout.segments[s].numel <= index) ++s;
    if (layout.segments[s].group == kDenseGroup) continue;
    function(entry, index, residuals[s][index - layout.segments[s].offset]);
  }
}

} // namespace

double return_dropped(const Layout& layout, const Entries& entries, const void* bucket, GradientType type, float* const* residuals,
                      uint32_t* returned) {
  std::fill_n(returned, (layout.selected_numel + 31) / 32, 0u);
  double returned_sq = 0;
  with_gradient_type(type, [&](auto gradient) {
    const auto* result = static_cast<const decltype(gradient)*>(bucket);
    for_each_residual(layout, entries, residuals, [&](int64_t entry, int64_t index, float& residual) {
      if (to_float(result[index]) != 0) return; // NaN: a bad step, of which everything comes back later
      const float value = entries.values[static_cast<size_t>(entry)];
      residual += value;
      returned_sq += static_cast<double>(value) * value;
      returned[entry / 32] |= 1u << (entry % 32);
    });
  });
  return returned_sq;
}

void add_lost(const Layout& layout, const Entries& entries, const float* lost, float factor, GradientType type, float* const* residuals) {
  for_each_residual(layout, entries, residuals, [&](int64_t entry, int64_t index, float& residual) {
    if (selection_key(entries.values[static_cast<size_t>(entry)]) > largest_zero_key(type)) residual += factor * lost[index];
  });
}

} // namespace compressed_ddp
