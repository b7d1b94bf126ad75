// Moves chosen lanes of a 256-bit vector to the front, in order: AVX2 has no compress instruction. For files built with AVX2 only.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>

namespace compressed_ddp {
namespace {

constexpr int kLanes = 8;

// kPack[mask] holds the permutation for the lanes whose bit is set in mask.
constexpr std::array<std::array<int32_t, kLanes>, 256> make_pack() {
  std::array<std::array<int32_t, kLanes>, 256> pack{};
  for (int mask = 0; mask < 256; ++mask) {
    int front = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) pack[static_cast<size_t>(mask)][static_cast<size_t>(front++)] = lane;
  }
  return pack;
}
alignas(64) constexpr auto kPack = make_pack();

inline __m256i pack_lanes(unsigned mask) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(kPack[mask].data())); }

} // namespace
} // namespace compressed_ddp
