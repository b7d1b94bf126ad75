// Integer arithmetic. Opcodes that floating point shares (add, mul, min, ...) are told apart by their first type.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "decoder.h"
#include "instructions_float.h"

namespace simt::ptx {
namespace {

template <typename T>
constexpr int kBits = 8 * sizeof(T);
template <typename T>
using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
template <typename T>
using Double = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, int32_t, int64_t>,
                                  std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;

// PTX integers wrap around: all sums and products are formed without sign.
template <typename T>
T add(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
template <typename T>
T subtract(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}
template <typename T>
T multiply_low(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <typename T>
T multiply_high(T a, T b) {
  return static_cast<T>((static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> kBits<T>);
}
template <typename T>
Double<T> multiply_wide(T a, T b) {
  return static_cast<Double<T>>(static_cast<Double<T>>(a) * static_cast<Double<T>>(b));
}
template <typename T>
T multiply_add_low(T a, T b, T c) {
  return add(multiply_low(a, b), c);
}
template <typename T>
T multiply_add_high(T a, T b, T c) {
  return add(multiply_high(a, b), c);
}
template <typename T>
Double<T> multiply_add_wide(T a, T b, Double<T> c) {
  return add(multiply_wide(a, b), c);
}

template <typename T>
T saturate(int64_t value) {
  return static_cast<T>(std::clamp<int64_t>(value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
int32_t add_saturated(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} + b); }
int32_t subtract_saturated(int32_t a, int32_t b) { return saturate<int32_t>(int64_t{a} - b); }
int32_t multiply_add_high_saturated(int32_t a, int32_t b, int32_t c) { return saturate<int32_t>(int64_t{multiply_high(a, b)} + c); }

// The ISA leaves division by zero open; GPUs give all ones, and the dividend as the remainder.
template <typename T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return subtract(T{0}, a);
  return static_cast<T>(a / b);
}
template <typename T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <typename T>
T minimum(T a, T b) {
  return std::min(a, b);
}
template <typename T>
T maximum(T a, T b) {
  return std::max(a, b);
}
int32_t minimum_relu(int32_t a, int32_t b) { return std::max(0, std::min(a, b)); }
int32_t maximum_relu(int32_t a, int32_t b) { return std::max(0, std::max(a, b)); }
template <typename T>
T negate(T a) {
  return subtract(T{0}, a);
}
template <typename T>
T absolute(T a) {
  return a < 0 ? negate(a) : a;
}
template <typename T>
T sum_of_absolute_differences(T a, T b, T c) {
  return add(c, a < b ? subtract(b, a) : subtract(a, b));
}

// ---- with carry: CC.CF is the carry out of the unsigned sum, and for subtractions the borrow.

enum CarryMode : uint8_t { kReadsCarry = 1, kWritesCarry = 2 };

template <typename T>
void execute_add_with_carry(PtxThread& thread, const Instruction& i) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto in = static_cast<unsigned __int128>((i.mode & kReadsCarry) != 0 && thread.carry ? 1 : 0);
  const unsigned __int128 sum = in + thread.read<Unsigned>(i.from[0]) + thread.read<Unsigned>(i.from[1]);
  if ((i.mode & kWritesCarry) != 0) thread.carry = (sum >> kBits<T>) != 0;
  thread.write(i.to[0], static_cast<T>(sum));
}
template <typename T>
void execute_subtract_with_borrow(PtxThread& thread, const Instruction& i) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto in = static_cast<unsigned __int128>((i.mode & kReadsCarry) != 0 && thread.carry ? 1 : 0);
  const unsigned __int128 difference =
      static_cast<unsigned __int128>(thread.read<Unsigned>(i.from[0])) - thread.read<Unsigned>(i.from[1]) - in;
  if ((i.mode & kWritesCarry) != 0) thread.carry = (difference >> kBits<T> & 1) != 0;
  thread.write(i.to[0], static_cast<T>(difference));
}
template <typename T, T (*product_of)(T, T)>
void execute_multiply_add_with_carry(PtxThread& thread, const Instruction& i) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto in = static_cast<unsigned __int128>((i.mode & kReadsCarry) != 0 && thread.carry ? 1 : 0);
  const auto product = static_cast<Unsigned>(product_of(thread.read<T>(i.from[0]), thread.read<T>(i.from[1])));
  const unsigned __int128 sum = in + product + thread.read<Unsigned>(i.from[2]);
  if ((i.mode & kWritesCarry) != 0) thread.carry = (sum >> kBits<T>) != 0;
  thread.write(i.to[0], static_cast<T>(sum));
}

Execute decode_add(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_add(d);
  const bool with_carry = d.take("cc"), saturated = d.take("sat");
  const Type type = saturated ? d.take_type({Type::kS32}) : with_carry ? d.take_type(kIntegers32To64) : d.take_type(kIntegers16To64);
  d.operands(type, 2);
  if (saturated) return with_carry ? nullptr : execute_binary<add_saturated, int32_t, int32_t>;
  d.result.mode = kWritesCarry;
  return with_integer(type, [&](auto zero) -> Execute {
    using T = decltype(zero);
    if (with_carry) return execute_add_with_carry<T>;
    return execute_binary<add<T>, T, T>;
  });
}

Execute decode_subtract(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_subtract(d);
  const bool with_carry = d.take("cc"), saturated = d.take("sat");
  const Type type = saturated ? d.take_type({Type::kS32}) : with_carry ? d.take_type(kIntegers32To64) : d.take_type(kIntegers16To64);
  d.operands(type, 2);
  if (saturated) return with_carry ? nullptr : execute_binary<subtract_saturated, int32_t, int32_t>;
  d.result.mode = kWritesCarry;
  return with_integer(type, [&](auto zero) -> Execute {
    using T = decltype(zero);
    if (with_carry) return execute_subtract_with_borrow<T>;
    return execute_binary<subtract<T>, T, T>;
  });
}

template <bool subtracts>
Execute decode_with_carry_in(Decoder& d) {
  d.result.mode = kReadsCarry | (d.take("cc") ? kWritesCarry : 0);
  const Type type = d.take_type(kIntegers32To64);
  d.operands(type, 2);
  return with_integer(type, [](auto zero) -> Execute {
    return subtracts ? execute_subtract_with_borrow<decltype(zero)> : execute_add_with_carry<decltype(zero)>;
  });
}

enum Part : size_t { kHigh, kLow, kWide };

Execute decode_multiply(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_multiply(d);
  const size_t part = d.require_one_of({"hi", "lo", "wide"});
  if (part == kWide) {
    const Type type = d.take_type({Type::kU16, Type::kU32, Type::kS16, Type::kS32});
    d.destination(bytes_of(type) == 2 ? Type::kB32 : Type::kB64);
    d.source(type);
    d.source(type);
    switch (type) {
      case Type::kU16:
        return execute_binary<multiply_wide<uint16_t>, uint16_t, uint16_t>;
      case Type::kS16:
        return execute_binary<multiply_wide<int16_t>, int16_t, int16_t>;
      case Type::kU32:
        return execute_binary<multiply_wide<uint32_t>, uint32_t, uint32_t>;
      default:
        return execute_binary<multiply_wide<int32_t>, int32_t, int32_t>;
    }
  }
  const Type type = d.take_type(kIntegers16To64);
  d.operands(type, 2);
  return with_integer(type, [&](auto zero) -> Execute {
    using T = decltype(zero);
    if (part == kHigh) return execute_binary<multiply_high<T>, T, T>;
    return execute_binary<multiply_low<T>, T, T>;
  });
}

Execute decode_multiply_add(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_fma(d);
  const bool saturated = d.take("sat"), writes_carry = d.take("cc"), reads_carry = d.opcode() == "madc";
  const size_t part = d.require_one_of({"hi", "lo", "wide"});
  if (part == kWide) {
    if (saturated || writes_carry || reads_carry) return nullptr;
    const Type type = d.take_type({Type::kU16, Type::kU32, Type::kS16, Type::kS32});
    const Type sum = bytes_of(type) == 2 ? Type::kB32 : Type::kB64;
    d.destination(sum);
    d.source(type);
    d.source(type);
    d.source(sum);
    switch (type) {
      case Type::kU16:
        return execute_ternary<multiply_add_wide<uint16_t>, uint16_t, uint16_t, uint32_t>;
      case Type::kS16:
        return execute_ternary<multiply_add_wide<int16_t>, int16_t, int16_t, int32_t>;
      case Type::kU32:
        return execute_ternary<multiply_add_wide<uint32_t>, uint32_t, uint32_t, uint64_t>;
      default:
        return execute_ternary<multiply_add_wide<int32_t>, int32_t, int32_t, int64_t>;
    }
  }
  const bool with_carry = writes_carry || reads_carry;
  const Type type = saturated ? d.take_type({Type::kS32}) : with_carry ? d.take_type(kIntegers32To64) : d.take_type(kIntegers16To64);
  d.operands(type, 3);
  if (saturated)
    return part == kHigh && !with_carry ? execute_ternary<multiply_add_high_saturated, int32_t, int32_t, int32_t> : Execute{nullptr};
  d.result.mode = (reads_carry ? kReadsCarry : 0) | (writes_carry ? kWritesCarry : 0);
  return with_integer(type, [&](auto zero) -> Execute {
    using T = decltype(zero);
    if (with_carry)
      return part == kHigh ? execute_multiply_add_with_carry<T, multiply_high<T>> : execute_multiply_add_with_carry<T, multiply_low<T>>;
    if (part == kHigh) return execute_ternary<multiply_add_high<T>, T, T, T>;
    return execute_ternary<multiply_add_low<T>, T, T, T>;
  });
}

Execute decode_divide(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_divide(d);
  const Type type = d.take_type(kIntegers16To64);
  d.operands(type, 2);
  return with_integer(type, [](auto zero) -> Execute { return execute_binary<divide<decltype(zero)>, decltype(zero), decltype(zero)>; });
}

Execute decode_remainder(Decoder& d) {
  const Type type = d.take_type(kIntegers16To64);
  d.operands(type, 2);
  return with_integer(type, [](auto zero) -> Execute { return execute_binary<remainder<decltype(zero)>, decltype(zero), decltype(zero)>; });
}

template <bool is_maximum>
Execute decode_extremum(Decoder& d) {
  if (names_float_type(d.parsed())) return is_maximum ? decode_float_maximum(d) : decode_float_minimum(d);
  const bool relu = d.take("relu");
  const Type type = relu ? d.take_type({Type::kS32}) : d.take_type(kIntegers16To64);
  d.operands(type, 2);
  if (relu) return execute_binary < is_maximum ? maximum_relu : minimum_relu, int32_t, int32_t > ;
  return with_integer(type, [](auto zero) -> Execute {
    using T = decltype(zero);
    return execute_binary < is_maximum ? maximum<T> : minimum<T>, T, T > ;
  });
}

Execute decode_negate(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_negate(d);
  const Type type = d.take_type(kSigned16To64);
  d.operands(type, 1);
  return with_integer(type, [](auto zero) -> Execute { return execute_unary<negate<decltype(zero)>, decltype(zero)>; });
}

Execute decode_absolute(Decoder& d) {
  if (names_float_type(d.parsed())) return decode_float_absolute(d);
  const Type type = d.take_type(kSigned16To64);
  d.operands(type, 1);
  return with_integer(type, [](auto zero) -> Execute { return execute_unary<absolute<decltype(zero)>, decltype(zero)>; });
}

Execute decode_sad(Decoder& d) {
  const Type type = d.take_type(kIntegers16To64);
  d.operands(type, 3);
  return with_integer(type, [](auto zero) -> Execute {
    using T = decltype(zero);
    return execute_ternary<sum_of_absolute_differences<T>, T, T, T>;
  });
}

// ---- four bytes of a and b, multiplied pairwise

template <typename A, typename B>
int32_t dot_product(uint32_t a, uint32_t b, int32_t c) {
  uint32_t sum = static_cast<uint32_t>(c);
  for (int byte = 0; byte < 4; ++byte)
    sum += static_cast<uint32_t>(static_cast<int32_t>(static_cast<A>(a >> 8 * byte)) * static_cast<int32_t>(static_cast<B>(b >> 8 * byte)));
  return static_cast<int32_t>(sum);
}

Execute decode_dot_product(Decoder& d) {
  const Type a = d.take_type({Type::kU32, Type::kS32}), b = d.take_type({Type::kU32, Type::kS32});
  d.operands(Type::kB32, 3);
  if (a == Type::kU32)
    return b == Type::kU32 ? execute_ternary<dot_product<uint8_t, uint8_t>, uint32_t, uint32_t, int32_t>
                           : execute_ternary<dot_product<uint8_t, int8_t>, uint32_t, uint32_t, int32_t>;
  return b == Type::kU32 ? execute_ternary<dot_product<int8_t, uint8_t>, uint32_t, uint32_t, int32_t>
                         : execute_ternary<dot_product<int8_t, int8_t>, uint32_t, uint32_t, int32_t>;
}

constexpr Opcode kOpcodes[] = {
    {"add", decode_add},
    {"addc", decode_with_carry_in<false>},
    {"sub", decode_subtract},
    {"subc", decode_with_carry_in<true>},
    {"mul", decode_multiply},
    {"mad", decode_multiply_add},
    {"madc", decode_multiply_add},
    {"div", decode_divide},
    {"rem", decode_remainder},
    {"min", decode_extremum<false>},
    {"max", decode_extremum<true>},
    {"neg", decode_negate},
    {"abs", decode_absolute},
    {"sad", decode_sad},
    {"dp4a", decode_dot_product},
};

} // namespace

std::span<const Opcode> integer_opcodes() { return kOpcodes; }

} // namespace simt::ptx
