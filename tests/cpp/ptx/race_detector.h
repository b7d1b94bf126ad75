// Finds data races: two accesses of different threads to one byte, at least one of them a write and at least one of them plain, of
// which neither happens before the other. What happens before what follows the PTX memory model:
//   - a barrier joins the threads that take part, __syncwarp the lanes of its mask; ballot, shuffle, match and redux order nothing;
//   - a fence and a later relaxed write, or a release write, release; a relaxed read and a later fence, or an acquire read, acquire;
//     these order two threads if the read saw the write, or a read-modify-write in a chain of them that begins with the write;
//   - a fence of block scope does so only between threads of one block;
//   - launches are ordered.
// So a race is found by the order that the program asks for, whatever order this run happened to take.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "vector_clock.h"

namespace simt {

enum class AccessKind : uint8_t { kPlainRead, kPlainWrite, kAtomicRead, kAtomicWrite };

// The earlier access that the present one races with.
struct Conflict {
  size_t offset = 0; // of the byte in the memory map
  AccessKind kind = AccessKind::kPlainRead;
  uint32_t block = 0, thread = 0; // block: counted within the launch
  uint32_t site = 0;
};

struct AtomicOrder {
  bool reads, writes; // both: a read-modify-write
  bool returns;       // the thread gets the value that was read: only then can it acquire
  bool acquires, releases;
};

class RaceDetector {
 public:
  static RaceDetector& instance();

  void begin_launch(uint32_t num_blocks);
  void end_launch(); // also after a launch that failed
  ThreadClock thread_clock(uint32_t block, uint32_t thread) const;
  // Within a launch: nothing that was done to the range matters any more, such as the shared memory that the next block takes over.
  void restart_range(size_t offset, size_t bytes);
  // Between launches: gives back the memory that holds the past of a range that was released; offset and bytes multiples of 4.
  void release_range(size_t offset, size_t bytes);

  // Records an access; returns what it races with, or nullptr. `site` names the place in the program in a later Conflict.
  const Conflict* plain(const ThreadClock& thread, size_t offset, size_t bytes, bool is_write, uint32_t site) {
    if ((offset & 3) == 0 && (bytes & 3) == 0) {
      for (Cell *cell = cells_ + offset / 4, *end = cell + bytes / 4; cell != end; ++cell)
        if (const Conflict* conflict = is_write ? write_word(thread, *cell, 0xf, site) : read_word(thread, *cell, 0xf, site))
          return conflict;
      return nullptr;
    }
    return plain_bytes(thread, offset, bytes, is_write, site);
  }
  const Conflict* atomic(ThreadClock& thread, size_t offset, size_t bytes, const AtomicOrder& order, uint32_t site);
  void fence(ThreadClock& thread, bool block_only);

 private:
  // A thread's tick in one word, to be stored and compared quickly: 30 bits block, 10 bits thread, 24 bits tick. 0: never.
  using Epoch = uint64_t;
  static constexpr uint32_t kMaxBlock = (1u << 30) - 1;

  // The past of one word of memory. Nearly always its last plain write and its last plain read say all; what needs more has a Detail.
  struct Cell {
    Epoch write, read;
    uint32_t write_site, read_site;
    uint32_t detail;                 // 1 + its index; the fields above then mean nothing
    uint8_t write_bytes, read_bytes; // bit i: byte i of the word
  };
  // Lanes of a warp that accessed bytes of a word at one tick.
  struct Record {
    uint32_t block, warp, lanes, site;
    Tick tick;
    uint8_t bytes;
  };
  struct Records {
    std::vector<Record> list;
    size_t tidy_at = kTidy;
  };
  static constexpr size_t kTidy = 64;
  struct Detail {
    Cell* cell = nullptr;
    std::array<Epoch, 4> write{}; // of each byte
    std::array<uint32_t, 4> write_site{};
    Records plain_reads, atomic_reads, atomic_writes;
  };
  // What reading an atomic variable acquires: the release sequence that its value belongs to.
  struct Released {
    size_t bytes = 0;
    Ref<GridClock> everyone;                                   // by fences and releases of any block that serve every block
    std::vector<std::pair<uint32_t, Ref<GridClock>>> in_block; // of one block, by any fence: only for readers of that block
  };

  RaceDetector();

  static Epoch epoch(const ThreadClock& thread);
  bool alive(Epoch e) const { return e >= first_epoch_; } // of this launch; whatever an earlier one did happens before all
  static bool knows(const ThreadClock& thread, Epoch e) {
    return thread.knows(static_cast<uint32_t>(e >> 34), static_cast<uint32_t>(e >> 24 & 1023), static_cast<Tick>(e & 0xffffff));
  }
  bool may_follow(const ThreadClock& thread, Epoch e) const { return !alive(e) || knows(thread, e); }

  const Conflict* read_word(const ThreadClock& thread, Cell& cell, uint8_t bytes, uint32_t site);
  const Conflict* write_word(const ThreadClock& thread, Cell& cell, uint8_t bytes, uint32_t site);
  const Conflict* plain_bytes(const ThreadClock& thread, size_t offset, size_t bytes, bool is_write, uint32_t site);
  const Conflict* atomic_word(const ThreadClock& thread, Cell& cell, uint8_t bytes, const AtomicOrder& order, uint32_t site);

  Detail& detail_of(Cell& cell);
  void drop(Detail& detail);
  const Conflict* read_detail(const ThreadClock& thread, Detail& detail, uint8_t bytes, uint32_t site);
  const Conflict* write_detail(const ThreadClock& thread, Detail& detail, uint8_t bytes, uint32_t site);
  const Conflict* check_writes(const ThreadClock& thread, const Detail& detail, uint8_t bytes);
  const Conflict* check(const ThreadClock& thread, const Detail& detail, const Records& records, uint8_t bytes, AccessKind kind);
  static void add(const ThreadClock& thread, Records& records, uint8_t bytes, uint32_t site);
  static void tidy(Records& records);
  const Conflict* conflict(const Cell& cell, uint8_t bytes, AccessKind kind, Epoch e, uint32_t site);

  static void acquire(ThreadClock& thread, const Released& released, bool now);
  void release(ThreadClock& thread, size_t offset, size_t bytes, const AtomicOrder& order);

  Cell* cells_; // one for each 4 bytes of the memory map
  uint32_t first_block_ = 1, next_block_ = 1;
  Epoch first_epoch_ = 0;
  std::deque<Detail> details_;
  std::vector<uint32_t> free_details_;
  std::map<size_t, Released> released_; // by offset of the variable
  Conflict conflict_;
};

} // namespace simt
