// Arithmetic of f16 and bf16 and of their pairs f16x2 and bf16x2.
//
// Sums and products are formed in double and rounded once: a product of two is exact there, a sum with a third number is rounded to
// odd, so that the second rounding sees on which side of a tie the exact value lies. NaN results are 0x7fff.
#include <algorithm>

#include "float_formats.h"
#include "instructions_float.h"

namespace simt::ptx {
namespace {

constexpr uint8_t kFlush = 1, kSaturate = 2, kRelu = 4, kPropagatesNan = 8, kXorSignAbs = 16, kIsBFloat16 = 32;

const FloatFormat& format_of(uint8_t mode) { return (mode & kIsBFloat16) != 0 ? kBFloat16 : kFloat16; }

uint64_t input(uint64_t bits, uint8_t mode) { return (mode & kFlush) != 0 ? format_of(mode).flushed(bits) : bits; }

uint16_t finished(double value, uint8_t mode) {
  const FloatFormat& format = format_of(mode);
  uint64_t bits = rounded(format, value, Rounding::kNearestEven);
  if ((mode & kFlush) != 0) bits = format.flushed(bits);
  const bool negative = (bits & format.sign()) != 0;
  if ((mode & kSaturate) != 0) {
    const uint64_t one = rounded(format, 1.0, Rounding::kNearestEven);
    bits = format.is_nan(bits) || negative ? 0 : std::min(bits, one);
  }
  if ((mode & kRelu) != 0 && negative) bits = 0; // NaN stays: the canonical one has no sign
  return static_cast<uint16_t>(bits);
}

struct Add {
  static uint16_t apply(const uint64_t* x, uint8_t mode) {
    return finished(add_to_odd(value_of(format_of(mode), x[0]), value_of(format_of(mode), x[1])), mode);
  }
};
struct Subtract {
  static uint16_t apply(const uint64_t* x, uint8_t mode) {
    return finished(add_to_odd(value_of(format_of(mode), x[0]), -value_of(format_of(mode), x[1])), mode);
  }
};
struct Multiply {
  static uint16_t apply(const uint64_t* x, uint8_t mode) {
    return finished(value_of(format_of(mode), x[0]) * value_of(format_of(mode), x[1]), mode);
  }
};
struct FusedMultiplyAdd {
  static uint16_t apply(const uint64_t* x, uint8_t mode) {
    const FloatFormat& format = format_of(mode);
    return finished(add_to_odd(value_of(format, x[0]) * value_of(format, x[1]), value_of(format, x[2])), mode);
  }
};

template <bool is_maximum>
struct Extremum {
  static uint16_t apply(const uint64_t* x, uint8_t mode) {
    const FloatFormat& format = format_of(mode);
    uint64_t a = x[0], b = x[1];
    if (format.is_nan(a) || format.is_nan(b)) {
      if ((mode & kPropagatesNan) != 0 || (format.is_nan(a) && format.is_nan(b))) return static_cast<uint16_t>(format.canonical_nan());
      return static_cast<uint16_t>(format.is_nan(a) ? b : a);
    }
    const uint64_t sign = (a ^ b) & format.sign();
    if ((mode & kXorSignAbs) != 0) {
      a = format.magnitude(a);
      b = format.magnitude(b);
    }
    // Ordered as numbers with -0 below +0: as integers, those of negative numbers turned around.
    const auto rank = [&](uint64_t bits) {
      const auto magnitude = static_cast<int64_t>(format.magnitude(bits));
      return (bits & format.sign()) != 0 ? -magnitude - 1 : magnitude;
    };
    const uint64_t result = (rank(a) < rank(b)) == is_maximum ? b : a;
    return static_cast<uint16_t>((mode & kXorSignAbs) != 0 ? result | sign : result);
  }
};

struct Negate {
  static uint16_t apply(const uint64_t* x, uint8_t) { return static_cast<uint16_t>(x[0] ^ 0x8000); }
};
struct Absolute {
  static uint16_t apply(const uint64_t* x, uint8_t) { return static_cast<uint16_t>(x[0] & 0x7fff); }
};

template <typename Operation, int sources>
void execute_one(PtxThread& thread, const Instruction& i) {
  uint64_t x[sources];
  for (int n = 0; n < sources; ++n) x[n] = input(thread.read<uint16_t>(i.from[n]), i.mode);
  thread.write(i.to[0], Operation::apply(x, i.mode));
}

template <typename Operation, int sources>
void execute_pair(PtxThread& thread, const Instruction& i) {
  uint64_t low[sources], high[sources];
  for (int n = 0; n < sources; ++n) {
    const auto both = thread.read<uint32_t>(i.from[n]);
    low[n] = input(both & 0xffff, i.mode);
    high[n] = input(both >> 16, i.mode);
  }
  thread.write(i.to[0], uint32_t{Operation::apply(high, i.mode)} << 16 | Operation::apply(low, i.mode));
}

template <typename Operation, int sources>
Execute select(Decoder& d, uint8_t mode) {
  const bool flush_or_saturate = (mode & (kFlush | kSaturate)) != 0;
  const Type type =
      flush_or_saturate ? d.take_type({Type::kF16, Type::kF16x2}) : d.take_type({Type::kF16, Type::kF16x2, Type::kBF16, Type::kBF16x2});
  const bool is_pair = type == Type::kF16x2 || type == Type::kBF16x2;
  if (type == Type::kBF16 || type == Type::kBF16x2) mode |= kIsBFloat16;
  d.result.mode = mode;
  d.operands(is_pair ? Type::kB32 : Type::kB16, sources);
  return is_pair ? execute_pair<Operation, sources> : execute_one<Operation, sources>;
}

} // namespace

Execute decode_half_arithmetic(Decoder& d) {
  const bool rounds = d.take("rn");
  const uint8_t flush = d.take("ftz") ? kFlush : 0, saturate = d.take("sat") ? kSaturate : 0;
  if (d.opcode() == "add") return select<Add, 2>(d, flush | saturate);
  if (d.opcode() == "sub") return select<Subtract, 2>(d, flush | saturate);
  if (d.opcode() == "mul") return select<Multiply, 2>(d, flush | saturate);
  if (d.opcode() != "fma" || !rounds) return nullptr;
  const uint8_t relu = d.take("relu") ? kRelu : 0;
  return select<FusedMultiplyAdd, 3>(d, flush | saturate | relu);
}

Execute decode_half_extremum(Decoder& d) {
  const uint8_t flush = d.take("ftz") ? kFlush : 0, nan = d.take("NaN") ? kPropagatesNan : 0,
                xor_sign = d.take("xorsign") ? kXorSignAbs : 0;
  if (xor_sign != 0) d.require("abs");
  const auto mode = static_cast<uint8_t>(flush | nan | xor_sign);
  return d.opcode() == "max" ? select<Extremum<true>, 2>(d, mode) : select<Extremum<false>, 2>(d, mode);
}

Execute decode_half_sign(Decoder& d) {
  const uint8_t flush = d.take("ftz") ? kFlush : 0;
  return d.opcode() == "neg" ? select<Negate, 1>(d, flush) : select<Absolute, 1>(d, flush);
}

uint16_t add_of_atomic_half(bool is_bfloat16, uint16_t a, uint16_t b) {
  const uint64_t x[] = {a, b};
  return Add::apply(x, is_bfloat16 ? kIsBFloat16 : 0);
}

} // namespace simt::ptx
