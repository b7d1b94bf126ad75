// cvt: between integers, between integers and floating point, and between floating point formats.
//
// NaN becomes the destination's canonical NaN, but for bf16 to f32, which GPUs do by moving 16 bits and which keeps the payload.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "decoder.h"
#include "float_formats.h"

namespace simt::ptx {
namespace {

constexpr FloatFormat kFloat64{52, -1022, 1023, 64};

// What is kept in Instruction::mode.
constexpr uint8_t kRoundingBits = 3, kToIntegral = 4, kFlush = 8, kSaturate = 16, kRelu = 32, kSaturateFinite = 64;

Rounding rounding_of(const Instruction& i) { return static_cast<Rounding>(i.mode & kRoundingBits); }

// ---- between integers

template <typename To, typename From, bool saturate>
To convert_integer(From a) {
  if constexpr (saturate) {
    const auto value = static_cast<__int128>(a);
    return static_cast<To>(std::clamp<__int128>(value, std::numeric_limits<To>::min(), std::numeric_limits<To>::max()));
  } else {
    return static_cast<To>(a);
  }
}

Execute select_integer(Type to, Type from, bool saturate) {
  return with_integer(to, [&](auto to_zero) -> Execute {
    using To = decltype(to_zero);
    return with_integer(from, [&](auto from_zero) -> Execute {
      using From = decltype(from_zero);
      return saturate ? execute_unary<convert_integer<To, From, true>, From> : execute_unary<convert_integer<To, From, false>, From>;
    });
  });
}

// ---- from integers to floating point

template <Type to>
constexpr const FloatFormat& format() {
  if constexpr (to == Type::kF16) return kFloat16;
  if constexpr (to == Type::kBF16) return kBFloat16;
  if constexpr (to == Type::kF32) return kFloat32;
  return kFloat64;
}

template <Type to, typename From>
void execute_from_integer(PtxThread& thread, const Instruction& i) {
  const From value = thread.read<From>(i.from[0]);
  const bool negative = value < From{0};
  const uint64_t magnitude = negative ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  thread.write(i.to[0], rounded(format<to>(), negative, magnitude, 0, false, rounding_of(i)));
}

template <typename To, typename From>
To nearest(From a) {
  return static_cast<To>(a);
}

template <Type to>
Execute select_from_integer(Type from, bool to_nearest) {
  return with_integer(from, [&](auto zero) -> Execute {
    using From = decltype(zero);
    if (to_nearest && to == Type::kF32) return execute_unary<nearest<float, From>, From>;
    if (to_nearest && to == Type::kF64) return execute_unary<nearest<double, From>, From>;
    return execute_from_integer<to, From>;
  });
}

// ---- from floating point

template <Type from>
double input(const PtxThread& thread, const Instruction& i, Slot slot) {
  if constexpr (from == Type::kF64) {
    return thread.read<double>(slot);
  } else if constexpr (from == Type::kF32) {
    const auto value = thread.read<float>(slot);
    const bool flush = (i.mode & kFlush) != 0 && std::fpclassify(value) == FP_SUBNORMAL;
    return static_cast<double>(flush ? std::copysign(0.0f, value) : value);
  } else {
    return value_of(format<from>(), thread.read<uint16_t>(slot));
  }
}

double to_integral(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearestEven:
      return std::nearbyint(value); // the host rounds to nearest even, as nothing here leaves another direction behind
    case Rounding::kTowardZero:
      return std::trunc(value);
    case Rounding::kDown:
      return std::floor(value);
    default:
      return std::ceil(value);
  }
}

// Out of range gives the nearest number in range, with .sat or without. NaN gives 0, but where f64 or 64-bit integers are involved
// the one with only the highest bit set.
template <Type from, typename To>
void execute_to_integer(PtxThread& thread, const Instruction& i) {
  const double value = to_integral(input<from>(thread, i, i.from[0]), rounding_of(i));
  constexpr To kLowest = std::numeric_limits<To>::min(), kHighest = std::numeric_limits<To>::max();
  To result;
  if (std::isnan(value))
    result = from == Type::kF64 || sizeof(To) == 8 ? static_cast<To>(To{1} << (8 * sizeof(To) - 1)) : To{0};
  else if (value <= static_cast<double>(kLowest))
    result = kLowest;
  else if (value >= std::ldexp(1.0, std::numeric_limits<To>::digits)) // kHighest + 1: that a double holds
    result = kHighest;
  else
    result = static_cast<To>(value);
  thread.write(i.to[0], result);
}

template <Type from>
Execute select_to_integer(Type to) {
  return with_integer(to, [](auto zero) -> Execute { return execute_to_integer<from, decltype(zero)>; });
}

uint64_t float_result(const FloatFormat& format, double value, const Instruction& i) {
  const bool to_integral_value = (i.mode & kToIntegral) != 0;
  if (to_integral_value) value = to_integral(value, rounding_of(i));
  uint64_t bits = rounded(format, value, to_integral_value ? Rounding::kNearestEven : rounding_of(i));
  if ((i.mode & kFlush) != 0 && format.total_bits == 32) bits = format.flushed(bits);
  const bool is_nan = format.is_nan(bits), negative = (bits & format.sign()) != 0;
  if ((i.mode & kSaturate) != 0) {
    const uint64_t one = rounded(format, 1.0, Rounding::kNearestEven);
    bits = is_nan || negative ? 0 : std::min(bits, one);
  }
  if ((i.mode & kRelu) != 0 && negative) bits = 0;
  if ((i.mode & kSaturateFinite) != 0 && format.magnitude(bits) == format.infinity()) --bits;
  return bits;
}

template <Type to, Type from>
void execute_between_floats(PtxThread& thread, const Instruction& i) {
  if constexpr (to == Type::kF32 && from == Type::kBF16) {
    if (i.mode == 0) return thread.write(i.to[0], uint32_t{thread.read<uint16_t>(i.from[0])} << 16);
  }
  if constexpr (to == Type::kF64 && from == Type::kF64) {
    if (std::isnan(thread.read<double>(i.from[0]))) return thread.write(i.to[0], std::numeric_limits<double>::quiet_NaN());
  }
  uint64_t bits = float_result(format<to>(), input<from>(thread, i, i.from[0]), i);
  if constexpr (to == Type::kF64)
    if (bits == kFloat64.canonical_nan()) bits = std::bit_cast<uint64_t>(std::numeric_limits<double>::quiet_NaN());
  thread.write(i.to[0], bits);
}

template <Type to>
Execute select_between_floats(Type from) {
  switch (from) {
    case Type::kF16:
      return execute_between_floats<to, Type::kF16>;
    case Type::kBF16:
      return execute_between_floats<to, Type::kBF16>;
    case Type::kF32:
      return execute_between_floats<to, Type::kF32>;
    default:
      return execute_between_floats<to, Type::kF64>;
  }
}

template <Type to>
void execute_pack(PtxThread& thread, const Instruction& i) { // the first source becomes the upper half
  const uint64_t high = float_result(format<to>(), input<Type::kF32>(thread, i, i.from[0]), i);
  const uint64_t low = float_result(format<to>(), input<Type::kF32>(thread, i, i.from[1]), i);
  thread.write(i.to[0], high << 16 | low);
}

// ---- decoding

constexpr std::initializer_list<Type> kAll = {Type::kU8,  Type::kU16, Type::kU32, Type::kU64,  Type::kS8,  Type::kS16,   Type::kS32,
                                              Type::kS64, Type::kF16, Type::kF32, Type::kBF16, Type::kF64, Type::kF16x2, Type::kBF16x2};

Execute decode_pack(Decoder& d, Type to, Type from) {
  if (from != Type::kF32) return nullptr;
  d.destination(Type::kB32);
  d.source(Type::kF32);
  d.source(Type::kF32);
  return to == Type::kF16x2 ? execute_pack<Type::kF16> : execute_pack<Type::kBF16>;
}

template <Type to>
Execute select_to_float(Decoder& d, Type from, std::optional<size_t> rounding) {
  if (is_float(from)) {
    const bool narrows = bytes_of(to) < bytes_of(from) || (bytes_of(to) == 2 && to != from);
    if (narrows && (!rounding || *rounding > 3)) d.fail("a narrowing without a rounding modifier");
    if (!narrows && rounding && *rounding <= 3) return nullptr;
    return select_between_floats<to>(from);
  }
  if (!rounding || *rounding > 3) d.fail("without a rounding modifier");
  if ((d.result.mode & ~kRoundingBits) != 0) return nullptr;
  return select_from_integer<to>(from, *rounding == 0);
}

Execute decode_cvt(Decoder& d) {
  const auto rounding = d.take_one_of({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"});
  const bool flush = d.take("ftz"), saturate = d.take("sat"), relu = d.take("relu"), finite = d.take("satfinite");
  const Type to = d.take_type(kAll), from = d.take_type(kAll);
  if (from == Type::kF16x2 || from == Type::kBF16x2) return nullptr;
  const bool to_half = to == Type::kF16 || to == Type::kBF16 || to == Type::kF16x2 || to == Type::kBF16x2;
  if ((relu || finite) && (!to_half || from != Type::kF32)) return nullptr;
  if (flush && to != Type::kF32 && from != Type::kF32) return nullptr;
  d.result.mode =
      static_cast<uint8_t>((rounding.value_or(0) & kRoundingBits) | (rounding.value_or(0) > 3 ? kToIntegral : 0) | (flush ? kFlush : 0) |
                           (saturate ? kSaturate : 0) | (relu ? kRelu : 0) | (finite ? kSaturateFinite : 0));
  if (to == Type::kF16x2 || to == Type::kBF16x2) {
    if (!rounding || *rounding > 1) return nullptr; // .rn and .rz only
    return decode_pack(d, to, from);
  }
  d.destination(to);
  d.source(from);
  if (is_float(to)) {
    switch (to) {
      case Type::kF16:
        return select_to_float<Type::kF16>(d, from, rounding);
      case Type::kBF16:
        return select_to_float<Type::kBF16>(d, from, rounding);
      case Type::kF32:
        return select_to_float<Type::kF32>(d, from, rounding);
      default:
        return select_to_float<Type::kF64>(d, from, rounding);
    }
  }
  if (!is_float(from)) return rounding || flush ? nullptr : select_integer(to, from, saturate);
  if (!rounding || *rounding <= 3) d.fail("without a rounding modifier to integers");
  switch (from) {
    case Type::kF16:
      return select_to_integer<Type::kF16>(to);
    case Type::kBF16:
      return select_to_integer<Type::kBF16>(to);
    case Type::kF32:
      return select_to_integer<Type::kF32>(to);
    default:
      return select_to_integer<Type::kF64>(to);
  }
}

constexpr Opcode kOpcodes[] = {{"cvt", decode_cvt}};

} // namespace

std::span<const Opcode> convert_opcodes() { return kOpcodes; }

} // namespace simt::ptx
