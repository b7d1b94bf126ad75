#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>

#include "address_sanitizer.h"
#include "memory_map.h"
#include "race_detector.h"

#ifdef SIMT_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, bytes) ((void)(p), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(p, bytes) ((void)(p), (void)(bytes))
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr size_t kSlotBytes = 4096; // an allocation takes a multiple of it, and begins kGuardBytes behind the start of its slot
constexpr size_t kSearchBytes = size_t{64} << 20;
constexpr int kGarbage = 0xee;

struct Allocation {
  size_t bytes;
  size_t slot_bytes;
  bool is_global;
};

// Which parts of the range are taken. A freed slot is not handed out again before the search has come around, so that a use after
// release is found as an access outside of every allocation; it comes around early, for what was used once keeps some memory.
struct Allocations {
  std::mutex mutex;
  std::map<size_t, Allocation> by_offset;
  std::map<size_t, size_t> free_slots; // offset -> bytes
  size_t search_from = 0;

  size_t take_slot(size_t bytes) {
    auto found = free_slots.end();
    for (auto slot = free_slots.lower_bound(search_from); slot != free_slots.end() && found == free_slots.end(); ++slot)
      if (slot->second >= bytes) found = slot;
    for (auto slot = free_slots.begin(); slot != free_slots.end() && found == free_slots.end(); ++slot)
      if (slot->second >= bytes) found = slot;
    if (found == free_slots.end()) throw std::bad_alloc();
    const auto [offset, free_bytes] = *found;
    free_slots.erase(found);
    if (free_bytes > bytes) free_slots.emplace(offset + bytes, free_bytes - bytes);
    search_from = offset + bytes < kSearchBytes ? offset + bytes : 0;
    return offset;
  }

  void give_slot_back(size_t offset, size_t bytes) {
    auto slot = free_slots.emplace(offset, bytes).first;
    const auto next = std::next(slot);
    if (next != free_slots.end() && slot->first + slot->second == next->first) {
      slot->second += next->second;
      free_slots.erase(next);
    }
    if (slot == free_slots.begin()) return;
    const auto previous = std::prev(slot);
    if (previous->first + previous->second == slot->first) {
      previous->second += slot->second;
      free_slots.erase(slot);
    }
  }
};

Allocations& allocations() {
  static Allocations* const all = [] {
    auto* made = new Allocations; // never destroyed: destructors of static objects may still release
    made->free_slots.emplace(0, MemoryMap::kBytes);
    return made;
  }();
  return *all;
}

} // namespace

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

void forget(void* p, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first >= last || madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED) != 0) {
    std::memset(p, 0, bytes);
    return;
  }
  std::memset(p, 0, first - begin);
  std::memset(reinterpret_cast<void*>(last), 0, end - last);
}

// ---- ByteBits

ByteBits::ByteBits(size_t bytes) : words_(static_cast<uint64_t*>(reserve(bytes / 8))) {}

bool ByteBits::all_set(size_t offset, size_t bytes) const {
  for (const size_t end = offset + bytes; offset < end;) {
    const size_t count = std::min(end - offset, 64 - (offset & 63));
    const uint64_t mask = (~uint64_t{0} >> (64 - count)) << (offset & 63);
    if ((word(offset >> 6) & mask) != mask) return false;
    offset += count;
  }
  return true;
}

void ByteBits::fill(size_t offset, size_t bytes, bool value) {
  for (const size_t end = offset + bytes; offset < end;) {
    const size_t count = std::min(end - offset, 64 - (offset & 63));
    const uint64_t mask = (~uint64_t{0} >> (64 - count)) << (offset & 63);
    uint64_t& bits = word(offset >> 6);
    bits = value ? bits | mask : bits & ~mask;
    offset += count;
  }
}

// ---- MemoryMap

MemoryMap& MemoryMap::instance() {
  static MemoryMap* const map = new MemoryMap;
  return *map;
}

MemoryMap::MemoryMap() : initialized(kBytes), base_(static_cast<std::byte*>(reserve(kBytes))) {}

std::byte* MemoryMap::allocate(size_t bytes, bool global) {
  if (bytes > kBytes) throw std::bad_alloc();
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const size_t slot_bytes = (kGuardBytes + bytes + kGuardBytes + kSlotBytes - 1) / kSlotBytes * kSlotBytes;
  const size_t slot = all.take_slot(slot_bytes), offset = slot + kGuardBytes;
  all.by_offset.emplace(offset, Allocation{bytes, slot_bytes, global});
  ASAN_POISON_MEMORY_REGION(at(slot), slot_bytes);
  ASAN_UNPOISON_MEMORY_REGION(at(offset), bytes);
  std::memset(at(offset), kGarbage, bytes);
  return at(offset);
}

void MemoryMap::release(void* p) {
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const auto found = all.by_offset.find(offset_of(p));
  if (found == all.by_offset.end()) throw std::invalid_argument("simt::release: the pointer is not the start of an allocation");
  const auto [offset, allocation] = *found;
  all.by_offset.erase(found);
  initialized.fill(offset, allocation.bytes, false);
  const size_t slot = offset - kGuardBytes;
  ASAN_UNPOISON_MEMORY_REGION(at(slot), allocation.slot_bytes);
  forget(at(slot), allocation.slot_bytes);
  RaceDetector::instance().release_range(slot, allocation.slot_bytes);
  ASAN_POISON_MEMORY_REGION(at(slot), allocation.slot_bytes);
  all.give_slot_back(slot, allocation.slot_bytes);
}

GlobalRange MemoryMap::global_range(const void* p) const {
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const size_t offset = offset_of(p);
  const auto next = all.by_offset.upper_bound(offset);
  if (offset >= kBytes || next == all.by_offset.begin()) return {};
  const auto& [begin, allocation] = *std::prev(next);
  const GlobalRange range{begin, allocation.bytes};
  return allocation.is_global && range.holds(offset, 1) ? range : GlobalRange{};
}

void MemoryMap::mark_initialized(const void* p, size_t bytes) {
  if (bytes == 0) return;
  if (!global_range(p).holds(offset_of(p), bytes))
    throw std::invalid_argument("simt::mark_initialized: the range is not inside an allocation");
  initialized.fill(offset_of(p), bytes, true);
}

std::string MemoryMap::describe(const void* p) {
  Allocations& all = allocations();
  const std::lock_guard lock(all.mutex);
  const size_t offset = offset_of(p);
  if (offset >= kBytes) return "memory that simt::allocate did not give out";
  const auto distance = [&](const auto& entry) {
    const auto& [begin, allocation] = entry;
    if (offset < begin) return begin - offset;
    return offset < begin + allocation.bytes ? size_t{0} : offset - (begin + allocation.bytes) + 1;
  };
  auto nearest = all.by_offset.end();
  const auto next = all.by_offset.upper_bound(offset);
  if (next != all.by_offset.end()) nearest = next;
  if (next != all.by_offset.begin() && (nearest == all.by_offset.end() || distance(*std::prev(next)) <= distance(*nearest)))
    nearest = std::prev(next);
  if (nearest == all.by_offset.end()) return "released memory; nothing is allocated";
  const auto& [begin, allocation] = *nearest;
  const auto position = static_cast<int64_t>(offset) - static_cast<int64_t>(begin);
  const std::string whose = allocation.is_global ? "the allocation of " : "shared memory of ";
  const std::string where = "offset " + std::to_string(position) + " of " + whose + std::to_string(allocation.bytes) + " bytes";
  return offset >= begin && position < static_cast<int64_t>(allocation.bytes) ? where : where + ", the nearest";
}

// ---- the interface

void* allocate(size_t bytes, bool initialized) {
  MemoryMap& map = MemoryMap::instance();
  void* p = map.allocate(bytes, true);
  if (initialized) map.mark_initialized(p, bytes);
  return p;
}

void release(void* p) {
  if (p != nullptr) MemoryMap::instance().release(p);
}

bool is_allocated(const void* p, size_t bytes) {
  const MemoryMap& map = MemoryMap::instance();
  return map.global_range(p).holds(map.offset_of(p), bytes);
}

void mark_initialized(const void* p, size_t bytes) { MemoryMap::instance().mark_initialized(p, bytes); }

} // namespace simt
