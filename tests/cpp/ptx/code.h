// Functions made ready to run: every operand is the number of a slot, every instruction the address of what executes it.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"

namespace simt::ptx {

struct Instruction;
struct PtxThread;
using Execute = void (*)(PtxThread&, const Instruction&);

// A function's slots are 64-bit words: two of fixed meaning, then registers, one each but for .b128, which takes two, then constants
// (numbers, addresses, special registers), which its first instruction finds filled in. A slot holds its value in the low bits and anything
// above: whoever reads takes as many as the type has. Predicates hold 0 or 1.
using Slot = uint32_t;
inline constexpr Slot kSink = 0; // written, never read
inline constexpr Slot kTrue = 1;

struct Instruction {
  Execute execute = nullptr;
  Slot guard = kTrue; // executed if this predicate differs from guard_negated
  bool guard_negated = false;
  bool negated_predicate = false; // the one predicate among the sources has a ! before it
  bool narrow_address = false;    // the address in from[0] has 32 bits
  uint8_t mode = 0;               // what the instruction likes to keep: rounding, comparison, ...
  uint8_t count = 0;              // of vector elements
  Slot to[4] = {};
  Slot from[6] = {};
  int64_t displacement = 0; // of the address in from[0]
  uint32_t target = 0;      // of a branch: an instruction; of a call: a CallSite; of brx.idx: a table
  Location at;
};

struct FrameRange { // of a parameter or local variable, from the start of the function's variables
  uint64_t offset = 0, bytes = 0;
};

struct CallSite {
  static constexpr uint32_t kNone = ~uint32_t{0}; // a function that the interpreter itself provides
  uint32_t callee = kNone;                        // in the program's functions
  std::vector<FrameRange> arguments, results;
};

enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kZero, // of which there is but one here: %smid, %gridid, %cluster_ctarank
  kOne,  // %nsmid, %cluster_nctarank
  kTotalSharedBytes,
  kDynamicSharedBytes,
  kClock, // changes while the thread runs: only mov reads it
};

struct Code {
  struct SpecialSlot {
    Slot slot;
    Special special;
  };
  struct VariableSlot { // the address of a parameter or local variable
    Slot slot;
    uint64_t offset;
  };
  struct SharedSlot { // the address of a shared variable: each kernel places them anew
    Slot slot;
    uint32_t shared_variable; // in the program's list
    int64_t displacement;
  };

  std::string name;
  bool is_kernel = false, is_defined = false;
  uint64_t max_threads = 0;
  std::vector<Instruction> instructions;
  std::vector<uint64_t> constants; // the last slots of a frame
  std::vector<SpecialSlot> special_slots;
  std::vector<VariableSlot> variable_slots;
  std::vector<SharedSlot> shared_slots;
  Slot slots = 0;
  Slot first_constant() const { return slots - static_cast<Slot>(constants.size()); }
  uint64_t variables_bytes = 0;
  std::vector<FrameRange> parameters, results;
  std::vector<CallSite> calls;
  std::vector<std::vector<uint32_t>> tables; // of brx.idx: instructions

  uint64_t frame_bytes() const;
};

// A call that has not returned. Lies at the start of the function's frame in the thread's private memory:
// header, slots, parameters and local variables.
struct Frame {
  Frame* caller;
  const Code* code;
  const CallSite* site; // where the caller wants the results
  const Instruction* return_to;
  std::byte* variables() { return reinterpret_cast<std::byte*>(this) + kHeaderBytes + (code->slots + 1) / 2 * 16; }
  uint64_t* slots() { return reinterpret_cast<uint64_t*>(reinterpret_cast<std::byte*>(this) + kHeaderBytes); }
  std::byte* bytes_of_slots() { return reinterpret_cast<std::byte*>(slots()); }
  std::byte* end() { return variables() + (code->variables_bytes + 15) / 16 * 16; }

  static constexpr size_t kHeaderBytes = 48;
  static constexpr std::byte kGarbage{0xee}; // what registers and local memory hold before they are written
};
static_assert(sizeof(Frame) <= Frame::kHeaderBytes);

inline uint64_t Code::frame_bytes() const { return Frame::kHeaderBytes + (slots + 1) / 2 * 16 + (variables_bytes + 15) / 16 * 16; }

class LaunchState;

// One running CUDA thread.
struct PtxThread {
  uint64_t* slots = nullptr;         // of the running function
  const Instruction* next = nullptr; // nullptr: the thread has left
  const Instruction* instructions = nullptr;
  Thread* thread = nullptr;
  std::byte* shared = nullptr;
  size_t shared_bytes = 0;
  std::byte *private_begin = nullptr, *private_end = nullptr; // frames: parameters and local memory are in there
  Frame* frame = nullptr;
  const LaunchState* launch = nullptr;
  bool carry = false; // CC.CF

  template <typename T>
  T read(Slot slot) const {
    T value;
    std::memcpy(&value, &slots[slot], sizeof value); // little-endian: the low bits
    return value;
  }
  bool predicate(Slot slot) const { return slots[slot] != 0; }
  // Integers narrower than the register are extended to it as their type says.
  template <typename T>
  void write(Slot slot, T value) {
    if constexpr (std::is_floating_point_v<T>) {
      if constexpr (sizeof(T) == 4)
        slots[slot] = std::bit_cast<uint32_t>(value);
      else
        slots[slot] = std::bit_cast<uint64_t>(value);
    } else {
      slots[slot] = static_cast<uint64_t>(static_cast<int64_t>(value));
    }
  }
};

static_assert(std::endian::native == std::endian::little);

} // namespace simt::ptx
