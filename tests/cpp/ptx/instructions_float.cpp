// Arithmetic of f32 and f64.
//
// NaN: a single precision result that is NaN is 0x7fffffff, whatever the operands were. For f64 the ISA promises no payload: here
// it is always 0x7ff8000000000000.
// .approx and .full forms have no bit-exact definition, only error bounds: they give the correctly rounded value of what they
// approximate. A kernel whose result must be the same on every GPU must not use them, and no test here can tell that it does not.
#include "instructions_float.h"

#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>

#include "float_formats.h"

namespace simt::ptx {
namespace {

// What is kept in Instruction::mode.
constexpr uint8_t kRoundingBits = 3, kFlush = 4, kSaturate = 8, kPropagatesNan = 16, kXorSignAbs = 32;

Rounding rounding_of(uint8_t mode) { return static_cast<Rounding>(mode & kRoundingBits); }

template <typename T>
T canonical(T value) {
  if (value == value) return value;
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(0x7fffffff);
  else
    return std::numeric_limits<double>::quiet_NaN();
}

template <typename T>
T flushed(T value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(T{0}, value) : value;
}

template <typename T>
T finished(T value, uint8_t mode) {
  value = canonical(value);
  if ((mode & kFlush) != 0) value = flushed(value);
  if ((mode & kSaturate) != 0) value = value > 0 ? std::fmin(value, T{1}) : T{0}; // NaN becomes +0, and so does -0
  return value;
}

struct Add {
  template <typename T>
  static T apply(T a, T b) {
    return a + b;
  }
};
struct Subtract {
  template <typename T>
  static T apply(T a, T b) {
    return a - b;
  }
};
struct Multiply {
  template <typename T>
  static T apply(T a, T b) {
    return a * b;
  }
};
struct Divide {
  template <typename T>
  static T apply(T a, T b) {
    return a / b;
  }
};
struct FusedMultiplyAdd {
  template <typename T>
  static T apply(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct SquareRoot {
  template <typename T>
  static T apply(T a) {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <typename T>
  static T apply(T a) {
    return T{1} / a;
  }
};

// In the rounding direction of the mode. The volatile copies keep the compiler from computing before or after the change.
template <typename Operation, typename T, typename... Rest>
__attribute__((noinline)) T apply_rounded(uint8_t mode, T a, Rest... rest) {
  if (rounding_of(mode) == Rounding::kNearestEven) return Operation::apply(a, rest...);
  constexpr int kDirections[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  std::fesetround(kDirections[mode & kRoundingBits]);
  volatile T first = a;
  volatile T result{};
  if constexpr (sizeof...(Rest) == 0) {
    result = Operation::apply(T{first});
  } else if constexpr (sizeof...(Rest) == 1) {
    volatile T second = (rest, ...);
    result = Operation::apply(T{first}, T{second});
  } else {
    const T others[] = {rest...};
    volatile T second = others[0], third = others[1];
    result = Operation::apply(T{first}, T{second}, T{third});
  }
  std::fesetround(FE_TONEAREST);
  return result;
}

template <typename T>
T operand(const PtxThread& thread, Slot slot, uint8_t mode) {
  const T value = thread.read<T>(slot);
  return (mode & kFlush) != 0 ? flushed(value) : value;
}

// The plain forms (to nearest, subnormal numbers kept, not saturated) are the ones whose speed matters.
template <typename T, typename Operation, int sources>
void execute_plain(PtxThread& thread, const Instruction& i) {
  T result;
  if constexpr (sources == 1)
    result = Operation::apply(thread.read<T>(i.from[0]));
  else if constexpr (sources == 2)
    result = Operation::apply(thread.read<T>(i.from[0]), thread.read<T>(i.from[1]));
  else
    result = Operation::apply(thread.read<T>(i.from[0]), thread.read<T>(i.from[1]), thread.read<T>(i.from[2]));
  thread.write(i.to[0], canonical(result));
}

template <typename T, typename Operation, int sources>
void execute_with_mode(PtxThread& thread, const Instruction& i) {
  const T a = operand<T>(thread, i.from[0], i.mode);
  T result;
  if constexpr (sources == 1)
    result = apply_rounded<Operation>(i.mode, a);
  else if constexpr (sources == 2)
    result = apply_rounded<Operation>(i.mode, a, operand<T>(thread, i.from[1], i.mode));
  else
    result = apply_rounded<Operation>(i.mode, a, operand<T>(thread, i.from[1], i.mode), operand<T>(thread, i.from[2], i.mode));
  thread.write(i.to[0], finished(result, i.mode));
}

template <typename Operation, int sources>
Execute select(Decoder& d, Type type) {
  d.operands(type, sources);
  if (type == Type::kF64)
    return d.result.mode == 0 ? execute_plain<double, Operation, sources> : execute_with_mode<double, Operation, sources>;
  return d.result.mode == 0 ? execute_plain<float, Operation, sources> : execute_with_mode<float, Operation, sources>;
}

std::optional<size_t> take_rounding(Decoder& d) { return d.take_one_of({"rn", "rz", "rm", "rp"}); }

bool is_half(const Decoder& d) {
  for (const std::string& modifier : d.parsed().modifiers)
    if (const auto type = type_named(modifier)) return *type != Type::kF32 && *type != Type::kF64;
  return false;
}

// {.rnd}{.ftz}{.sat}.f32 and {.rnd}.f64
template <typename Operation, int sources>
Execute decode_arithmetic(Decoder& d, bool rounding_required) {
  const auto rounding = take_rounding(d);
  if (rounding_required && !rounding) d.fail("without a rounding modifier");
  const bool flush = d.take("ftz"), saturate = d.take("sat");
  const Type type = flush || saturate ? d.take_type({Type::kF32}) : d.take_type({Type::kF32, Type::kF64});
  d.result.mode = static_cast<uint8_t>(rounding.value_or(0) | (flush ? kFlush : 0) | (saturate ? kSaturate : 0));
  return select<Operation, sources>(d, type);
}

// .approx{.ftz}.f32, .rnd{.ftz}.f32 or .rnd.f64
template <typename Operation, int sources>
Execute decode_rounded_or_approximate(Decoder& d) {
  const bool approximate = d.take("approx");
  const auto rounding = approximate ? std::optional<size_t>(0) : take_rounding(d);
  if (!rounding) d.fail("neither .approx nor a rounding modifier");
  const bool flush = d.take("ftz");
  const Type type = flush || approximate ? d.take_type({Type::kF32}) : d.take_type({Type::kF32, Type::kF64});
  d.result.mode = static_cast<uint8_t>(*rounding | (flush ? kFlush : 0));
  return select<Operation, sources>(d, type);
}

// ---- minimum and maximum: -0 < +0; of a number and a NaN the number, unless .NaN asks otherwise

template <typename T, bool is_maximum>
T extremum(T a, T b, uint8_t mode) {
  if (std::isnan(a) || std::isnan(b)) {
    if ((mode & kPropagatesNan) != 0 || (std::isnan(a) && std::isnan(b))) return std::numeric_limits<T>::quiet_NaN();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) == is_maximum ? b : a; // tells apart the zeros only
  return (a < b) == is_maximum ? b : a;
}

template <typename T, bool is_maximum>
void execute_extremum(PtxThread& thread, const Instruction& i) {
  T a = operand<T>(thread, i.from[0], i.mode), b = operand<T>(thread, i.from[1], i.mode);
  const bool negative = std::signbit(a) != std::signbit(b);
  if ((i.mode & kXorSignAbs) != 0) {
    a = std::fabs(a);
    b = std::fabs(b);
  }
  T result = canonical(extremum<T, is_maximum>(a, b, i.mode));
  if ((i.mode & kXorSignAbs) != 0 && !std::isnan(result)) result = std::copysign(result, negative ? T{-1} : T{1});
  thread.write(i.to[0], result);
}

template <bool is_maximum>
Execute decode_extremum(Decoder& d) {
  if (is_half(d)) return decode_half_extremum(d);
  const bool flush = d.take("ftz"), nan = d.take("NaN"), xor_sign = d.take("xorsign");
  if (xor_sign) d.require("abs");
  const Type type = flush || nan || xor_sign ? d.take_type({Type::kF32}) : d.take_type({Type::kF32, Type::kF64});
  d.operands(type, 2);
  d.result.mode = (flush ? kFlush : 0) | (nan ? kPropagatesNan : 0) | (xor_sign ? kXorSignAbs : 0);
  return type == Type::kF64 ? execute_extremum<double, is_maximum> : execute_extremum<float, is_maximum>;
}

// ---- signs: a change of one bit, also of NaN (whose result the ISA leaves open)

struct Negate {
  template <typename T>
  static T apply(T a) {
    return -a;
  }
};
struct Absolute {
  template <typename T>
  static T apply(T a) {
    return std::fabs(a);
  }
};

template <typename T, typename Operation>
void execute_sign(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], Operation::apply(operand<T>(thread, i.from[0], i.mode)));
}

template <typename Operation>
Execute decode_sign(Decoder& d) {
  if (is_half(d)) return decode_half_sign(d);
  const bool flush = d.take("ftz");
  const Type type = flush ? d.take_type({Type::kF32}) : d.take_type({Type::kF32, Type::kF64});
  d.operands(type, 1);
  d.result.mode = flush ? kFlush : 0;
  return type == Type::kF64 ? execute_sign<double, Operation> : execute_sign<float, Operation>;
}

template <typename T>
void execute_copysign(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], std::copysign(thread.read<T>(i.from[1]), thread.read<T>(i.from[0])));
}

Execute decode_copysign(Decoder& d) {
  const Type type = d.take_type({Type::kF32, Type::kF64});
  d.operands(type, 2);
  return type == Type::kF64 ? execute_copysign<double> : execute_copysign<float>;
}

// ---- approximations: computed in double, rounded once

template <double (*function)(double)>
struct Approximation {
  static float apply(float a) { return static_cast<float>(function(static_cast<double>(a))); }
  static double apply(double a) { return function(a); }
};
double reciprocal_square_root(double a) { return 1 / std::sqrt(a); }
double exp2_of(double a) { return std::exp2(a); }
double log2_of(double a) { return std::log2(a); }
double sine(double a) { return std::sin(a); }
double cosine(double a) { return std::cos(a); }
double hyperbolic_tangent(double a) { return std::tanh(a); }

template <double (*function)(double)>
Execute decode_approximation(Decoder& d) {
  d.require("approx");
  d.result.mode = d.take("ftz") ? kFlush : 0;
  const Type type = function == reciprocal_square_root ? d.take_type({Type::kF32, Type::kF64}) : d.take_type({Type::kF32});
  return select<Approximation<function>, 1>(d, type);
}

// rcp.approx.ftz.f64 gives the upper half of the result only.
void execute_coarse_reciprocal(PtxThread& thread, const Instruction& i) {
  const double result = canonical(1 / operand<double>(thread, i.from[0], kFlush));
  thread.write(i.to[0], std::bit_cast<uint64_t>(flushed(result)) & 0xffffffff00000000);
}

Execute decode_reciprocal(Decoder& d) {
  const auto& modifiers = d.parsed().modifiers;
  if (modifiers == std::vector<std::string>{"approx", "ftz", "f64"}) {
    for (const std::string& modifier : modifiers) d.require(modifier);
    d.operands(Type::kF64, 1);
    return execute_coarse_reciprocal;
  }
  return decode_rounded_or_approximate<Reciprocal, 1>(d);
}

constexpr Opcode kOpcodes[] = {
    {"fma", decode_float_fma},
    {"rcp", decode_reciprocal},
    {"sqrt", decode_rounded_or_approximate<SquareRoot, 1>},
    {"rsqrt", decode_approximation<reciprocal_square_root>},
    {"ex2", decode_approximation<exp2_of>},
    {"lg2", decode_approximation<log2_of>},
    {"sin", decode_approximation<sine>},
    {"cos", decode_approximation<cosine>},
    {"tanh", decode_approximation<hyperbolic_tangent>},
    {"copysign", decode_copysign},
};

} // namespace

Execute decode_float_add(Decoder& d) { return is_half(d) ? decode_half_arithmetic(d) : decode_arithmetic<Add, 2>(d, false); }
Execute decode_float_subtract(Decoder& d) { return is_half(d) ? decode_half_arithmetic(d) : decode_arithmetic<Subtract, 2>(d, false); }
Execute decode_float_multiply(Decoder& d) { return is_half(d) ? decode_half_arithmetic(d) : decode_arithmetic<Multiply, 2>(d, false); }
Execute decode_float_fma(Decoder& d) { return is_half(d) ? decode_half_arithmetic(d) : decode_arithmetic<FusedMultiplyAdd, 3>(d, true); }

Execute decode_float_divide(Decoder& d) {
  if (!d.take("full")) return decode_rounded_or_approximate<Divide, 2>(d);
  d.result.mode = d.take("ftz") ? kFlush : 0;
  return select<Divide, 2>(d, d.take_type({Type::kF32}));
}

Execute decode_float_minimum(Decoder& d) { return decode_extremum<false>(d); }
Execute decode_float_maximum(Decoder& d) { return decode_extremum<true>(d); }
Execute decode_float_negate(Decoder& d) { return decode_sign<Negate>(d); }
Execute decode_float_absolute(Decoder& d) { return decode_sign<Absolute>(d); }

float add_of_global_atomic(float a, float b) { return flushed(canonical(flushed(a) + flushed(b))); }
float add_of_atomic(float a, float b) { return canonical(a + b); }
double add_of_atomic(double a, double b) { return canonical(a + b); }

std::span<const Opcode> float_opcodes() { return kOpcodes; }

} // namespace simt::ptx
