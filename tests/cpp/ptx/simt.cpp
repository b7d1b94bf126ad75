#include "simt.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "scheduler.h"

namespace simt {
namespace {

constexpr uint32_t kMaxThreads = 1024, kMaxBlocks = 1u << 29;
constexpr size_t kMaxSharedBytes = 227 << 10; // of one block, on sm_90

LaunchOptions options_of_environment() {
  LaunchOptions options;
  const auto refuse = [](const char* name, const char* text, const char* expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + text);
  };
  if (const char* text = std::getenv("SIMT_SEED")) {
    char* end = nullptr;
    options.seed = std::strtoull(text, &end, 10);
    if (end == text || *end != '\0') refuse("SIMT_SEED", text, "a number");
  }
  if (const char* text = std::getenv("SIMT_ORDER")) {
    if (std::strcmp(text, "ascending") == 0)
      options.block_order = BlockOrder::kAscending;
    else if (std::strcmp(text, "descending") == 0)
      options.block_order = BlockOrder::kDescending;
    else if (std::strcmp(text, "random") == 0)
      options.block_order = BlockOrder::kRandom;
    else
      refuse("SIMT_ORDER", text, "ascending, descending or random");
  }
  if (const char* text = std::getenv("SIMT_FUZZ")) {
    if (std::strcmp(text, "0") != 0 && std::strcmp(text, "1") != 0) refuse("SIMT_FUZZ", text, "0 or 1");
    options.fuzz = *text == '1';
  }
  return options;
}

} // namespace

LaunchOptions& default_options() {
  static LaunchOptions options = options_of_environment();
  return options;
}

Thread& self() { return *current_thread(); }
bool running() { return current_thread() != nullptr; }

void launch(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, const std::function<void()>& body,
            const LaunchOptions& options) {
  const auto refuse = [&](const std::string& why) { throw std::invalid_argument("launch of " + std::string(kernel) + ": " + why); };
  static thread_local bool launching = false;
  if (launching) refuse("a kernel cannot launch another one");
  // Dimensions are 32 bits wide: the products below cannot overflow before the first factors are refused.
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || block.count() == 0 || block.count() > kMaxThreads)
    refuse("a block must have 1 to 1024 threads, got " + show_index(block));
  if (grid.y > 65535 || grid.z > 65535 || uint64_t{grid.y} * grid.z > kMaxBlocks || grid.count() == 0 || grid.count() > kMaxBlocks)
    refuse("a grid must have 1 to 2^29 blocks, got " + show_index(grid));
  if (shared_bytes > kMaxSharedBytes) refuse("a block can have 227 KiB of shared memory, got " + std::to_string(shared_bytes) + " bytes");
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  launching = true;
  struct NotLaunching {
    ~NotLaunching() { launching = false; }
  } at_the_end;
  Scheduler scheduler(kernel, grid, block, shared_bytes, body, options);
  scheduler.run();
}

void yield(const Location& at) {
  Scheduler& launch = *current_launch();
  launch.enter(0, 1u << 30, at);
  launch.was_idle(at);
  launch.let_others_run();
}

void plain_access(const void* p, size_t bytes, bool is_write, Space space, const Location& at) {
  current_launch()->plain_access(p, bytes, is_write, space, at);
}

void atomic_access(const void* p, size_t bytes, bool reads, bool writes, Order order, Space space, const Location& at) {
  current_launch()->atomic_access(p, bytes, reads, writes, reads, order, space, at);
}

void reduction_access(const void* p, size_t bytes, Order order, Space space, const Location& at) {
  current_launch()->atomic_access(p, bytes, true, true, false, order, space, at);
}

void fence(bool block_only, const Location& at) { current_launch()->fence(block_only, at); }

void barrier(uint32_t id, uint32_t count, const Location& at) { current_launch()->barrier(id, count, false, at); }

uint32_t barrier_reduce(uint32_t id, uint32_t count, bool predicate, const Location& at) {
  return current_launch()->barrier(id, count, predicate, at);
}

uint64_t collective(Collective kind, uint32_t mask, uint64_t value, uint32_t source_lane, const Location& at) {
  return current_launch()->collective(kind, mask, value, source_lane, at);
}

const char* name_of(FailureKind kind) {
  switch (kind) {
    case FailureKind::kDataRace:
      return "data race";
    case FailureKind::kOutOfBounds:
      return "out of bounds";
    case FailureKind::kUninitialized:
      return "uninitialised";
    case FailureKind::kMisaligned:
      return "misaligned";
    case FailureKind::kWrongMask:
      return "wrong mask";
    case FailureKind::kBarrier:
      return "barrier";
    case FailureKind::kHang:
      return "hang";
    case FailureKind::kTrap:
      return "trap";
    case FailureKind::kUnsupported:
      return "unsupported";
  }
  return "?";
}

void fail(FailureKind kind, const std::string& message, const Location& at) {
  std::string text = std::string(name_of(kind)) + " at " + show(at);
  if (running()) text += " in " + std::string(current_launch()->kernel()) + ", " + current_launch()->describe(*current_thread());
  throw Failure(kind, text + ": " + message);
}

} // namespace simt
