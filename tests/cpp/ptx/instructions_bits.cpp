// Logic, shifts, bit fields and permutations.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "decoder.h"

namespace simt::ptx {
namespace {

template <typename T>
constexpr uint32_t kBits = 8 * sizeof(T);

template <typename T>
T bitwise_and(T a, T b) {
  return a & b;
}
template <typename T>
T bitwise_or(T a, T b) {
  return a | b;
}
template <typename T>
T bitwise_xor(T a, T b) {
  return a ^ b;
}
template <typename T>
T bitwise_not(T a) {
  return static_cast<T>(~a);
}
template <typename T>
T logical_not(T a) {
  return a == 0 ? 1 : 0;
}

// Amounts beyond the width shift everything out.
template <typename T>
T shift_left(T a, uint32_t amount) {
  return amount >= kBits<T> ? T{0} : static_cast<T>(static_cast<uint64_t>(a) << amount);
}
template <typename T>
T shift_right(T a, uint32_t amount) {
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(a >> std::min(amount, kBits<T> - 1));
  else
    return amount >= kBits<T> ? T{0} : static_cast<T>(a >> amount);
}
uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t amount, bool left) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return left ? static_cast<uint32_t>((both << amount) >> 32) : static_cast<uint32_t>(both >> amount);
}
template <bool left>
uint32_t funnel_shift_wrap(uint32_t low, uint32_t high, uint32_t amount) {
  return funnel_shift(low, high, amount & 31, left);
}
template <bool left>
uint32_t funnel_shift_clamp(uint32_t low, uint32_t high, uint32_t amount) {
  return funnel_shift(low, high, std::min(amount, 32u), left);
}

template <typename T>
uint32_t population(T a) {
  return static_cast<uint32_t>(std::popcount(a));
}
template <typename T>
uint32_t leading_zeros(T a) {
  return static_cast<uint32_t>(std::countl_zero(a));
}
template <typename T>
T reversed(T a) {
  T result = 0;
  for (uint32_t bit = 0; bit < kBits<T>; ++bit) result |= static_cast<T>((a >> bit & 1) << (kBits<T> - 1 - bit));
  return result;
}

// The position of the most significant bit that is not a sign bit; all ones if there is none.
template <typename T>
uint32_t find_leading(T a) {
  auto bits = static_cast<std::make_unsigned_t<T>>(a);
  if (std::is_signed_v<T> && a < T{0}) bits = static_cast<std::make_unsigned_t<T>>(~bits);
  return bits == 0 ? ~0u : kBits<T> - 1 - static_cast<uint32_t>(std::countl_zero(bits));
}
template <typename T>
uint32_t find_leading_shift(T a) {
  const uint32_t position = find_leading(a);
  return position == ~0u ? ~0u : kBits<T> - 1 - position;
}

// Position and length count modulo 256; what lies beyond the value is its sign, 0 without one.
template <typename T>
T extract_field(T a, uint32_t position, uint32_t length) {
  position &= 0xff;
  length &= 0xff;
  if (length == 0) return 0;
  const uint32_t last = std::min(position + length - 1, kBits<T> - 1);
  const bool fill = std::is_signed_v<T> && (a >> last & 1) != 0;
  if (position >= kBits<T>) return fill ? static_cast<T>(-1) : T{0};
  const uint32_t taken = last - position + 1;
  const auto ones = static_cast<uint64_t>(-1);
  const uint64_t mask = taken == 64 ? ones : (uint64_t{1} << taken) - 1;
  const uint64_t field = (static_cast<uint64_t>(a) >> position) & mask;
  return static_cast<T>(fill ? field | ~mask : field);
}

template <typename T>
void execute_insert_field(PtxThread& thread, const Instruction& i) {
  const T field = thread.read<T>(i.from[0]), into = thread.read<T>(i.from[1]);
  const uint32_t position = thread.read<uint32_t>(i.from[2]) & 0xff, length = thread.read<uint32_t>(i.from[3]) & 0xff;
  T mask = length >= kBits<T> ? static_cast<T>(-1) : static_cast<T>((T{1} << length) - 1);
  mask = position >= kBits<T> ? T{0} : static_cast<T>(mask << position);
  const T moved = position >= kBits<T> ? T{0} : static_cast<T>(field << position);
  thread.write(i.to[0], static_cast<T>((into & ~mask) | (moved & mask)));
}

template <bool clamp>
uint32_t make_mask(uint32_t position, uint32_t length) {
  if (clamp && position >= 32) return 0;
  const uint32_t from = position & 31, count = length & 31;
  const uint32_t start = ~0u << from;
  const bool to_the_end = from + count >= 32 || (clamp && length >= 32);
  return to_the_end ? start : start & ~(~0u << (from + count));
}

// ---- byte permutations

uint32_t byte_of(uint64_t both, uint32_t selector) {
  const auto byte = static_cast<uint32_t>(both >> 8 * (selector & 7)) & 0xff;
  if ((selector & 8) == 0) return byte;
  return (byte & 0x80) != 0 ? 0xff : 0; // the sign of the byte, eight times
}
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (uint32_t n = 0; n < 4; ++n) result |= byte_of(both, selector >> 4 * n & 0xf) << 8 * n;
  return result;
}
// The special modes look at two bits of the selector; each names four bytes by its digits, the lowest byte rightmost.
enum PermuteMode : size_t { kForward4, kBackward4, kReplicate8, kEdgeLeft, kEdgeRight, kReplicate16 };
constexpr uint32_t kSelectors[][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123}, {0x0000, 0x1111, 0x2222, 0x3333},
    {0x3210, 0x3211, 0x3222, 0x3333}, {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232},
};
void execute_permute_by_mode(PtxThread& thread, const Instruction& i) {
  const uint32_t selector = kSelectors[i.mode][thread.read<uint32_t>(i.from[2]) & 3];
  thread.write(i.to[0], permute(thread.read<uint32_t>(i.from[0]), thread.read<uint32_t>(i.from[1]), selector));
}

Execute decode_permute(Decoder& d) {
  d.require("b32");
  const auto mode = d.take_one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  d.operands(Type::kB32, 3);
  if (!mode) return execute_ternary<permute, uint32_t, uint32_t, uint32_t>;
  d.result.mode = static_cast<uint8_t>(*mode);
  return execute_permute_by_mode;
}

// ---- any function of three bits: bit 4a + 2b + c of the table is its value

uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (uint32_t row = 0; row < 8; ++row) {
    const uint32_t here = ((row & 4) != 0 ? a : ~a) & ((row & 2) != 0 ? b : ~b) & ((row & 1) != 0 ? c : ~c);
    result |= here & (0u - (table >> row & 1));
  }
  return result;
}
void execute_lop3(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0],
               look_up(thread.read<uint32_t>(i.from[0]), thread.read<uint32_t>(i.from[1]), thread.read<uint32_t>(i.from[2]), i.mode));
}
template <bool is_and>
void execute_lop3_with_predicate(PtxThread& thread, const Instruction& i) {
  const uint32_t result =
      look_up(thread.read<uint32_t>(i.from[0]), thread.read<uint32_t>(i.from[1]), thread.read<uint32_t>(i.from[2]), i.mode);
  const bool q = thread.predicate(i.from[3]) != i.negated_predicate;
  thread.write(i.to[0], result);
  thread.write(i.to[1], is_and ? result != 0 && q : result != 0 || q);
}

Execute decode_lop3(Decoder& d) {
  const auto combine = d.take_one_of({"or", "and"});
  d.require("b32");
  if (combine)
    d.optional_predicate_destination(Type::kB32);
  else
    d.destination(Type::kB32);
  for (int n = 0; n < 3; ++n) d.source(Type::kB32);
  d.result.mode = static_cast<uint8_t>(d.immediate());
  if (!combine) return execute_lop3;
  d.predicate_source();
  return *combine == 1 ? execute_lop3_with_predicate<true> : execute_lop3_with_predicate<false>;
}

// ---- decoding of the rest

#define DECODE_LOGIC(function_name, operation)                                                                                           \
  Execute function_name(Decoder& d) {                                                                                                    \
    const Type type = d.take_type({Type::kPredicate, Type::kB16, Type::kB32, Type::kB64});                                               \
    d.operands(type, 2);                                                                                                                 \
    if (type == Type::kPredicate) return execute_binary<operation<uint8_t>, uint8_t, uint8_t>;                                           \
    return with_integer(type,                                                                                                            \
                        [](auto zero) -> Execute { return execute_binary<operation<decltype(zero)>, decltype(zero), decltype(zero)>; }); \
  }
DECODE_LOGIC(decode_and, bitwise_and)
DECODE_LOGIC(decode_or, bitwise_or)
DECODE_LOGIC(decode_xor, bitwise_xor)
#undef DECODE_LOGIC

Execute decode_not(Decoder& d) {
  const Type type = d.take_type({Type::kPredicate, Type::kB16, Type::kB32, Type::kB64});
  d.operands(type, 1);
  if (type == Type::kPredicate) return execute_unary<logical_not<uint8_t>, uint8_t>;
  return with_integer(type, [](auto zero) -> Execute { return execute_unary<bitwise_not<decltype(zero)>, decltype(zero)>; });
}

Execute decode_cnot(Decoder& d) {
  const Type type = d.take_type(kBits16To64);
  d.operands(type, 1);
  return with_integer(type, [](auto zero) -> Execute { return execute_unary<logical_not<decltype(zero)>, decltype(zero)>; });
}

Execute decode_shift_left(Decoder& d) {
  const Type type = d.take_type(kBits16To64);
  d.operands(type, 1);
  d.source(Type::kU32);
  return with_integer(type, [](auto zero) -> Execute { return execute_binary<shift_left<decltype(zero)>, decltype(zero), uint32_t>; });
}

Execute decode_shift_right(Decoder& d) {
  const Type type =
      d.take_type({Type::kB16, Type::kB32, Type::kB64, Type::kU16, Type::kU32, Type::kU64, Type::kS16, Type::kS32, Type::kS64});
  d.operands(type, 1);
  d.source(Type::kU32);
  return with_integer(type, [](auto zero) -> Execute { return execute_binary<shift_right<decltype(zero)>, decltype(zero), uint32_t>; });
}

Execute decode_funnel_shift(Decoder& d) {
  const bool left = d.require_one_of({"l", "r"}) == 0, clamp = d.require_one_of({"wrap", "clamp"}) == 1;
  d.require("b32");
  d.operands(Type::kB32, 3);
  if (left)
    return clamp ? execute_ternary<funnel_shift_clamp<true>, uint32_t, uint32_t, uint32_t>
                 : execute_ternary<funnel_shift_wrap<true>, uint32_t, uint32_t, uint32_t>;
  return clamp ? execute_ternary<funnel_shift_clamp<false>, uint32_t, uint32_t, uint32_t>
               : execute_ternary<funnel_shift_wrap<false>, uint32_t, uint32_t, uint32_t>;
}

Execute decode_population(Decoder& d) {
  const Type type = d.take_type(kBits32To64);
  d.destination(Type::kU32);
  d.source(type);
  return type == Type::kB32 ? execute_unary<population<uint32_t>, uint32_t> : execute_unary<population<uint64_t>, uint64_t>;
}

Execute decode_leading_zeros(Decoder& d) {
  const Type type = d.take_type(kBits32To64);
  d.destination(Type::kU32);
  d.source(type);
  return type == Type::kB32 ? execute_unary<leading_zeros<uint32_t>, uint32_t> : execute_unary<leading_zeros<uint64_t>, uint64_t>;
}

Execute decode_reverse(Decoder& d) {
  const Type type = d.take_type(kBits32To64);
  d.operands(type, 1);
  return type == Type::kB32 ? execute_unary<reversed<uint32_t>, uint32_t> : execute_unary<reversed<uint64_t>, uint64_t>;
}

Execute decode_find(Decoder& d) {
  const bool shift_amount = d.take("shiftamt");
  const Type type = d.take_type(kIntegers32To64);
  d.destination(Type::kU32);
  d.source(type);
  return with_integer(type, [&](auto zero) -> Execute {
    using T = decltype(zero);
    return shift_amount ? execute_unary<find_leading_shift<T>, T> : execute_unary<find_leading<T>, T>;
  });
}

Execute decode_extract(Decoder& d) {
  const Type type = d.take_type(kIntegers32To64);
  d.operands(type, 1);
  d.source(Type::kU32);
  d.source(Type::kU32);
  return with_integer(type, [](auto zero) -> Execute {
    using T = decltype(zero);
    return execute_ternary<extract_field<T>, T, uint32_t, uint32_t>;
  });
}

Execute decode_insert(Decoder& d) {
  const Type type = d.take_type(kBits32To64);
  d.operands(type, 2);
  d.source(Type::kU32);
  d.source(Type::kU32);
  return type == Type::kB32 ? execute_insert_field<uint32_t> : execute_insert_field<uint64_t>;
}

Execute decode_mask(Decoder& d) {
  const bool clamp = d.require_one_of({"wrap", "clamp"}) == 1;
  d.require("b32");
  d.operands(Type::kB32, 2);
  return clamp ? execute_binary<make_mask<true>, uint32_t, uint32_t> : execute_binary<make_mask<false>, uint32_t, uint32_t>;
}

constexpr Opcode kOpcodes[] = {
    {"and", decode_and},      {"or", decode_or},           {"xor", decode_xor},           {"not", decode_not},
    {"cnot", decode_cnot},    {"shl", decode_shift_left},  {"shr", decode_shift_right},   {"shf", decode_funnel_shift},
    {"lop3", decode_lop3},    {"popc", decode_population}, {"clz", decode_leading_zeros}, {"brev", decode_reverse},
    {"bfind", decode_find},   {"bfe", decode_extract},     {"bfi", decode_insert},        {"bmsk", decode_mask},
    {"prmt", decode_permute},
};

} // namespace

std::span<const Opcode> bit_opcodes() { return kOpcodes; }

} // namespace simt::ptx
