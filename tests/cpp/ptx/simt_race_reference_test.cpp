// The race detector against a slow and simple one: whole vector clocks, the whole history of every byte. Random kernels, and after every
// access both must say the same.
#include <algorithm>
#include <array>
#include <map>
#include <random>

#include "kernels_in_cpp.h"

namespace simt::testing {
namespace {

constexpr uint32_t kBlocks = 3, kThreadsPerBlock = 48, kThreads = kBlocks * kThreadsPerBlock; // at most

using Clock = std::array<uint32_t, kThreads>;

void join(Clock& into, const Clock& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

class Reference {
 public:
  // Returns whether the access races with an earlier one.
  bool plain(uint32_t thread, size_t offset, size_t bytes, bool is_write) {
    if (is_write) forget_releases(offset, bytes, false);
    return record(thread, offset, bytes, is_write, false);
  }
  bool atomic(uint32_t thread, size_t offset, size_t bytes, bool reads, bool writes, Order order) {
    Thread& me = threads_[thread];
    const bool acquires = order == Order::kAcquire || order == Order::kAcquireRelease;
    const auto found = released_.find({offset, bytes});
    if (reads && found != released_.end()) {
      join(acquires ? me.clock : me.pending, found->second.everyone);
      join(acquires ? me.clock : me.pending_in_block, found->second.in_block[thread / kThreadsPerBlock]);
    }
    const bool races = record(thread, offset, bytes, writes, true);
    if (!writes) return races;
    forget_releases(offset, bytes, reads);
    if (order == Order::kRelease || order == Order::kAcquireRelease) {
      Released& released = released_[{offset, bytes}];
      join(released.everyone, me.clock);
      join(released.in_block[thread / kThreadsPerBlock], me.clock);
    } else if (me.has_released) {
      Released& released = released_[{offset, bytes}];
      join(released.everyone, me.released);
      join(released.in_block[thread / kThreadsPerBlock], me.released_in_block);
    }
    return races;
  }
  void fence(uint32_t thread, bool block_only) {
    Thread& me = threads_[thread];
    join(me.clock, me.pending_in_block);
    if (!block_only) join(me.clock, me.pending);
    me.has_released = true;
    me.released_in_block = me.clock;
    if (!block_only) me.released = me.clock;
  }
  // A rendezvous: each says when it comes, and asks when it goes on.
  void arrive(uint32_t thread, uint64_t rendezvous) { join(met_[rendezvous], threads_[thread].clock); }
  void go_on(uint32_t thread, uint64_t rendezvous) { join(threads_[thread].clock, met_[rendezvous]); }

 private:
  struct Thread {
    Clock clock{}, released{}, released_in_block{}, pending{}, pending_in_block{};
    bool has_released = false;
  };
  struct Access {
    uint32_t thread, time;
    bool is_write, is_atomic;
  };
  struct Released {
    Clock everyone{};
    std::array<Clock, kBlocks> in_block{};
  };

  bool record(uint32_t thread, size_t offset, size_t bytes, bool is_write, bool is_atomic) {
    Clock& clock = threads_[thread].clock;
    ++clock[thread];
    bool races = false;
    for (size_t i = offset; i < offset + bytes; ++i) {
      for (const Access& earlier : history_[i])
        races = races || ((is_write || earlier.is_write) && !(is_atomic && earlier.is_atomic) && clock[earlier.thread] < earlier.time);
      history_[i].push_back({thread, clock[thread], is_write, is_atomic});
    }
    return races;
  }
  void forget_releases(size_t offset, size_t bytes, bool is_read_modify_write) {
    std::erase_if(released_, [&](const auto& entry) {
      const auto [at, size] = entry.first;
      return at < offset + bytes && offset < at + size && !(is_read_modify_write && at == offset && size == bytes);
    });
  }

  std::array<Thread, kThreads> threads_{};
  std::map<size_t, std::vector<Access>> history_;
  std::map<std::pair<size_t, size_t>, Released> released_;
  std::map<uint64_t, Clock> met_;
};

// Each thread has a word of its own, 8 bytes, which others may get at the next rendezvous. Now and then it accesses another one.
struct Style {
  uint32_t threads_per_block;
  uint64_t other_word_one_in;
  uint64_t num_atomic_variables;

  size_t num_words() const { return kBlocks * threads_per_block + num_atomic_variables; }
};

class RandomKernel {
 public:
  RandomKernel(const Style& style, uint64_t seed, Reference& reference, std::byte* memory)
      : style_(style), seed_(seed), reference_(reference), memory_(memory) {}

  void operator()() {
    const auto thread = static_cast<uint32_t>(block_index() * kThreadsPerBlock + thread_index());
    // Decided for a whole block, so that its threads meet.
    std::mt19937_64 of_block(seed_ * 100 + block_index()), of_thread(seed_ * 1000 + 500 + thread);
    uint32_t own = thread_index();
    for (uint32_t phase = 0; phase < 12; ++phase) {
      for (uint64_t i = of_thread() % 6; i > 0; --i) do_something(thread, own, of_thread);
      const uint64_t rendezvous = (uint64_t{block_index()} * 100 + phase) * 100;
      switch (of_block() % 4) {
        case 0:
          meet(thread, rendezvous, [] { sync_block(); });
          own = (own + 7) % style_.threads_per_block; // what was another thread's is now this one's
          break;
        case 1: {
          const uint32_t lanes = std::min(32u, style_.threads_per_block - self().warp * 32);
          const uint32_t mask = lanes == 32 ? ~0u : (1u << lanes) - 1;
          meet(thread, rendezvous + 1 + self().warp, [mask] { sync_warp(mask); });
          break;
        }
        case 2:
          if (self().warp == 0 && style_.threads_per_block >= 32) {
            const uint32_t half = self().lane / 16;
            meet(thread, rendezvous + 10 + half, [half] { sync_warp(half == 0 ? 0xffffu : 0xffff0000u); });
          }
          break;
        default:
          if (self().warp == 0) meet(thread, rendezvous + 20, [] { barrier(1, 32, Place()); });
          break;
      }
    }
  }

  int num_disagreements = 0;

 private:
  template <class F>
  void meet(uint32_t thread, uint64_t rendezvous, const F& function) {
    reference_.arrive(thread, rendezvous);
    function();
    reference_.go_on(thread, rendezvous);
  }

  // Runs the real access; whether it raced must be what the reference says.
  template <class Real, class Expected>
  void compare(const Real& real, const Expected& expected) {
    try {
      real();
    } catch (const Failure& failure) {
      if (failure.kind == FailureKind::kDataRace && !expected()) ++num_disagreements;
      throw;
    }
    if (expected()) ++num_disagreements;
  }

  void do_something(uint32_t thread, uint32_t own, std::mt19937_64& random) {
    const auto one_in = [&](uint64_t n) { return random() % n == 0; };
    const size_t bytes = size_t{1} << random() % 4;
    size_t word = block_index() * style_.threads_per_block + own;
    if (one_in(style_.other_word_one_in)) word = random() % style_.num_words();
    size_t offset = word * 8 + (bytes < 8 ? random() % (8 / bytes) * bytes : 0);
    const Order order =
        std::array{Order::kRelaxed, Order::kRelaxed, Order::kAcquire, Order::kRelease, Order::kAcquireRelease}[random() % 5];
    const uint64_t choice = random() % 12;
    if (choice < 6) {
      const bool is_write = choice < 3;
      compare([&] { plain_access(memory_ + offset, bytes, is_write, Space::kGlobal, Place()); },
              [&] { return reference_.plain(thread, offset, bytes, is_write); });
    } else if (choice < 8) {
      fence(choice == 7, Place());
      reference_.fence(thread, choice == 7);
    } else {
      const bool reads = choice != 8, writes = choice != 9;
      if (!one_in(10)) offset = (style_.num_words() - 1 - random() % style_.num_atomic_variables) * 8; // variables that all use
      compare([&] { atomic_access(memory_ + offset, bytes, reads, writes, order, Space::kGlobal, Place()); },
              [&] { return reference_.atomic(thread, offset, bytes, reads, writes, order); });
    }
  }

  Style style_;
  uint64_t seed_;
  Reference& reference_;
  std::byte* memory_;
};

// How many of the kernels have a race.
int compare_on_random_kernels(const Style& style, uint64_t num_kernels) {
  Buffer<std::byte> memory(style.num_words() * 8);
  int num_races = 0;
  for (uint64_t seed = 0; seed < num_kernels; ++seed) {
    Reference reference;
    RandomKernel kernel(style, seed, reference, memory.data());
    const auto failure = failure_of({{kBlocks}, {style.threads_per_block}}, std::ref(kernel), fuzzed(seed));
    EXPECT_EQ(kernel.num_disagreements, 0) << "seed " << seed << ": " << (failure ? failure->what() : "no failure");
    if (kernel.num_disagreements != 0) break;
    if (!failure) continue;
    EXPECT_EQ(failure->kind, FailureKind::kDataRace) << failure->what();
    ++num_races;
  }
  return num_races;
}

// The numbers of races are asked for because both outcomes must be frequent, or the comparison says little.

TEST(RaceDetector, AgreesWithASimpleOneOnFewThreadsThatShareMuch) {
  const int num_races = compare_on_random_kernels({2, 50, 2}, 4000);
  EXPECT_GT(num_races, 1000);
  EXPECT_LT(num_races, 3700);
}

TEST(RaceDetector, AgreesWithASimpleOneOnManyThreadsThatShareLittle) {
  const int num_races = compare_on_random_kernels({48, 1500, 3}, 100);
  EXPECT_GT(num_races, 20);
  EXPECT_LT(num_races, 90);
}

} // namespace
} // namespace simt::testing
