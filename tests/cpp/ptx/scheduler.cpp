#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "launch_counters.h"
#include "memory_map.h"
#include "race_detector.h"

namespace simt {
namespace {

Scheduler* g_launch = nullptr;
ThreadState* g_thread = nullptr;

// Unwinds the threads of a launch that has failed.
struct Cancelled {};

} // namespace

Scheduler* current_launch() { return g_launch; }
ThreadState* current_thread() { return g_thread; }

std::string show(const Location& at) { return std::string(at.file) + ":" + std::to_string(at.line); }

std::string show_index(Dim3 index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return text.str();
}

BlockState::~BlockState() {
  if (shared != nullptr) MemoryMap::instance().release(shared);
}

// ---- a launch

Scheduler::Scheduler(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body,
                     const LaunchOptions& options)
    : kernel_(kernel),
      grid_(grid),
      block_(block),
      shared_bytes_(shared_bytes),
      body_(body),
      options_(options),
      counters_(counters_of(kernel)),
      threads_per_block_(static_cast<uint32_t>(block.count())),
      random_(options.seed) {
  const auto num_blocks = static_cast<uint32_t>(grid.count());
  const uint32_t in_flight = std::min(std::max(options.blocks_in_flight, 1u), num_blocks);
  ready_.resize(size_t{in_flight} * threads_per_block_);
  for (uint32_t i = 0; i < in_flight; ++i) {
    BlockState& state = *blocks_.emplace_back(std::make_unique<BlockState>());
    if (shared_bytes != 0) state.shared = MemoryMap::instance().allocate(shared_bytes, false);
    state.warps.resize((threads_per_block_ + 31) / 32);
    for (uint32_t t = 0; t < threads_per_block_; ++t) state.threads.push_back(std::make_unique<ThreadState>());
  }
  if (options.block_order == BlockOrder::kRandom) {
    random_order_.resize(num_blocks);
    for (uint32_t i = 0; i < num_blocks; ++i) random_order_[i] = i;
    for (uint32_t i = num_blocks; i > 1; --i) std::swap(random_order_[i - 1], random_order_[random_.below(i)]);
  }
  ++counters_.launches;
  counters_.shared_bytes_peak = std::max<uint64_t>(counters_.shared_bytes_peak, shared_bytes);
  RaceDetector::instance().begin_launch(num_blocks);
  g_launch = this;
}

Scheduler::~Scheduler() {
  RaceDetector::instance().end_launch();
  g_launch = nullptr;
}

void Scheduler::run() {
  const uint64_t num_blocks = grid_.count();
  while (true) {
    for (auto block = blocks_.begin(); block != blocks_.end() && num_started_ < num_blocks; ++block)
      if (!(*block)->running) start_block(**block, block_to_start(num_started_++));
    ThreadState* thread = take_ready();
    if (thread == nullptr) return; // a block whose threads all wait has failed before
    const ThreadState& ended = switch_to(*thread);
    if (failure_) {
      cancel();
      std::rethrow_exception(failure_);
    }
    if (ended.block->left == threads_per_block_) end_block(*ended.block);
  }
}

uint64_t Scheduler::block_to_start(uint64_t position) const {
  switch (options_.block_order) {
    case BlockOrder::kAscending:
      return position;
    case BlockOrder::kDescending:
      return grid_.count() - 1 - position;
    default:
      return random_order_[position];
  }
}

Dim3 Scheduler::index_in(Dim3 dims, uint64_t linear) const {
  return {static_cast<uint32_t>(linear % dims.x), static_cast<uint32_t>(linear / dims.x % dims.y),
          static_cast<uint32_t>(linear / dims.x / dims.y)};
}

void Scheduler::start_block(BlockState& block, uint64_t linear) {
  block.linear = linear;
  block.running = true;
  block.waiting = block.left = 0;
  if (block.shared != nullptr) {
    MemoryMap& map = MemoryMap::instance();
    std::memset(block.shared, 0xcd, shared_bytes_);
    map.initialized.fill(map.offset_of(block.shared), shared_bytes_, false);
  }
  for (uint32_t w = 0; w < block.warps.size(); ++w) {
    const uint32_t lanes = std::min(32u, threads_per_block_ - w * 32);
    block.warps[w].present = lanes == 32 ? ~0u : (1u << lanes) - 1;
    block.warps[w].requests.restart(block.warps[w].present);
  }
  for (uint32_t t = 0; t < threads_per_block_; ++t) {
    ThreadState& thread = *block.threads[t];
    static_cast<Thread&>(thread) = {.thread_index = index_in(block_, t),
                                    .block_index = index_in(grid_, linear),
                                    .block_dim = block_,
                                    .grid_dim = grid_,
                                    .linear_in_block = t,
                                    .lane = t % 32,
                                    .warp = t / 32,
                                    .block_linear = linear,
                                    .shared = block.shared,
                                    .shared_bytes = shared_bytes_};
    thread.block = &block;
    thread.turn_left = kTurn;
    thread.instructions_counted = 0;
    thread.clock = RaceDetector::instance().thread_clock(static_cast<uint32_t>(linear), t);
    thread.fiber.prepare(&Scheduler::thread_main, &thread);
    make_ready(thread);
  }
}

void Scheduler::end_block(BlockState& block) {
  block.running = false;
  if (block.shared == nullptr || !options_.detect_races) return;
  RaceDetector::instance().restart_range(MemoryMap::instance().offset_of(block.shared), shared_bytes_);
}

ThreadState& Scheduler::switch_to(ThreadState& thread) {
  g_thread = &thread;
  thread.fiber.resume();
  return *std::exchange(g_thread, nullptr);
}

void Scheduler::thread_main(void* argument) {
  ThreadState& thread = *static_cast<ThreadState*>(argument);
  Scheduler& launch = *g_launch;
  try {
    launch.body_();
    launch.thread_left(thread);
  } catch (const Cancelled&) {
  } catch (...) {
    if (!launch.cancelling_) launch.failure_ = std::current_exception();
  }
  thread.block->warps[thread.warp].present &= ~(1u << thread.lane);
}

void Scheduler::thread_left(ThreadState& thread) {
  BlockState& block = *thread.block;
  const Location at{"the end of the kernel", 0, 0};
  counters_.instructions += thread.instructions - thread.instructions_counted;
  for (uint32_t id = 0; id < block.barriers.size(); ++id) {
    const Barrier& barrier = block.barriers[id];
    if (barrier.waiting.empty() || !barrier.counts_all) continue;
    fail(FailureKind::kBarrier,
         "the thread leaves while " + std::to_string(barrier.waiting.size()) + " of its block wait at barrier " + std::to_string(id) +
             " at " + show(barrier.at) + " for all " + std::to_string(barrier.expected),
         at);
  }
  for (const Gathering& gathering : block.warps[thread.warp].gatherings) {
    if ((gathering.mask >> thread.lane & 1) == 0) continue;
    fail(FailureKind::kWrongMask, "the thread leaves while lanes of its warp wait for it at the collective at " + show(gathering.at), at);
  }
  ++block.left;
  made_progress();
  if (block.waiting > 0 && block.waiting + block.left == threads_per_block_) fail_stuck(block, at);
}

// Unwinds every thread that is in the middle of the kernel, so that its objects are destroyed.
void Scheduler::cancel() {
  cancelling_ = true;
  for (const auto& block : blocks_)
    for (const auto& thread : block->threads)
      if (thread->fiber.started()) switch_to(*thread);
}

// ---- taking turns

void Scheduler::make_ready(ThreadState& thread) {
  size_t end = ready_begin_ + num_ready_++;
  if (end >= ready_.size()) end -= ready_.size();
  ready_[end] = &thread;
}

ThreadState* Scheduler::take_ready() {
  if (num_ready_ == 0) return nullptr;
  if (options_.fuzz) std::swap(ready_[ready_begin_], ready_[(ready_begin_ + random_.below(num_ready_)) % ready_.size()]);
  ThreadState* const thread = ready_[ready_begin_];
  if (++ready_begin_ == ready_.size()) ready_begin_ = 0;
  --num_ready_;
  return thread;
}

void Scheduler::enter(int64_t cost, uint32_t fuzz_one_in, const Location& at) {
  if (cancelling_) throw Cancelled{};
  ThreadState& thread = *g_thread;
  const uint64_t executed = thread.instructions - thread.instructions_counted;
  thread.instructions_counted = thread.instructions;
  counters_.instructions += executed;
  instructions_ += executed > 0 ? executed : 1; // a body that does not count must end too
  if (instructions_ > options_.instruction_budget)
    fail(FailureKind::kHang, "the launch executes more than " + std::to_string(options_.instruction_budget) + " instructions", at);
  thread.turn_left -= cost;
  if (thread.turn_left <= 0 || (options_.fuzz && random_.below(fuzz_one_in) == 0)) let_others_run();
}

void Scheduler::let_others_run() {
  ThreadState& thread = *g_thread;
  thread.turn_left = kTurn;
  if (num_ready_ == 0) return;
  make_ready(thread);
  pass_turn();
}

void Scheduler::pass_turn() {
  ThreadState& thread = *g_thread;
  g_thread = take_ready();
  if (g_thread != &thread) thread.fiber.hand_over(g_thread->fiber);
  if (cancelling_) throw Cancelled{};
}

void Scheduler::was_idle(const Location& at) {
  // So often that a thread may well look at as many different words, and that in fuzz mode no thread was left out by chance.
  constexpr uint64_t kAlways = 1 << 18, kForEachThread = 2000;
  if (++idle_ <= kAlways + kForEachThread * num_ready_) return;
  fail(FailureKind::kHang,
       "all threads that do not wait look for something that does not come (" + std::to_string(num_ready_ + 1) + " of them; " +
           std::to_string(grid_.count() - num_started_) + " blocks have not started)",
       at);
}

void Scheduler::wait(const Location& at) {
  ThreadState& thread = *g_thread;
  BlockState& block = *thread.block;
  ++block.waiting;
  if (block.waiting + block.left == threads_per_block_) fail_stuck(block, at);
  thread.turn_left = kTurn;
  pass_turn(); // to a thread that is ready, as one of the block's is
}

// ---- reports

std::string Scheduler::describe(uint64_t block_linear, uint32_t thread) const {
  std::ostringstream text;
  text << "block " << show_index(index_in(grid_, block_linear)) << " thread " << show_index(index_in(block_, thread));
  return text.str();
}

std::string Scheduler::describe(const ThreadState& thread) const { return describe(thread.block_linear, thread.linear_in_block); }

} // namespace simt
