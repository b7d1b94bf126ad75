// Runs a grid of CUDA threads on one CPU thread: one fiber per CUDA thread, in an order fixed by a seed.
//
// The interpreter (interpreter.h) executes one thread's instructions and tells this scheduler of everything that other threads can
// see: memory accesses, atomics, fences, barriers, warp collectives. From these the race detector (race_detector.h) decides by the
// happens-before rules of the PTX memory model whether the program is right, not only whether this interleaving gave the right
// result, and the counters (counters.h) add up bytes and 32-byte sectors.
//
// Every mistake ends the launch with a Failure; none is only printed. The process goes on: what a failed launch left behind is freed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace simt {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// Where in the program: for reports and for telling accesses of one warp instruction from those of another.
struct Location {
  const char* file = "?"; // source file of the kernel, as .loc and .file say; lives as long as the module
  uint32_t line = 0;
  uint32_t pc = 0; // index of the instruction in the module, unique
};

enum class FailureKind : uint8_t {
  kDataRace,
  kOutOfBounds,   // global memory that nobody allocated, or beyond the block's shared memory
  kUninitialized, // read of shared memory that nobody wrote, or of global memory allocated as uninitialised
  kMisaligned,
  kWrongMask,   // a lane executes a collective without being in its mask, lanes disagree about the mask, or a lane of it has left
  kBarrier,     // threads of a block wait at different barriers, or some left while others wait at one that counts them
  kHang,        // all threads spin or wait, or a launch executes more instructions than its budget
  kTrap,        // trap, device assert
  kUnsupported, // an instruction, directive or modifier that the interpreter does not know: the text is in the message
};

const char* name_of(FailureKind kind);

class Failure : public std::runtime_error {
 public:
  Failure(FailureKind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
  FailureKind kind;
};

enum class BlockOrder : uint8_t { kAscending, kDescending, kRandom };

struct LaunchOptions {
  uint64_t seed = 1;
  BlockOrder block_order = BlockOrder::kAscending;
  uint32_t blocks_in_flight = 8; // at most so many blocks hold fibers at a time, as an SM array would
  bool fuzz = false;             // switch threads at random at every atomic, fence, barrier and a share of plain accesses
  bool detect_races = true;
  bool count_sectors = true;
  bool foreign_memory =
      false; // allow global memory that memory.h does not know (then neither bounds, races nor initialisation are checked there)
  uint64_t instruction_budget = uint64_t{4} << 30;
};

// The options of launches that name none: those of the environment (SIMT_SEED, SIMT_ORDER = ascending | descending | random,
// SIMT_FUZZ = 0 | 1) over the defaults above, until a test replaces them.
LaunchOptions& default_options();

// The running thread; only valid inside the body of a launch.
struct Thread {
  Dim3 thread_index, block_index, block_dim, grid_dim;
  uint32_t linear_in_block = 0; // x fastest
  uint32_t lane = 0, warp = 0;  // warp: in the block
  uint64_t block_linear = 0;
  std::byte* shared = nullptr; // the block's shared memory
  size_t shared_bytes = 0;
  uint64_t instructions = 0; // executed so far; the interpreter counts, the scheduler compares with the budget when it is told of anything
};
Thread& self();
bool running(); // inside a launch?

// Runs `body` once per thread; returns when all have. `shared_bytes` static and dynamic together, uninitialised at the start.
// Launches are ordered: everything a launch did happens before everything of the next.
void launch(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body,
            const LaunchOptions& options = default_options());

// ---- what the interpreter tells; all of these may switch to another thread, and throw Failure

enum class Space : uint8_t { kGlobal, kShared }; // of generic addresses the interpreter finds out which
enum class Order : uint8_t { kRelaxed, kAcquire, kRelease, kAcquireRelease };

// A plain (weak) load or store of `bytes` at p, before it is done.
void plain_access(const void* p, size_t bytes, bool is_write, Space space, const Location& at);
// A strong load, store or read-modify-write (relaxed, volatile, acquire, release, atom, red).
void atomic_access(const void* p, size_t bytes, bool reads, bool writes, Order order, Space space, const Location& at);
// A reduction (red): a read-modify-write whose result nobody gets. It counts as written, and it cannot acquire, but unlike a store it
// continues a release sequence.
void reduction_access(const void* p, size_t bytes, Order order, Space space, const Location& at);
// fence.acq_rel / fence.sc / membar, of gpu or system scope or wider than a block (`block_only` = .cta scope).
void fence(bool block_only, const Location& at);
// bar.sync id, count (count 0 = the whole block). Returns when all have arrived.
void barrier(uint32_t id, uint32_t count, const Location& at);
// bar.red: as barrier; returns how many of the threads passed `predicate`.
uint32_t barrier_reduce(uint32_t id, uint32_t count, bool predicate, const Location& at);
// __nanosleep, or nothing left to do but look again: lets others run; kHang if nobody makes progress.
void yield(const Location& at);

// Warp collectives wait until all lanes of `mask` have arrived at a collective of the same kind.
enum class Collective : uint8_t {
  kSyncWarp,
  kBallot,
  kShuffle,
  kReduceAdd,
  kReduceMin,
  kReduceMax,
  kReduceMinSigned,
  kReduceMaxSigned,
  kReduceAnd,
  kReduceOr,
  kReduceXor,
  kMatchAny
};
// kBallot: value != 0 votes. kShuffle: `source_lane` names whose value is returned; a source that is not in the mask is kWrongMask.
// kMatchAny: the lanes of the mask with an equal value. Only kSyncWarp orders memory between the lanes.
uint64_t collective(Collective kind, uint32_t mask, uint64_t value, uint32_t source_lane, const Location& at);

[[noreturn]] void fail(FailureKind kind, const std::string& message, const Location& at);

} // namespace simt
