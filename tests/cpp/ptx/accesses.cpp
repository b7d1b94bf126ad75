// What a thread does to memory: is it allowed to, is it ordered, how much is it.
#include <string>

#include "memory_map.h"
#include "race_detector.h"
#include "scheduler.h"

namespace simt {
namespace {

constexpr int64_t kPlainCost = 1;
constexpr int64_t kAtomicCost = 256; // a thread that spins must let others run soon
constexpr uint32_t kFuzzPlainOneIn = 32, kFuzzAtomicOneIn = 4;

bool is_vector_size(size_t bytes) { return bytes <= 32 && (bytes & (bytes - 1)) == 0; }

std::string show(const char* what, size_t bytes, const void* p) {
  return std::string(what) + " of " + std::to_string(bytes) + " bytes at " + MemoryMap::instance().describe(p);
}

const char* name_of(AccessKind kind) {
  switch (kind) {
    case AccessKind::kPlainRead:
      return "read";
    case AccessKind::kPlainWrite:
      return "write";
    case AccessKind::kAtomicRead:
      return "atomic read";
    default:
      return "atomic write";
  }
}

} // namespace

Scheduler::Target Scheduler::find_target(const void* p, size_t bytes, const char* what, Space space, uint32_t site, const Location& at) {
  if (is_vector_size(bytes) && (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) != 0)
    fail(FailureKind::kMisaligned, show(what, bytes, p), at);
  MemoryMap& map = MemoryMap::instance();
  const size_t offset = map.offset_of(p);
  if (space == Space::kShared) {
    const auto position = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(current_thread()->shared);
    if (position < shared_bytes_ && bytes <= shared_bytes_ - position) return {true, offset};
    const auto distance = static_cast<int64_t>(position);
    fail(FailureKind::kOutOfBounds,
         std::string(what) + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(distance) + " of the block's " +
             std::to_string(shared_bytes_) + " bytes of shared memory",
         at);
  }
  if (offset >= MemoryMap::kBytes) {
    if (options_.foreign_memory) return {};
  } else {
    if (site >= range_of_site_.size()) range_of_site_.resize(site + 1);
    GlobalRange& range = range_of_site_[site];
    if (!range.holds(offset, bytes)) range = map.global_range(p);
    if (range.holds(offset, bytes)) return {true, offset};
  }
  fail(FailureKind::kOutOfBounds, show(what, bytes, p), at);
}

void Scheduler::check_initialized(const Target& target, size_t bytes, bool reads, bool writes, const char* what, const void* p,
                                  const Location& at) {
  ByteBits& initialized = MemoryMap::instance().initialized;
  if (is_vector_size(bytes)) {
    if (reads && !initialized.all_set_aligned(target.offset, bytes)) fail(FailureKind::kUninitialized, show(what, bytes, p), at);
    if (writes) initialized.set_aligned(target.offset, bytes);
  } else {
    if (reads && !initialized.all_set(target.offset, bytes)) fail(FailureKind::kUninitialized, show(what, bytes, p), at);
    if (writes) initialized.fill(target.offset, bytes, true);
  }
}

void Scheduler::count_access(const void* p, size_t bytes, bool reads, bool writes, uint32_t site) {
  ++counters_.global_accesses;
  counters_.accesses_of_16_bytes += bytes == 16 ? 1 : 0;
  const bool is_atomic = reads && writes;
  WarpRequests::Added added{0, bytes};
  if (options_.count_sectors) {
    const ThreadState& thread = *current_thread();
    added = thread.block->warps[thread.warp].requests.add(site, thread.lane, reinterpret_cast<uintptr_t>(p), bytes);
    counters_.sectors_read += reads ? added.sectors : 0;
    counters_.sectors_written += writes ? added.sectors : 0;
  }
  counters_.global_bytes_read += reads ? (is_atomic ? bytes : added.bytes) : 0;
  counters_.global_bytes_written += writes ? bytes : 0; // also to one address: all of them have to be done
}

void Scheduler::plain_access(const void* p, size_t bytes, bool is_write, Space space, const Location& at) {
  enter(kPlainCost, kFuzzPlainOneIn, at);
  if (bytes == 0) return;
  if (is_write) made_progress();
  ThreadState* const thread = current_thread();
  const char* const what = is_write ? "write" : "read";
  const uint32_t site = sites_.number_of(at);
  const Target target = find_target(p, bytes, what, space, site, at);
  if (space == Space::kGlobal) {
    if (options_.count_sectors && thread->block->warps[thread->warp].requests.is_far_ahead(site, thread->lane)) let_others_run();
    count_access(p, bytes, !is_write, is_write, site);
  }
  if (!target.is_known) return;
  check_initialized(target, bytes, !is_write, is_write, what, p, at);
  if (!options_.detect_races) return;
  if (const Conflict* conflict = RaceDetector::instance().plain(thread->clock, target.offset, bytes, is_write, site))
    fail_race(conflict, what, bytes, at);
}

void Scheduler::atomic_access(const void* p, size_t bytes, bool reads, bool writes, bool returns, Order order, Space space,
                              const Location& at) {
  enter(kAtomicCost, kFuzzAtomicOneIn, at);
  if (writes)
    made_progress();
  else
    was_idle(at);
  const char* const what = writes ? (reads ? "atomic read-modify-write" : "atomic write") : "atomic read";
  const uint32_t site = sites_.number_of(at);
  const Target target = find_target(p, bytes, what, space, site, at);
  if (space == Space::kGlobal) {
    ++counters_.global_atomics;
    count_access(p, bytes, returns, writes, site);
  }
  if (!target.is_known) return;
  check_initialized(target, bytes, reads, writes, what, p, at);
  if (!options_.detect_races) return;
  const AtomicOrder atomic_order{.reads = reads,
                                 .writes = writes,
                                 .returns = returns,
                                 .acquires = order == Order::kAcquire || order == Order::kAcquireRelease,
                                 .releases = order == Order::kRelease || order == Order::kAcquireRelease};
  if (const Conflict* conflict = RaceDetector::instance().atomic(current_thread()->clock, target.offset, bytes, atomic_order, site))
    fail_race(conflict, what, bytes, at);
}

void Scheduler::fence(bool block_only, const Location& at) {
  enter(kAtomicCost, kFuzzAtomicOneIn, at);
  ++counters_.fences;
  if (options_.detect_races) RaceDetector::instance().fence(current_thread()->clock, block_only);
}

void Scheduler::fail_race(const Conflict* conflict, const char* what, size_t bytes, const Location& at) {
  const MemoryMap& map = MemoryMap::instance();
  fail(FailureKind::kDataRace,
       std::string(what) + " of " + std::to_string(bytes) + " bytes is not ordered with the " + name_of(conflict->kind) + " at " +
           simt::show(sites_[conflict->site]) + " by " + describe(conflict->block, conflict->thread) + "; both touch " +
           MemoryMap::instance().describe(map.at(conflict->offset)),
       at);
}

} // namespace simt
