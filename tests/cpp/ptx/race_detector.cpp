#include "race_detector.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "lanes.h"
#include "memory_map.h"

namespace simt {

RaceDetector& RaceDetector::instance() {
  static RaceDetector* const detector = new RaceDetector;
  return *detector;
}

RaceDetector::RaceDetector() : cells_(static_cast<Cell*>(reserve(MemoryMap::kBytes / 4 * sizeof(Cell)))) {}

void RaceDetector::begin_launch(uint32_t num_blocks) {
  if (num_blocks > kMaxBlock - next_block_) { // numbers begin again: nothing may remember the old ones
    simt::forget(cells_, MemoryMap::kBytes / 4 * sizeof(Cell));
    next_block_ = 1;
    if (num_blocks > kMaxBlock - next_block_) throw std::invalid_argument("the race detector can tell 2^30 - 2 blocks apart, no more");
  }
  first_block_ = next_block_;
  next_block_ += num_blocks;
  first_epoch_ = Epoch{first_block_} << 34;
}

void RaceDetector::end_launch() {
  for (Detail& detail : details_)
    if (detail.cell != nullptr) *detail.cell = Cell{};
  details_.clear();
  free_details_.clear();
  released_.clear();
  first_epoch_ = Epoch{next_block_} << 34;
}

ThreadClock RaceDetector::thread_clock(uint32_t block, uint32_t thread) const {
  ThreadClock clock;
  clock.block = first_block_ + block;
  clock.thread = thread;
  return clock;
}

void RaceDetector::restart_range(size_t offset, size_t bytes) {
  Cell* const begin = cells_ + offset / 4;
  Cell* const end = cells_ + (offset + bytes + 3) / 4;
  for (Cell* cell = begin; cell != end; ++cell)
    if (cell->detail != 0) drop(details_[cell->detail - 1]);
  std::fill(begin, end, Cell{});
  released_.erase(released_.lower_bound(offset), released_.lower_bound(offset + bytes));
}

void RaceDetector::release_range(size_t offset, size_t bytes) { simt::forget(cells_ + offset / 4, bytes / 4 * sizeof(Cell)); }

RaceDetector::Epoch RaceDetector::epoch(const ThreadClock& thread) {
  if (thread.now > 0xffffff) throw std::length_error("the race detector can tell 2^24 - 1 ticks of a block apart, no more");
  return Epoch{thread.block} << 34 | Epoch{thread.thread} << 24 | thread.now;
}

const Conflict* RaceDetector::conflict(const Cell& cell, uint8_t bytes, AccessKind kind, Epoch e, uint32_t site) {
  conflict_.offset = static_cast<size_t>(&cell - cells_) * 4 + lowest_lane(bytes);
  conflict_.kind = kind;
  conflict_.block = static_cast<uint32_t>(e >> 34) - first_block_;
  conflict_.thread = static_cast<uint32_t>(e >> 24 & 1023);
  conflict_.site = site;
  return &conflict_;
}

// ---- plain accesses to words without a Detail
//
// Of the reads only the last needs to be kept if it knew the one before: who must come after the last comes after both. Of the
// writes only the last needs to be kept because two that are not ordered are a race at once.

const Conflict* RaceDetector::read_word(const ThreadClock& thread, Cell& cell, uint8_t bytes, uint32_t site) {
  if (cell.detail != 0) return read_detail(thread, details_[cell.detail - 1], bytes, site);
  const Epoch me = epoch(thread);
  if (cell.write != me && (cell.write_bytes & bytes) != 0 && !may_follow(thread, cell.write))
    return conflict(cell, cell.write_bytes & bytes, AccessKind::kPlainWrite, cell.write, cell.write_site);
  if (cell.read == me) {
    cell.read_bytes |= bytes;
  } else if (!alive(cell.read) || ((cell.read_bytes & ~bytes) == 0 && knows(thread, cell.read))) {
    cell.read = me;
    cell.read_bytes = bytes;
    cell.read_site = site;
  } else {
    return read_detail(thread, detail_of(cell), bytes, site);
  }
  return nullptr;
}

const Conflict* RaceDetector::write_word(const ThreadClock& thread, Cell& cell, uint8_t bytes, uint32_t site) {
  if (cell.detail != 0) return write_detail(thread, details_[cell.detail - 1], bytes, site);
  const Epoch me = epoch(thread);
  const bool write_lives = alive(cell.write);
  if (cell.write != me && write_lives) {
    if ((cell.write_bytes & bytes) != 0 && !knows(thread, cell.write))
      return conflict(cell, cell.write_bytes & bytes, AccessKind::kPlainWrite, cell.write, cell.write_site);
    if ((cell.write_bytes & ~bytes) != 0) return write_detail(thread, detail_of(cell), bytes, site);
  }
  if ((cell.read_bytes & bytes) != 0 && !may_follow(thread, cell.read))
    return conflict(cell, cell.read_bytes & bytes, AccessKind::kPlainRead, cell.read, cell.read_site);
  cell.read_bytes &= static_cast<uint8_t>(~bytes);
  if (cell.read_bytes == 0) cell.read = 0;
  cell.write_bytes = cell.write == me ? cell.write_bytes | bytes : bytes;
  cell.write = me;
  cell.write_site = site;
  return nullptr;
}

const Conflict* RaceDetector::plain_bytes(const ThreadClock& thread, size_t offset, size_t bytes, bool is_write, uint32_t site) {
  for (const size_t end = offset + bytes; offset < end;) {
    const size_t first = offset & 3, last = std::min<size_t>(4, first + end - offset);
    const auto mask = static_cast<uint8_t>((1u << last) - (1u << first));
    Cell& cell = cells_[offset / 4];
    if (const Conflict* found = is_write ? write_word(thread, cell, mask, site) : read_word(thread, cell, mask, site)) return found;
    offset += last - first;
  }
  return nullptr;
}

// ---- words with a Detail

RaceDetector::Detail& RaceDetector::detail_of(Cell& cell) {
  if (cell.detail != 0) return details_[cell.detail - 1];
  if (free_details_.empty()) {
    details_.emplace_back();
    free_details_.push_back(static_cast<uint32_t>(details_.size() - 1));
  }
  const uint32_t index = free_details_.back();
  free_details_.pop_back();
  Detail& detail = details_[index];
  detail.cell = &cell;
  for (unsigned i = 0; i < 4; ++i) {
    const bool written = alive(cell.write) && (cell.write_bytes >> i & 1) != 0;
    detail.write[i] = written ? cell.write : 0;
    detail.write_site[i] = cell.write_site;
  }
  if (alive(cell.read) && cell.read_bytes != 0) {
    const auto thread = static_cast<uint32_t>(cell.read >> 24 & 1023);
    detail.plain_reads.list.push_back({static_cast<uint32_t>(cell.read >> 34), thread / 32, 1u << (thread % 32), cell.read_site,
                                       static_cast<Tick>(cell.read & 0xffffff), cell.read_bytes});
  }
  cell.detail = index + 1;
  return detail;
}

void RaceDetector::drop(Detail& detail) {
  const uint32_t index = detail.cell->detail - 1;
  detail.cell->detail = 0;
  detail.cell = nullptr;
  for (Records* records : {&detail.plain_reads, &detail.atomic_reads, &detail.atomic_writes}) {
    records->list.clear();
    records->tidy_at = kTidy;
  }
  free_details_.push_back(index);
}

const Conflict* RaceDetector::check_writes(const ThreadClock& thread, const Detail& detail, uint8_t bytes) {
  for (unsigned i = 0; i < 4; ++i)
    if ((bytes >> i & 1) != 0 && !may_follow(thread, detail.write[i]))
      return conflict(*detail.cell, static_cast<uint8_t>(1u << i), AccessKind::kPlainWrite, detail.write[i], detail.write_site[i]);
  return nullptr;
}

const Conflict* RaceDetector::check(const ThreadClock& thread, const Detail& detail, const Records& records, uint8_t bytes,
                                    AccessKind kind) {
  for (const Record& record : records.list) {
    if ((record.bytes & bytes) == 0 || (record.block == thread.block && record.tick <= thread.floor)) continue;
    for (uint32_t lanes = record.lanes; lanes != 0; lanes &= lanes - 1) {
      const uint32_t other = record.warp * 32 + lowest_lane(lanes);
      if (thread.knows(record.block, other, record.tick)) continue;
      const Epoch e = Epoch{record.block} << 34 | Epoch{other} << 24 | record.tick;
      return conflict(*detail.cell, record.bytes & bytes, kind, e, record.site);
    }
  }
  return nullptr;
}

// Lanes of a warp mostly do the same at the same tick, so that one record serves them all. Looking at the latest ones is enough to find
// it; what is recorded twice goes when the list is tidied.
void RaceDetector::add(const ThreadClock& thread, Records& records, uint8_t bytes, uint32_t site) {
  constexpr size_t kLatest = 48;
  const size_t size = records.list.size();
  for (size_t i = size; i > 0 && i + kLatest > size; --i) {
    Record& record = records.list[i - 1];
    if (record.block != thread.block || record.warp != thread.warp() || record.tick != thread.now || record.bytes != bytes ||
        record.site != site)
      continue;
    record.lanes |= thread.lane_bit();
    return;
  }
  if (size >= records.tidy_at) tidy(records);
  records.list.push_back({thread.block, thread.warp(), thread.lane_bit(), site, thread.now, bytes});
}

void RaceDetector::tidy(Records& records) {
  auto& list = records.list;
  const auto key = [](const Record& r) { return std::tuple(r.bytes, r.block, r.warp, r.tick, r.site); };
  std::sort(list.begin(), list.end(), [&](const Record& a, const Record& b) { return key(a) < key(b); });
  size_t kept = 0;
  for (const Record& record : list) {
    if (kept > 0 && key(list[kept - 1]) == key(record))
      list[kept - 1].lanes |= record.lanes;
    else
      list[kept++] = record;
  }
  list.resize(kept);
  // The latest record of a lane covers its earlier ones.
  for (size_t i = 0; i + 1 < list.size(); ++i) {
    for (size_t j = i + 1;
         j < list.size() && list[j].bytes == list[i].bytes && list[j].block == list[i].block && list[j].warp == list[i].warp; ++j)
      list[i].lanes &= ~list[j].lanes;
  }
  std::erase_if(list, [](const Record& record) { return record.lanes == 0; });
  records.tidy_at = std::max(kTidy, 2 * list.size());
}

const Conflict* RaceDetector::read_detail(const ThreadClock& thread, Detail& detail, uint8_t bytes, uint32_t site) {
  if (const Conflict* found = check_writes(thread, detail, bytes)) return found;
  if (const Conflict* found = check(thread, detail, detail.atomic_writes, bytes, AccessKind::kAtomicWrite)) return found;
  add(thread, detail.plain_reads, bytes, site);
  return nullptr;
}

const Conflict* RaceDetector::write_detail(const ThreadClock& thread, Detail& detail, uint8_t bytes, uint32_t site) {
  if (const Conflict* found = check_writes(thread, detail, bytes)) return found;
  if (const Conflict* found = check(thread, detail, detail.plain_reads, bytes, AccessKind::kPlainRead)) return found;
  if (const Conflict* found = check(thread, detail, detail.atomic_reads, bytes, AccessKind::kAtomicRead)) return found;
  if (const Conflict* found = check(thread, detail, detail.atomic_writes, bytes, AccessKind::kAtomicWrite)) return found;
  Cell& cell = *detail.cell;
  const Epoch me = epoch(thread);
  if (bytes == 0xf) { // it comes after everything that was known: nothing else needs to be remembered
    drop(detail);
    cell = Cell{};
    cell.write = me;
    cell.write_site = site;
    cell.write_bytes = bytes;
    return nullptr;
  }
  for (unsigned i = 0; i < 4; ++i) {
    if ((bytes >> i & 1) == 0) continue;
    detail.write[i] = me;
    detail.write_site[i] = site;
  }
  for (Records* records : {&detail.plain_reads, &detail.atomic_reads, &detail.atomic_writes}) {
    for (Record& record : records->list) record.bytes &= static_cast<uint8_t>(~bytes);
    std::erase_if(records->list, [](const Record& record) { return record.bytes == 0; });
  }
  return nullptr;
}

// ---- atomics and fences

const Conflict* RaceDetector::atomic_word(const ThreadClock& thread, Cell& cell, uint8_t bytes, const AtomicOrder& order, uint32_t site) {
  Detail& detail = detail_of(cell);
  if (const Conflict* found = check_writes(thread, detail, bytes)) return found;
  if (order.writes && !detail.plain_reads.list.empty())
    if (const Conflict* found = check(thread, detail, detail.plain_reads, bytes, AccessKind::kPlainRead)) return found;
  // What conflicts with the read of a read-modify-write conflicts with its write too.
  add(thread, order.writes ? detail.atomic_writes : detail.atomic_reads, bytes, site);
  return nullptr;
}

const Conflict* RaceDetector::atomic(ThreadClock& thread, size_t offset, size_t bytes, const AtomicOrder& order, uint32_t site) {
  if (order.returns && !released_.empty()) {
    const auto released = released_.find(offset);
    // Accesses of different sizes to one place are not morally strong: they synchronise nothing.
    if (released != released_.end() && released->second.bytes == bytes) acquire(thread, released->second, order.acquires);
  }
  for (size_t at = offset, end = offset + bytes; at < end;) {
    const size_t first = at & 3, last = std::min<size_t>(4, first + end - at);
    const auto mask = static_cast<uint8_t>((1u << last) - (1u << first));
    if (const Conflict* found = atomic_word(thread, cells_[at / 4], mask, order, site)) return found;
    at += last - first;
  }
  if (order.writes) release(thread, offset, bytes, order);
  return nullptr;
}

void RaceDetector::acquire(ThreadClock& thread, const Released& released, bool now) {
  Ref<GridClock> in_block;
  for (const auto& [block, clock] : released.in_block)
    if (block == thread.block) in_block = clock;
  if (now) {
    thread.acquire(released.everyone);
    thread.acquire(in_block);
  } else {
    join(thread.pending, released.everyone);
    join(thread.pending_in_block, in_block);
  }
}

void RaceDetector::release(ThreadClock& thread, size_t offset, size_t bytes, const AtomicOrder& order) {
  Ref<GridClock> everyone = thread.released, in_block = thread.released_in_block;
  if (order.releases) everyone = in_block = thread.release();
  // Whatever overlaps is overwritten: a write that is not a read-modify-write of the same bytes ends the release sequence.
  if (!released_.empty()) {
    auto overlap = released_.lower_bound(offset >= 15 ? offset - 15 : 0);
    while (overlap != released_.end() && overlap->first < offset + bytes) {
      const bool goes_on = order.reads && overlap->first == offset && overlap->second.bytes == bytes;
      const bool overlaps = overlap->first + overlap->second.bytes > offset;
      overlap = overlaps && !goes_on ? released_.erase(overlap) : std::next(overlap);
    }
  }
  if (!everyone && !in_block) return;
  Released& released = released_[offset];
  released.bytes = bytes;
  join(released.everyone, everyone);
  for (auto& [block, clock] : released.in_block) {
    if (block != thread.block) continue;
    join(clock, in_block);
    return;
  }
  released.in_block.emplace_back(thread.block, in_block);
}

void RaceDetector::fence(ThreadClock& thread, bool block_only) {
  thread.acquire(thread.pending_in_block);
  thread.pending_in_block = {};
  if (!block_only) {
    thread.acquire(thread.pending);
    thread.pending = {};
  }
  thread.released_in_block = thread.release();
  if (!block_only) thread.released = thread.released_in_block;
}

} // namespace simt
