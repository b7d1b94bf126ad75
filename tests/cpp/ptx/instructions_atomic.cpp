// atom and red: read-modify-write operations. The scheduler is told first, and nothing runs between that and the operation.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "addresses.h"
#include "instructions_float.h"

namespace simt::ptx {
namespace {

// What is kept in Instruction::mode.
constexpr uint8_t kOrderBits = 3, kSpaceShift = 2;

Target locate_target(const PtxThread& thread, const Instruction& i, size_t bytes) {
  const uint64_t address = address_of(thread, i, 0, i.displacement);
  switch (static_cast<AddressSpace>(i.mode >> kSpaceShift)) {
    case AddressSpace::kGlobal:
      return locate<AddressSpace::kGlobal>(thread, address, bytes, i.at);
    case AddressSpace::kShared:
      return locate<AddressSpace::kShared>(thread, address, bytes, i.at);
    default:
      return locate<AddressSpace::kGeneric>(thread, address, bytes, i.at);
  }
}

// `operation` gets the old value, the operands and whether the memory is global.
template <auto operation, typename T>
void execute_atomic(PtxThread& thread, const Instruction& i) {
  const T b = thread.read<T>(i.from[1]), c = thread.read<T>(i.from[2]);
  const Target target = locate_target(thread, i, sizeof(T));
  if (target.space == AddressSpace::kPrivate) fail(FailureKind::kUnsupported, "an atomic operation on local memory", i.at);
  atomic_access(target.p, sizeof(T), true, true, static_cast<Order>(i.mode & kOrderBits), detector_space(target.space), i.at);
  T old;
  std::memcpy(&old, target.p, sizeof old);
  const T updated = operation(old, b, c, target.space == AddressSpace::kGlobal);
  std::memcpy(target.p, &updated, sizeof updated);
  thread.write(i.to[0], old);
}

template <typename T>
T add(T old, T b, T, bool in_global) {
  if constexpr (std::is_same_v<T, float>)
    return in_global ? add_of_global_atomic(old, b) : add_of_atomic(old, b);
  else if constexpr (std::is_floating_point_v<T>)
    return add_of_atomic(old, b);
  else
    return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(b));
}
template <bool is_bfloat16>
uint16_t add_half(uint16_t old, uint16_t b, uint16_t, bool) {
  return add_of_atomic_half(is_bfloat16, old, b);
}
template <typename T>
T minimum(T old, T b, T, bool) {
  return std::min(old, b);
}
template <typename T>
T maximum(T old, T b, T, bool) {
  return std::max(old, b);
}
template <typename T>
T bitwise_and(T old, T b, T, bool) {
  return old & b;
}
template <typename T>
T bitwise_or(T old, T b, T, bool) {
  return old | b;
}
template <typename T>
T bitwise_xor(T old, T b, T, bool) {
  return old ^ b;
}
template <typename T>
T exchange(T, T b, T, bool) {
  return b;
}
template <typename T>
T compare_and_swap(T old, T b, T c, bool) {
  return old == b ? c : old;
}
uint32_t increment(uint32_t old, uint32_t b, uint32_t, bool) { return old >= b ? 0 : old + 1; }
uint32_t decrement(uint32_t old, uint32_t b, uint32_t, bool) { return old == 0 || old > b ? b : old - 1; }

enum Operation : size_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kInc, kDec, kExch, kCas };

Execute select_add(Decoder& d) {
  const bool keeps_subnormal = d.take("noftz");
  const Type type =
      keeps_subnormal ? d.take_type({Type::kF16, Type::kBF16}) : d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kF32, Type::kF64});
  switch (type) {
    case Type::kF16:
      return execute_atomic<add_half<false>, uint16_t>;
    case Type::kBF16:
      return execute_atomic<add_half<true>, uint16_t>;
    case Type::kF32:
      return execute_atomic<add<float>, float>;
    case Type::kF64:
      return execute_atomic<add<double>, double>;
    case Type::kU64:
      return execute_atomic<add<uint64_t>, uint64_t>;
    default:
      return execute_atomic<add<uint32_t>, uint32_t>;
  }
}

template <bool is_maximum>
Execute select_extremum(Decoder& d) {
  return with_integer(d.take_type(kIntegers32To64), [](auto zero) -> Execute {
    using T = decltype(zero);
    return execute_atomic < is_maximum ? maximum<T> : minimum<T>, T > ;
  });
}

Execute select_operation(Decoder& d, size_t operation) {
  switch (operation) {
    case kAdd:
      return select_add(d);
    case kMin:
      return select_extremum<false>(d);
    case kMax:
      return select_extremum<true>(d);
    case kInc:
      d.require("u32");
      return execute_atomic<increment, uint32_t>;
    case kDec:
      d.require("u32");
      return execute_atomic<decrement, uint32_t>;
    default:
      break;
  }
  const Type type = operation == kCas ? d.take_type({Type::kB16, Type::kB32, Type::kB64}) : d.take_type(kBits32To64);
  return with_integer(type, [&](auto zero) -> Execute {
    using T = std::make_unsigned_t<decltype(zero)>;
    switch (operation) {
      case kAnd:
        return execute_atomic<bitwise_and<T>, T>;
      case kOr:
        return execute_atomic<bitwise_or<T>, T>;
      case kXor:
        return execute_atomic<bitwise_xor<T>, T>;
      case kExch:
        return execute_atomic<exchange<T>, T>;
      default:
        return execute_atomic<compare_and_swap<T>, T>;
    }
  });
}

Type type_of_operand(const Decoder& d) {
  for (const std::string& modifier : d.parsed().modifiers)
    if (const auto type = type_named(modifier)) return *type;
  d.fail("without a type");
}

Execute decode_atomic(Decoder& d) {
  const bool returns = d.opcode() == "atom";
  constexpr Order kOrders[] = {Order::kRelaxed, Order::kAcquire, Order::kRelease, Order::kAcquireRelease};
  const size_t order = d.take_one_of({"relaxed", "acquire", "release", "acq_rel"}).value_or(0);
  if (!returns && (order == 1 || order == 3)) return nullptr;
  d.take_one_of({"cta", "cluster", "gpu", "sys"});
  const AddressSpace space = take_address_space(d);
  if (space == AddressSpace::kConst || space == AddressSpace::kPrivate) return nullptr;
  d.result.mode = static_cast<uint8_t>(static_cast<uint8_t>(kOrders[order]) | static_cast<uint8_t>(space) << kSpaceShift);
  const bool has_policy = d.take("L2::cache_hint");
  const Type type = type_of_operand(d);
  const size_t operation = returns ? d.require_one_of({"add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"})
                                   : d.require_one_of({"add", "min", "max", "and", "or", "xor", "inc", "dec"});
  const Execute execute = select_operation(d, operation);
  if (returns) d.destination(type);
  d.address();
  d.source(type);
  if (operation == kCas) d.source(type);
  if (has_policy) d.source(Type::kB64);
  return execute;
}

constexpr Opcode kOpcodes[] = {{"atom", decode_atomic}, {"red", decode_atomic}};

} // namespace

std::span<const Opcode> atomic_opcodes() { return kOpcodes; }

} // namespace simt::ptx
