// Masks of lanes.
#pragma once

#include <cstdint>

namespace simt {

inline uint32_t lowest_lane(uint32_t lanes) { return static_cast<uint32_t>(__builtin_ctz(lanes)); } // of at least one

} // namespace simt
