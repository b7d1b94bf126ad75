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

// Returns by how much the square has grown.
double add_to(float& residual, float value) {
  const double before = residual;
  residual += value;
  return static_cast<double>(residual) * residual - before * before;
}

} // namespace

double return_dropped(const Layout& layout, const Entries& entries, const void* bucket, GradientType type, float* const* residuals,
                      uint32_t* returned) {
  std::fill_n(returned, (layout.selected_numel + 31) / 32, 0u);
  double grown_sq = 0;
  with_gradient_type(type, [&](auto gradient) {
    const auto* result = static_cast<const decltype(gradient)*>(bucket);
    for_each_residual(layout, entries, residuals, [&](int64_t entry, int64_t index, float& residual) {
      if (to_float(result[index]) != 0) return; // NaN: a bad step, of which everything comes back later
      grown_sq += add_to(residual, entries.values[static_cast<size_t>(entry)]);
      returned[entry / 32] |= 1u << (entry % 32);
    });
  });
  return grown_sq;
}

double add_lost(const Layout& layout, const Entries& entries, const float* lost, float factor, GradientType type, float* const* residuals) {
  double grown_sq = 0;
  for_each_residual(layout, entries, residuals, [&](int64_t entry, int64_t index, float& residual) {
    if (selection_key(entries.values[static_cast<size_t>(entry)]) > largest_zero_key(type))
      grown_sq += add_to(residual, factor * lost[index]);
  });
  return grown_sq;
}

} // namespace compressed_ddp
