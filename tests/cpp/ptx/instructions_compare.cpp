// Comparisons and selections.
#include <cmath>

#include "decoder.h"
#include "float_formats.h"

namespace simt::ptx {
namespace {

enum Comparison : uint8_t {
  kEqual,
  kNotEqual,
  kLess,
  kLessEqual,
  kGreater,
  kGreaterEqual, // of integers and, false for NaN, of floating point
  kLower,
  kLowerSame,
  kHigher,
  kHigherSame, // of unsigned integers
  kEqualUnordered,
  kNotEqualUnordered,
  kLessUnordered,
  kLessEqualUnordered,
  kGreaterUnordered,
  kGreaterEqualUnordered, // true for NaN
  kNumbers,
  kNotNumbers,
};
template <Comparison comparison, typename T>
bool compare(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case kEqual:
      return a == b;
    case kNotEqual:
      return !unordered && a != b;
    case kLess:
    case kLower:
      return a < b;
    case kLessEqual:
    case kLowerSame:
      return a <= b;
    case kGreater:
    case kHigher:
      return a > b;
    case kGreaterEqual:
    case kHigherSame:
      return a >= b;
    case kEqualUnordered:
      return unordered || a == b;
    case kNotEqualUnordered:
      return a != b;
    case kLessUnordered:
      return unordered || a < b;
    case kLessEqualUnordered:
      return unordered || a <= b;
    case kGreaterUnordered:
      return unordered || a > b;
    case kGreaterEqualUnordered:
      return unordered || a >= b;
    case kNumbers:
      return !unordered;
    default:
      return unordered;
  }
}

// ---- operands: C++ types stand for themselves

struct Float16 {};
struct BFloat16 {};
struct FlushedFloat {};
struct FlushedFloat16 {};

template <typename T>
auto operand(const PtxThread& thread, Slot slot, int bit = 0) {
  if constexpr (std::is_same_v<T, Float16>) {
    return value_of(kFloat16, thread.slots[slot] >> bit & 0xffff);
  } else if constexpr (std::is_same_v<T, FlushedFloat16>) {
    return value_of(kFloat16, kFloat16.flushed(thread.slots[slot] >> bit & 0xffff));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return value_of(kBFloat16, thread.slots[slot] >> bit & 0xffff);
  } else if constexpr (std::is_same_v<T, FlushedFloat>) {
    return std::bit_cast<float>(static_cast<uint32_t>(kFloat32.flushed(thread.read<uint32_t>(slot))));
  } else {
    return thread.read<T>(slot);
  }
}

// How the result of the comparison meets the predicate operand.
enum Combination : uint8_t { kAnd, kOr, kXor, kAlone };

bool combined(const PtxThread& thread, const Instruction& i, bool result) {
  if (i.mode == kAlone) return result;
  const bool c = thread.predicate(i.from[2]) != i.negated_predicate;
  return i.mode == kAnd ? result && c : i.mode == kOr ? result || c : result != c;
}

template <Comparison comparison, typename T>
struct SetPredicate {
  static void execute(PtxThread& thread, const Instruction& i) {
    const bool result = compare<comparison>(operand<T>(thread, i.from[0]), operand<T>(thread, i.from[1]));
    // The second destination gets the opposite comparison, combined likewise.
    const bool first = combined(thread, i, result), second = combined(thread, i, !result);
    thread.write(i.to[0], first);
    thread.write(i.to[1], second);
  }
};
template <Comparison comparison, typename T>
struct SetPredicateAlone {
  static void execute(PtxThread& thread, const Instruction& i) {
    const bool result = compare<comparison>(operand<T>(thread, i.from[0]), operand<T>(thread, i.from[1]));
    thread.write(i.to[0], result);
    thread.write(i.to[1], !result);
  }
};
// Of a pair, each half has a destination of its own.
template <Comparison comparison, typename T>
struct SetPredicatePair {
  static void execute(PtxThread& thread, const Instruction& i) {
    const bool low = combined(thread, i, compare<comparison>(operand<T>(thread, i.from[0]), operand<T>(thread, i.from[1])));
    const bool high = combined(thread, i, compare<comparison>(operand<T>(thread, i.from[0], 16), operand<T>(thread, i.from[1], 16)));
    thread.write(i.to[0], low);
    thread.write(i.to[1], high);
  }
};

// displacement holds what the destination gets if true
template <Comparison comparison, typename T>
struct SetValue {
  static void execute(PtxThread& thread, const Instruction& i) {
    const bool result = combined(thread, i, compare<comparison>(operand<T>(thread, i.from[0]), operand<T>(thread, i.from[1])));
    thread.write(i.to[0], result ? i.displacement : 0);
  }
};
template <Comparison comparison, typename T>
struct SetValuePair {
  static void execute(PtxThread& thread, const Instruction& i) {
    const bool low = combined(thread, i, compare<comparison>(operand<T>(thread, i.from[0]), operand<T>(thread, i.from[1])));
    const bool high = combined(thread, i, compare<comparison>(operand<T>(thread, i.from[0], 16), operand<T>(thread, i.from[1], 16)));
    thread.write(i.to[0], (low ? i.displacement : 0) | (high ? i.displacement << 16 : 0));
  }
};

// ---- decoding

template <template <Comparison, typename> class Shape, typename T>
Execute select_comparison(size_t comparison) {
  switch (comparison) {
#define CASE(name) \
  case name:       \
    return Shape<name, T>::execute;
    CASE(kEqual)
    CASE(kNotEqual)
    CASE(kLess)
    CASE(kLessEqual)
    CASE(kGreater)
    CASE(kGreaterEqual)
    CASE(kLower)
    CASE(kLowerSame)
    CASE(kHigher)
    CASE(kHigherSame)
    CASE(kEqualUnordered)
    CASE(kNotEqualUnordered)
    CASE(kLessUnordered)
    CASE(kLessEqualUnordered)
    CASE(kGreaterUnordered)
    CASE(kGreaterEqualUnordered)
    CASE(kNumbers)
    CASE(kNotNumbers)
#undef CASE
    default:
      return nullptr;
  }
}

template <template <Comparison, typename> class Shape>
Execute select_type(Decoder& d, Type type, bool flush, size_t comparison) {
  const bool is_bits = type == Type::kB16 || type == Type::kB32 || type == Type::kB64;
  const bool is_unsigned = type == Type::kU16 || type == Type::kU32 || type == Type::kU64;
  if (is_bits && comparison > kNotEqual) d.fail("an order of a type that has none");
  if (!is_float(type) && comparison > kHigherSame) d.fail("a comparison of floating point");
  if (!is_unsigned && comparison >= kLower && comparison <= kHigherSame) d.fail("a comparison of unsigned integers");
  switch (type) {
    case Type::kF16:
    case Type::kF16x2:
      return flush ? select_comparison<Shape, FlushedFloat16>(comparison) : select_comparison<Shape, Float16>(comparison);
    case Type::kBF16:
    case Type::kBF16x2:
      return flush ? nullptr : select_comparison<Shape, BFloat16>(comparison);
    case Type::kF32:
      return flush ? select_comparison<Shape, FlushedFloat>(comparison) : select_comparison<Shape, float>(comparison);
    case Type::kF64:
      return flush ? nullptr : select_comparison<Shape, double>(comparison);
    default:
      if (flush) return nullptr;
      return with_integer(type, [&](auto zero) -> Execute { return select_comparison<Shape, decltype(zero)>(comparison); });
  }
}

constexpr std::initializer_list<Type> kComparable = {Type::kB16, Type::kB32, Type::kB64, Type::kU16,  Type::kU32, Type::kU64, Type::kS16,
                                                     Type::kS32, Type::kS64, Type::kF16, Type::kBF16, Type::kF32, Type::kF64};
constexpr std::initializer_list<Type> kPairs = {Type::kF16x2, Type::kBF16x2};

struct Compared {
  size_t comparison;
  bool flush;
};

Compared take_comparison(Decoder& d) {
  Compared taken{};
  taken.comparison = d.require_one_of({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
                                       "num", "nan"}); // in the order of Comparison
  d.result.mode = static_cast<uint8_t>(d.take_one_of({"and", "or", "xor"}).value_or(kAlone));
  taken.flush = d.take("ftz");
  return taken;
}

void take_sources(Decoder& d, Type type) {
  d.source(type);
  d.source(type);
  if (d.result.mode != kAlone) d.predicate_source();
}

Execute decode_setp(Decoder& d) {
  const Compared compared = take_comparison(d);
  const auto pair = d.take_optional_type(kPairs);
  const Type type = pair ? *pair : d.take_type(kComparable);
  d.optional_predicate_destination(Type::kPredicate);
  take_sources(d, type);
  if (pair) return select_type<SetPredicatePair>(d, type, compared.flush, compared.comparison);
  if (d.result.mode == kAlone) return select_type<SetPredicateAlone>(d, type, compared.flush, compared.comparison);
  return select_type<SetPredicate>(d, type, compared.flush, compared.comparison);
}

Execute decode_set(Decoder& d) {
  const Compared compared = take_comparison(d);
  const Type to = d.take_type({Type::kU32, Type::kS32, Type::kF32, Type::kF16, Type::kBF16, Type::kF16x2, Type::kBF16x2});
  const auto pair = d.take_optional_type(kPairs);
  const Type from = pair ? *pair : d.take_type(kComparable);
  d.destination(to);
  take_sources(d, from);
  const bool to_pair = to == Type::kF16x2 || to == Type::kBF16x2;
  if (to_pair && (!pair || *pair != to)) return nullptr;
  const bool to_integer = to == Type::kU32 || to == Type::kS32;
  if (pair && !to_pair && !to_integer) return nullptr;
  if (to_integer)
    d.result.displacement = pair ? 0xffff : 0xffffffff;
  else
    d.result.displacement = to == Type::kF32 ? 0x3f800000 : to == Type::kF16 || to == Type::kF16x2 ? 0x3c00 : 0x3f80; // 1.0
  return pair ? select_type<SetValuePair>(d, from, compared.flush, compared.comparison)
              : select_type<SetValue>(d, from, compared.flush, compared.comparison);
}

void execute_selp(PtxThread& thread, const Instruction& i) {
  thread.slots[i.to[0]] = thread.slots[i.from[thread.predicate(i.from[2]) != i.negated_predicate ? 0 : 1]];
}

Execute decode_selp(Decoder& d) {
  const Type type = d.take_type(
      {Type::kB16, Type::kB32, Type::kB64, Type::kU16, Type::kU32, Type::kU64, Type::kS16, Type::kS32, Type::kS64, Type::kF32, Type::kF64});
  d.operands(type, 2);
  d.predicate_source();
  return execute_selp;
}

template <typename T>
void execute_slct(PtxThread& thread, const Instruction& i) { // -0 is not negative here, NaN selects the second
  thread.slots[i.to[0]] = thread.slots[i.from[operand<T>(thread, i.from[2]) >= 0 ? 0 : 1]];
}

Execute decode_slct(Decoder& d) {
  const bool flush = d.take("ftz");
  const Type type = d.take_type(
      {Type::kB16, Type::kB32, Type::kB64, Type::kU16, Type::kU32, Type::kU64, Type::kS16, Type::kS32, Type::kS64, Type::kF32, Type::kF64});
  const Type by = d.take_type({Type::kS32, Type::kF32});
  d.operands(type, 2);
  d.source(by);
  if (by == Type::kS32) return flush ? nullptr : execute_slct<int32_t>;
  return flush ? execute_slct<FlushedFloat> : execute_slct<float>;
}

enum Property : size_t { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };

template <typename T>
void execute_testp(PtxThread& thread, const Instruction& i) {
  const int kind = std::fpclassify(thread.read<T>(i.from[0]));
  const bool results[] = {
      kind != FP_INFINITE && kind != FP_NAN, kind == FP_INFINITE, kind != FP_NAN, kind == FP_NAN, kind == FP_NORMAL, kind == FP_SUBNORMAL};
  thread.write(i.to[0], results[i.mode]);
}

Execute decode_testp(Decoder& d) {
  d.result.mode = static_cast<uint8_t>(d.require_one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}));
  const Type type = d.take_type({Type::kF32, Type::kF64});
  d.destination(Type::kPredicate);
  d.source(type);
  return type == Type::kF64 ? execute_testp<double> : execute_testp<float>;
}

constexpr Opcode kOpcodes[] = {
    {"setp", decode_setp}, {"set", decode_set}, {"selp", decode_selp}, {"slct", decode_slct}, {"testp", decode_testp},
};

} // namespace

std::span<const Opcode> compare_opcodes() { return kOpcodes; }

} // namespace simt::ptx
