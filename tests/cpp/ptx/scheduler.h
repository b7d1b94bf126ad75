// One launch: its blocks, its threads and whose turn it is. The functions of simt.h are thin shells around it.
//
// Threads take turns only where they must wait, yield, or have run for long, first come first served; in fuzz mode also at random.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "memory_map.h"
#include "sectors.h"
#include "simt.h"
#include "sites.h"
#include "vector_clock.h"

namespace simt {

struct BlockState;
struct Conflict;

struct ThreadState : Thread {
  BlockState* block = nullptr;
  int64_t turn_left = 0; // how much it may do before others get a turn
  uint64_t instructions_counted = 0;
  uint64_t result = 0; // of the barrier or collective that it waited at
  ThreadClock clock;
  Fiber fiber;
};

struct Barrier {
  uint32_t expected = 0, votes = 0;
  bool counts_all = false;
  Location at; // where the first thread arrived
  std::vector<ThreadState*> waiting;
};

// Lanes of a warp waiting at a collective for the rest of its mask.
struct Gathering {
  Collective kind;
  uint32_t mask = 0, arrived = 0;
  Location at;
  std::array<uint64_t, 32> values{};
  std::array<uint32_t, 32> source_lanes{};
};

struct Warp {
  uint32_t present = 0; // lanes that exist and have not left
  std::vector<Gathering> gatherings;
  WarpRequests requests;
};

struct BlockState {
  uint64_t linear = 0;
  bool running = false;
  uint32_t waiting = 0, left = 0; // threads at a barrier or collective, and threads that have ended
  std::byte* shared = nullptr;
  std::vector<std::unique_ptr<ThreadState>> threads;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;

  ~BlockState();
};

// xorshift64*: the distributions of <random> differ between standard libraries.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u) {
    if (state_ == 0) state_ = 1;
  }
  uint64_t below(uint64_t end) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (state_ * 0x2545f4914f6cdd1du >> 16) % end;
  }

 private:
  uint64_t state_;
};

class Scheduler {
 public:
  Scheduler(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body,
            const LaunchOptions& options);
  ~Scheduler();

  void run();

  // ---- for what a thread tells; all in rendezvous.cpp and accesses.cpp but the first group

  // Every hook begins with it: counts instructions, and lets others run where it is time or the fuzzer wants it. `cost` of `kTurn`.
  void enter(int64_t cost, uint32_t fuzz_one_in, const Location& at);
  void let_others_run();
  void made_progress() { idle_ = 0; }
  // The thread found nothing new; too many of these and nothing else is a hang.
  void was_idle(const Location& at);

  uint32_t barrier(uint32_t id, uint32_t count, bool predicate, const Location& at);
  uint64_t collective(Collective kind, uint32_t mask, uint64_t value, uint32_t source_lane, const Location& at);
  void plain_access(const void* p, size_t bytes, bool is_write, Space space, const Location& at);
  // `returns`: the thread gets the value read.
  void atomic_access(const void* p, size_t bytes, bool reads, bool writes, bool returns, Order order, Space space, const Location& at);
  void fence(bool block_only, const Location& at);

  std::string describe(const ThreadState& thread) const;
  std::string describe(uint64_t block_linear, uint32_t thread) const;
  const char* kernel() const { return kernel_; }

 private:
  static constexpr int64_t kTurn = 1 << 14;

  static void thread_main(void* thread);
  void thread_left(ThreadState& thread);
  void start_block(BlockState& block, uint64_t linear);
  void end_block(BlockState& block);
  // Runs the thread, and those that it passes its turn to, until one of them ends: that one.
  ThreadState& switch_to(ThreadState& thread);
  void cancel();
  uint64_t block_to_start(uint64_t position) const;
  Dim3 index_in(Dim3 dims, uint64_t linear) const;

  void make_ready(ThreadState& thread);
  ThreadState* take_ready();
  void pass_turn(); // from the running thread to the next that is ready
  // The running thread waits until make_ready(it); a failure if that can never come.
  void wait(const Location& at);
  [[noreturn]] void fail_stuck(const BlockState& block, const Location& at);
  void complete(Barrier& barrier, BlockState& block);
  void complete(Gathering& gathering, BlockState& block, uint32_t warp);
  void check_mask(const BlockState& block, Collective kind, uint32_t mask, const Location& at);

  struct Target {
    bool is_known = false; // memory that can be checked
    size_t offset = 0;     // in the memory map
  };
  Target find_target(const void* p, size_t bytes, const char* what, Space space, uint32_t site, const Location& at);
  void check_initialized(const Target& target, size_t bytes, bool reads, bool writes, const char* what, const void* p, const Location& at);
  void count_access(const void* p, size_t bytes, bool reads, bool writes, uint32_t site);
  [[noreturn]] void fail_race(const Conflict* conflict, const char* what, size_t bytes, const Location& at);

  const char* kernel_;
  Dim3 grid_, block_;
  size_t shared_bytes_;
  const std::function<void()>& body_;
  LaunchOptions options_;
  Counters& counters_;
  uint32_t threads_per_block_;
  Random random_;
  Sites sites_;
  std::vector<GlobalRange> range_of_site_; // the allocation that each place in the program last touched: mostly the next one too

  std::vector<std::unique_ptr<BlockState>> blocks_; // in flight, or waiting for the next block
  std::vector<uint32_t> random_order_;
  uint64_t num_started_ = 0;

  std::vector<ThreadState*> ready_; // a ring
  size_t ready_begin_ = 0, num_ready_ = 0;

  uint64_t idle_ = 0, instructions_ = 0;
  bool cancelling_ = false;
  std::exception_ptr failure_;
};

// The launch under way and its running thread; nullptr outside.
Scheduler* current_launch();
ThreadState* current_thread();

std::string show(const Location& at);
std::string show_index(Dim3 index);

} // namespace simt
