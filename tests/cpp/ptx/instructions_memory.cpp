// Loads, stores, copies, and conversions between address spaces.
//
// Cache operators, eviction priorities, prefetch sizes and cache policies change no value: they are known and do nothing.
#include <cstring>

#include "addresses.h"

namespace simt::ptx {
namespace {

// What is kept in Instruction::mode.
enum Strength : uint8_t { kWeak, kRelaxed, kAcquire, kRelease };

Order order_of(uint8_t strength) {
  return strength == kAcquire ? Order::kAcquire : strength == kRelease ? Order::kRelease : Order::kRelaxed;
}

// Tells the scheduler, which may let other threads run: the access itself must follow at once.
void announce(const Target& target, size_t bytes, bool is_write, const Instruction& i) {
  if (target.space == AddressSpace::kPrivate || target.space == AddressSpace::kConst) return;
  if (i.mode == kWeak)
    plain_access(target.p, bytes, is_write, detector_space(target.space), i.at);
  else
    atomic_access(target.p, bytes, !is_write, is_write, order_of(i.mode), detector_space(target.space), i.at);
}

template <typename T, AddressSpace space, int count>
struct Load {
  static void execute(PtxThread& thread, const Instruction& i) {
    constexpr size_t kBytes = sizeof(T) * count;
    const Target target = locate<space>(thread, address_of(thread, i, 0, i.displacement), kBytes, i.at);
    announce(target, kBytes, false, i);
    T values[count];
    std::memcpy(values, target.p, kBytes);
    for (int n = 0; n < count; ++n) thread.write(i.to[n], values[n]);
  }
};

template <typename T, AddressSpace space, int count>
struct Store {
  static void execute(PtxThread& thread, const Instruction& i) {
    constexpr size_t kBytes = sizeof(T) * count;
    T values[count];
    for (int n = 0; n < count; ++n) values[n] = thread.read<T>(i.from[1 + n]);
    const Target target = locate<space>(thread, address_of(thread, i, 0, i.displacement), kBytes, i.at);
    announce(target, kBytes, true, i);
    std::memcpy(target.p, values, kBytes);
  }
};

// .b128: one register of two slots
template <AddressSpace space>
struct LoadOf16Bytes {
  static void execute(PtxThread& thread, const Instruction& i) {
    const Target target = locate<space>(thread, address_of(thread, i, 0, i.displacement), 16, i.at);
    announce(target, 16, false, i);
    if (i.to[0] != kSink) std::memcpy(&thread.slots[i.to[0]], target.p, 16);
  }
};
template <AddressSpace space>
struct StoreOf16Bytes {
  static void execute(PtxThread& thread, const Instruction& i) {
    const Target target = locate<space>(thread, address_of(thread, i, 0, i.displacement), 16, i.at);
    announce(target, 16, true, i);
    std::memcpy(target.p, &thread.slots[i.from[1]], 16);
  }
};

// ---- decoding of loads and stores

template <typename Make>
Execute with_space(AddressSpace space, Make make) {
  switch (space) {
    case AddressSpace::kGeneric:
      return make(std::integral_constant<AddressSpace, AddressSpace::kGeneric>{});
    case AddressSpace::kGlobal:
      return make(std::integral_constant<AddressSpace, AddressSpace::kGlobal>{});
    case AddressSpace::kShared:
      return make(std::integral_constant<AddressSpace, AddressSpace::kShared>{});
    case AddressSpace::kConst:
      return make(std::integral_constant<AddressSpace, AddressSpace::kConst>{});
    default:
      return make(std::integral_constant<AddressSpace, AddressSpace::kPrivate>{});
  }
}

template <template <typename, AddressSpace, int> class Shape>
Execute select_access(Type type, AddressSpace space, size_t count) {
  if (is_float(type)) type = bytes_of(type) == 4 ? Type::kB32 : bytes_of(type) == 8 ? Type::kB64 : Type::kB16;
  return with_space(space, [&](auto constant) -> Execute {
    constexpr AddressSpace kSpace = decltype(constant)::value;
    return with_integer(type, [&](auto zero) -> Execute {
      using T = decltype(zero);
      if (count == 1) return Shape<T, kSpace, 1>::execute;
      if (count == 2) return Shape<T, kSpace, 2>::execute;
      // Four of 8 bytes would be more than one access can move.
      if constexpr (sizeof(T) < 8)
        return Shape<T, kSpace, 4>::execute;
      else
        return nullptr;
    });
  });
}

void take_scope(Decoder& d) { d.require_one_of({"cta", "cluster", "gpu", "sys"}); }

// Strength, scope and hints; returns whether a cache policy follows the operands.
bool take_memory_modifiers(Decoder& d, const char* ordered, Strength ordered_strength,
                           std::initializer_list<std::string_view> cache_operators) {
  if (d.take("volatile")) {
    d.result.mode = kRelaxed;
  } else if (d.take("relaxed")) {
    d.result.mode = kRelaxed;
    take_scope(d);
  } else if (d.take(ordered)) {
    d.result.mode = ordered_strength;
    take_scope(d);
  } else {
    d.take("weak");
    d.result.mode = kWeak;
  }
  d.take_one_of(cache_operators);
  d.take_one_of({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
  d.take_one_of({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
  d.take_one_of({"L2::64B", "L2::128B", "L2::256B"});
  return d.take("L2::cache_hint");
}

constexpr std::initializer_list<Type> kMovable = {Type::kB8,  Type::kB16, Type::kB32, Type::kB64, Type::kB128,
                                                  Type::kU8,  Type::kU16, Type::kU32, Type::kU64, Type::kS8,
                                                  Type::kS16, Type::kS32, Type::kS64, Type::kF32, Type::kF64};

size_t take_vector_count(Decoder& d) {
  const auto vector = d.take_one_of({"v2", "v4"});
  return vector ? 2 + 2 * *vector : 1;
}

Execute decode_load(Decoder& d) {
  const bool non_coherent = d.take("nc");
  const bool has_policy = take_memory_modifiers(d, "acquire", kAcquire, {"ca", "cg", "cs", "lu", "cv"});
  const AddressSpace space = take_address_space(d);
  const size_t count = take_vector_count(d);
  const Type type = d.take_type(kMovable);
  if (non_coherent && (space != AddressSpace::kGlobal || d.result.mode != kWeak)) return nullptr;
  if (count == 1)
    d.destination(type);
  else
    d.vector_destination(type, count);
  check_extent(d, d.peek_operand(), count * bytes_of(type));
  d.address();
  if (has_policy) d.source(Type::kB64);
  if (type != Type::kB128) return select_access<Load>(type, space, count);
  if (count != 1) return nullptr;
  return with_space(space, [](auto constant) -> Execute { return LoadOf16Bytes<decltype(constant)::value>::execute; });
}

Execute decode_store(Decoder& d) {
  const bool has_policy = take_memory_modifiers(d, "release", kRelease, {"wb", "cg", "cs", "wt"});
  const AddressSpace space = take_address_space(d);
  if (space == AddressSpace::kConst) return nullptr;
  const size_t count = take_vector_count(d);
  const Type type = d.take_type(kMovable);
  check_extent(d, d.peek_operand(), count * bytes_of(type));
  d.address();
  if (count == 1)
    d.source(type);
  else
    d.vector_source(type, count);
  if (has_policy) d.source(Type::kB64);
  if (type == Type::kB128) {
    if (count != 1) return nullptr;
    return with_space(space, [](auto constant) -> Execute { return StoreOf16Bytes<decltype(constant)::value>::execute; });
  }
  constexpr Type kSigned[] = {Type::kS8, Type::kS16, Type::kS32, Type::kS64}, kBits[] = {Type::kB8, Type::kB16, Type::kB32, Type::kB64};
  Type bits = type; // a sign makes no difference to a store
  for (size_t n = 0; n < std::size(kSigned); ++n)
    if (type == kSigned[n]) bits = kBits[n];
  return select_access<Store>(bits, space, count);
}

// ---- cp.async: done at once. That a kernel forgets to wait for its groups is therefore not seen.

constexpr uint8_t kIgnoresSource = 1, kHasSourceBytes = 2;

void execute_async_copy(PtxThread& thread, const Instruction& i) { // from: destination, source, bytes of the source or whether to ignore it
  const size_t bytes = i.count;
  size_t copied = bytes;
  if ((i.mode & kHasSourceBytes) != 0) copied = std::min<size_t>(thread.read<uint32_t>(i.from[2]), bytes);
  if ((i.mode & kIgnoresSource) != 0 && thread.predicate(i.from[2]) != i.negated_predicate) copied = 0;
  // Displacements of the two addresses: the upper and lower half of one field.
  const auto to_displacement = static_cast<int32_t>(i.displacement), from_displacement = static_cast<int32_t>(i.displacement >> 32);
  const Target to = locate<AddressSpace::kShared>(thread, address_of(thread, i, 0, to_displacement), bytes, i.at);
  const Target from = locate<AddressSpace::kGlobal>(thread, address_of(thread, i, 1, from_displacement), bytes, i.at);
  std::byte buffer[16] = {};
  if (copied != 0) {
    plain_access(from.p, copied, false, Space::kGlobal, i.at);
    std::memcpy(buffer, from.p, copied);
  }
  plain_access(to.p, bytes, true, Space::kShared, i.at);
  std::memcpy(to.p, buffer, bytes);
}

void execute_nothing(PtxThread&, const Instruction&) {}

Execute decode_async_copy(Decoder& d) {
  if (d.take("commit_group") || d.take("wait_all")) return execute_nothing;
  if (d.take("wait_group")) {
    d.immediate();
    return execute_nothing;
  }
  const size_t cache = d.require_one_of({"ca", "cg"});
  if (!d.take("shared") && !d.take("shared::cta")) d.require("shared::cluster");
  d.require("global");
  const bool has_policy = d.take("L2::cache_hint");
  d.take_one_of({"L2::64B", "L2::128B", "L2::256B"});
  d.address();
  const int64_t to_displacement = d.result.displacement;
  const bool narrow = d.result.narrow_address;
  d.address();
  d.result.narrow_address = narrow;
  d.result.displacement = d.result.displacement << 32 | (to_displacement & 0xffffffff);
  const uint64_t bytes = d.immediate();
  if (bytes != 16 && (cache == 1 || (bytes != 4 && bytes != 8))) d.fail("a number of bytes that is not known here");
  d.result.count = static_cast<uint8_t>(bytes);
  if (d.operands_left() > (has_policy ? 1 : 0)) {
    const Operand& third = d.peek_operand();
    const bool is_predicate = third.kind == OperandKind::kRegister && d.register_of(third).type == Type::kPredicate;
    d.result.mode = is_predicate ? kIgnoresSource : kHasSourceBytes;
    if (is_predicate)
      d.predicate_source();
    else
      d.source(Type::kU32);
  }
  if (has_policy) d.source(Type::kB64);
  return execute_async_copy;
}

Execute decode_copy(Decoder& d) {
  d.require("async"); // not .bulk and its kin
  return decode_async_copy(d);
}

// ---- addresses

void execute_to_generic_from_shared(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], address_of(thread, i) + reinterpret_cast<uint64_t>(thread.shared));
}
void execute_to_shared_from_generic(PtxThread& thread, const Instruction& i) {
  thread.write(i.to[0], address_of(thread, i) - reinterpret_cast<uint64_t>(thread.shared));
}
void execute_same_address(PtxThread& thread, const Instruction& i) { thread.slots[i.to[0]] = thread.slots[i.from[0]]; }

Execute decode_cvta(Decoder& d) {
  const bool to_space = d.take("to");
  const AddressSpace space = take_address_space(d);
  d.require("u64");
  d.operands(Type::kU64, 1);
  if (space == AddressSpace::kGeneric) return nullptr;
  if (space != AddressSpace::kShared) return execute_same_address;
  return to_space ? execute_to_shared_from_generic : execute_to_generic_from_shared;
}

template <AddressSpace space>
void execute_is_space(PtxThread& thread, const Instruction& i) {
  const Target target = locate<AddressSpace::kGeneric>(thread, address_of(thread, i), 1, i.at);
  thread.write(i.to[0], target.space == space);
}

Execute decode_is_space(Decoder& d) {
  const AddressSpace space = take_address_space(d);
  d.destination(Type::kPredicate);
  d.source(Type::kB64);
  switch (space) {
    case AddressSpace::kGlobal:
      return execute_is_space<AddressSpace::kGlobal>;
    case AddressSpace::kShared:
      return execute_is_space<AddressSpace::kShared>;
    case AddressSpace::kPrivate:
      return execute_is_space<AddressSpace::kPrivate>;
    default:
      return nullptr;
  }
}

// ---- hints

Execute decode_prefetch(Decoder& d) {
  const AddressSpace space = take_address_space(d);
  if (space != AddressSpace::kGeneric && space != AddressSpace::kGlobal && space != AddressSpace::kPrivate) return nullptr;
  d.require_one_of({"L1", "L2", "L2::evict_last", "L2::evict_normal"});
  d.address();
  return execute_nothing;
}

Execute decode_create_policy(Decoder& d) {
  d.require("fractional");
  d.require_one_of({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
  d.take_one_of({"L2::evict_first", "L2::evict_unchanged"});
  d.require("b64");
  d.destination(Type::kB64);
  if (d.operands_left() != 0) d.source(Type::kF32);
  d.result.from[0] = d.slot_of_number(0); // the policy itself: nothing looks at it
  return execute_same_address;
}

constexpr Opcode kOpcodes[] = {
    {"ld", decode_load},           {"ldu", decode_load},           {"st", decode_store},
    {"cp", decode_copy},           {"cvta", decode_cvta},          {"isspacep", decode_is_space},
    {"prefetch", decode_prefetch}, {"prefetchu", decode_prefetch}, {"createpolicy", decode_create_policy},
};

} // namespace

std::span<const Opcode> memory_opcodes() { return kOpcodes; }

} // namespace simt::ptx
