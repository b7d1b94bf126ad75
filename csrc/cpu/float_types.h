// The three gradient types as plain memory, and the key that orders entries by magnitude. Torch-free.
#pragma once

#include <bit>
#include <cstdint>

namespace compressed_ddp {

enum class GradientType : uint8_t { kFloat32, kFloat16, kBFloat16 };

inline constexpr int64_t element_bytes(GradientType type) { return type == GradientType::kFloat32 ? 4 : 2; }

// Distinct C++ types for the two 16-bit formats, so that templates choose the conversion.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls function with a value of the gradient's C++ type; decltype of its argument chooses a template.
template <typename Function>
auto with_gradient_type(GradientType type, Function&& function) {
  switch (type) {
    case GradientType::kFloat32:
      return function(float{});
    case GradientType::kFloat16:
      return function(Float16{});
    default:
      return function(BFloat16{});
  }
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Without branches, by masks, so that a loop of these becomes vector instructions: the cases differ in integers that are added, and in
// what is subtracted, which is 0 from all but the smallest.
inline float to_float(Float16 x) {
  const auto all_ones_if = [](bool condition) { return 0u - static_cast<uint32_t>(condition); };
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t small = all_ones_if(magnitude < 0x400u); // zero and denormals: the mantissa behind 2^-14, and that taken away; exact
  const float shifted = std::bit_cast<float>((magnitude << 13) + 0x38000000u + (small & 0x800000u));
  const float value = shifted - std::bit_cast<float>(small & 0x38800000u);
  const uint32_t special = all_ones_if(magnitude >= 0x7c00u) & 0x38000000u; // Inf, NaN: the largest exponent here as well
  const uint32_t quiet = all_ones_if(magnitude > 0x7c00u) & 0x400000u; // a signalling NaN becomes quiet, as the hardware conversion does
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + special) | quiet | sign);
}

// Round to nearest, ties to even; overflow becomes Inf, NaN stays a (quiet) NaN.
inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void from_float(float value, Float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  } else if (magnitude >= 0x477ff000u) { // 65520: the first fp32 that rounds beyond 65504
    out.bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {                           // below 2^-14: the fp32 adder does the rounding to a multiple of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f; // ulp(0.5) = 2^-24
    out.bits = static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
  } else {
    out.bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
  }
}

// Order of magnitudes as integers: NaN > Inf > finite, +0 == -0, all NaN equal. (architecture.md, contract 1)
inline constexpr uint32_t kInfinityKey = 0x7f800000u;
inline constexpr uint32_t kNanKey = 0x7fffffffu;
inline constexpr uint32_t kCanonicalNanBits = 0x7fc00000u; // how every NaN is written to a payload

inline uint32_t selection_key(float value) {
  const uint32_t magnitude = std::bit_cast<uint32_t>(value) & 0x7fffffffu;
  return magnitude > kInfinityKey ? kNanKey : magnitude;
}
inline bool is_finite_key(uint32_t key) { return key < kInfinityKey; }

// The key of the largest magnitude that rounds to 0 in a type: half of its smallest number, which is a tie.
inline constexpr uint32_t largest_zero_key(GradientType type) {
  return type == GradientType::kFloat32 ? 0u : type == GradientType::kFloat16 ? 0x33000000u : 0x00008000u; // 0, 2^-25, 2^-134
}

// A value as bf16 on the wire: to nearest, ties to even, but never from finite to Inf; every NaN as 0x7fc0. The difference to a finite
// value is exact in fp32.
inline uint16_t wire_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  rounded -= static_cast<uint32_t>(magnitude < kInfinityKey) & static_cast<uint32_t>((rounded & 0x7fffu) == 0x7f80u);
  return static_cast<uint16_t>(magnitude > kInfinityKey ? kCanonicalNanBits >> 16 : rounded);
}

} // namespace compressed_ddp
