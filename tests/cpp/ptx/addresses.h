// From the address operand of an instruction to a host pointer.
//
// Generic addresses are host addresses. Shared memory has its own addresses, which begin at 0 in each block; its generic address is
// where the block's shared memory lies in the host. Parameters and local memory lie in the thread's private memory, which no other
// thread may touch and the race detector need not see.
#pragma once

#include <string>

#include "code.h"
#include "decoder.h"

namespace simt::ptx {

enum class AddressSpace : uint8_t { kGeneric, kGlobal, kShared, kConst, kPrivate };

// {.global, .shared, .local, .param, .const} with their sub-qualifiers; generic without one.
AddressSpace take_address_space(Decoder& d);

// Fails to decode if a load or store at a named local variable or parameter leaves it.
void check_extent(Decoder& d, const Operand& address, size_t bytes);

// Where the address operand of `i` points to, and whether others can see it.
struct Target {
  std::byte* p;
  AddressSpace space; // kGlobal, kShared, kConst or kPrivate
};

[[noreturn]] void fail_misaligned(const std::byte* p, size_t bytes, const Location& at);
[[noreturn]] void fail_private(const std::byte* p, size_t bytes, const Location& at);
void check_const(const std::byte* p, size_t bytes, const Location& at);

inline uint64_t address_of(const PtxThread& thread, const Instruction& i, size_t operand = 0, int64_t displacement = 0) {
  const uint64_t address = thread.slots[i.from[operand]] + static_cast<uint64_t>(displacement);
  return i.narrow_address && operand == 0 ? address & 0xffffffff : address; // 32-bit addresses wrap around
}

// `bytes`: a power of two, to which the address must be aligned.
template <AddressSpace space>
Target locate(const PtxThread& thread, uint64_t address, size_t bytes, const Location& at) {
  if ((address & (bytes - 1)) != 0) [[unlikely]]
    fail_misaligned(reinterpret_cast<std::byte*>(address), bytes, at);
  if constexpr (space == AddressSpace::kShared) {
    return {thread.shared + address, AddressSpace::kShared}; // the scheduler checks the range
  } else {
    auto* const p = reinterpret_cast<std::byte*>(address);
    if constexpr (space == AddressSpace::kConst) {
      check_const(p, bytes, at);
    } else if constexpr (space == AddressSpace::kPrivate) {
      if (p < thread.private_begin || p + bytes > thread.private_end) fail_private(p, bytes, at);
    } else if constexpr (space == AddressSpace::kGeneric) {
      if (static_cast<size_t>(p - thread.shared) < thread.shared_bytes) return {p, AddressSpace::kShared};
      if (p >= thread.private_begin && p < thread.private_end) {
        if (p + bytes > thread.private_end) fail_private(p, bytes, at);
        return {p, AddressSpace::kPrivate};
      }
      return {p, AddressSpace::kGlobal};
    }
    return {p, space};
  }
}

inline Space detector_space(AddressSpace space) { return space == AddressSpace::kShared ? Space::kShared : Space::kGlobal; }

} // namespace simt::ptx
