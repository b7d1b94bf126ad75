// The scheduler: threads, blocks and their order, barriers, collectives, and every way a launch can fail.
#include "simt.h"

#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <set>

#include "kernels_in_cpp.h"

namespace simt::testing {
namespace {

constexpr Shape kOneWarp{{1}, {32}}, kOneBlock{{1}, {128}, 1024};

// ---- threads and blocks

TEST(Launch, RunsEveryThreadOnceWithItsIndices) {
  const Dim3 grid{3, 2, 2}, block{5, 4, 3};
  std::set<std::vector<uint32_t>> seen;
  EXPECT_FALSE(running());
  run({grid, block}, [&] {
    EXPECT_TRUE(running());
    const Thread& t = self();
    EXPECT_EQ(t.linear_in_block, t.thread_index.x + 5 * (t.thread_index.y + 4 * t.thread_index.z));
    EXPECT_EQ(t.block_linear, t.block_index.x + 3 * (t.block_index.y + 2 * t.block_index.z));
    EXPECT_EQ(t.lane, t.linear_in_block % 32);
    EXPECT_EQ(t.warp, t.linear_in_block / 32);
    EXPECT_EQ(t.grid_dim.count(), 12u);
    EXPECT_EQ(t.block_dim.count(), 60u);
    seen.insert({t.block_index.x, t.block_index.y, t.block_index.z, t.thread_index.x, t.thread_index.y, t.thread_index.z});
  });
  EXPECT_FALSE(running());
  EXPECT_EQ(seen.size(), 12u * 60);
}

std::vector<uint64_t> block_starts(BlockOrder order, uint64_t seed) {
  LaunchOptions options;
  options.block_order = order;
  options.seed = seed;
  std::vector<uint64_t> starts;
  run(
      {{40}, {2}},
      [&] {
        if (thread_index() == 0) starts.push_back(block_index());
      },
      options);
  return starts;
}

TEST(Launch, StartsBlocksInTheOrderAskedFor) {
  std::vector<uint64_t> ascending(40);
  std::iota(ascending.begin(), ascending.end(), 0);
  EXPECT_EQ(block_starts(BlockOrder::kAscending, 1), ascending);
  const std::vector<uint64_t> descending(ascending.rbegin(), ascending.rend());
  EXPECT_EQ(block_starts(BlockOrder::kDescending, 1), descending);
  auto random = block_starts(BlockOrder::kRandom, 1);
  EXPECT_EQ(random, block_starts(BlockOrder::kRandom, 1));
  EXPECT_NE(random, block_starts(BlockOrder::kRandom, 2));
  EXPECT_NE(random, ascending);
  std::sort(random.begin(), random.end());
  EXPECT_EQ(random, ascending);
}

TEST(Launch, HoldsNoMoreBlocksInFlightThanAllowed) {
  LaunchOptions options;
  options.blocks_in_flight = 3;
  int in_flight = 0, most = 0;
  run(
      {{10}, {32}},
      [&] {
        if (thread_index() == 0) most = std::max(most, ++in_flight);
        sync_block(); // the last to come goes on at once,
        sync_block(); // but not twice
        if (thread_index() == 31) --in_flight;
      },
      options);
  EXPECT_EQ(most, 3);
  EXPECT_EQ(in_flight, 0);
}

TEST(Launch, RunsAHundredThousandThreads) {
  Buffer<uint32_t> counter(1);
  run({{400}, {256}}, [&] {
    atomic_add(counter.data(), 1);
    sync_block();
    atomic_add(counter.data(), 1);
  });
  EXPECT_EQ(counter[0], 2u * 400 * 256);
}

// Only a process that has not looked yet reads its environment.
void expect_defaults(const char* seed, const char* order, const char* fuzz, const std::function<bool(const LaunchOptions&)>& expected) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        setenv("SIMT_SEED", seed, 1);
        setenv("SIMT_ORDER", order, 1);
        setenv("SIMT_FUZZ", fuzz, 1);
        bool as_expected = false;
        try {
          as_expected = expected(default_options());
        } catch (const std::invalid_argument&) {
          std::exit(3);
        }
        std::exit(as_expected ? 0 : 1);
      },
      [&](int status) { return WIFEXITED(status) && WEXITSTATUS(status) == (expected ? 0 : 3); }, "");
}

TEST(LaunchDeathTest, TheEnvironmentGivesTheDefaults) {
  expect_defaults("42", "random", "1", [](const LaunchOptions& options) {
    return options.seed == 42 && options.block_order == BlockOrder::kRandom && options.fuzz;
  });
  expect_defaults("7", "descending", "0", [](const LaunchOptions& options) {
    return options.seed == 7 && options.block_order == BlockOrder::kDescending && !options.fuzz;
  });
  const auto refused = std::function<bool(const LaunchOptions&)>();
  expect_defaults("x", "random", "1", refused);
  expect_defaults("1", "sideways", "1", refused);
  expect_defaults("1", "random", "yes", refused);
}

TEST(Launch, RefusesImpossibleShapes) {
  const auto body = [] {};
  EXPECT_THROW(run({{1}, {1025}}, body), std::invalid_argument);
  EXPECT_THROW(run({{1}, {0}}, body), std::invalid_argument);
  EXPECT_THROW(run({{0}, {1}}, body), std::invalid_argument);
  EXPECT_THROW(run({{1}, {1}, 228 << 10}, body), std::invalid_argument);
  EXPECT_THROW(run({{1}, {1}}, [] { run({{1}, {1}}, [] {}); }), std::invalid_argument);
}

// The order in which the threads of a launch met.
std::vector<uint64_t> interleaving(const LaunchOptions& options) {
  Buffer<uint32_t> counter(1);
  std::vector<uint64_t> order;
  run(
      {{4}, {64}, 4},
      [&] {
        for (int i = 0; i < 3; ++i) {
          atomic_add(counter.data(), 1);
          order.push_back(grid_thread_index());
          sync_warp();
        }
      },
      options);
  return order;
}

TEST(Launch, IsTheSameForTheSameSeedAndFuzzingChangesIt) {
  EXPECT_EQ(interleaving({}), interleaving({}));
  EXPECT_EQ(interleaving(fuzzed(7)), interleaving(fuzzed(7)));
  EXPECT_NE(interleaving(fuzzed(7)), interleaving(fuzzed(8)));
  EXPECT_NE(interleaving(fuzzed(7)), interleaving({}));
}

// ---- barriers

TEST(BlockBarrier, LetsNobodyThroughBeforeAllHaveCome) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    std::vector<int> arrived(8, 0);
    run(
        {{8}, {96}},
        [&] {
          for (int round = 1; round <= 3; ++round) {
            ++arrived[block_index()];
            sync_block();
            EXPECT_GE(arrived[block_index()], round * 96);
            sync_block();
          }
        },
        fuzzed(seed));
  }
}

TEST(BlockBarrier, MayBeCalledAtDifferentPlaces) {
  EXPECT_TRUE(is_right(kOneBlock, [] {
    if (thread_index() % 2 == 0)
      sync_block();
    else
      sync_block();
  }));
}

TEST(BlockBarrier, CountsTheThreadsThatPassThePredicate) {
  run(kOneBlock, [] {
    EXPECT_EQ(barrier_reduce(3, 0, thread_index() < 17, Place()), 17u);
    EXPECT_EQ(barrier_reduce(3, 128, true, Place()), 128u);
    EXPECT_EQ(barrier_reduce(3, 0, false, Place()), 0u);
  });
}

TEST(BlockBarrier, OfSomeWarpsDoesNotWaitForTheOthers) {
  EXPECT_TRUE(is_right(kOneBlock, [] {
    const uint32_t half = thread_index() / 64;
    for (uint32_t i = 0; i <= half * 3; ++i) EXPECT_EQ(barrier_reduce(1 + half, 64, thread_index() % 2 == 0, Place()), 32u);
    if (half == 0) return;
    barrier(15, 64, Place());
  }));
}

TEST(BlockBarrier, ThreadsAtDifferentBarriersFail) {
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] { barrier(thread_index() < 64 ? 0 : 1, 0, Place()); }));
}

TEST(BlockBarrier, ThreadsThatLeaveFail) {
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] {
    if (thread_index() != 77) sync_block();
  }));
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] {
    if (thread_index() < 64) barrier(1, 96, Place());
  }));
}

TEST(BlockBarrier, RefusesWrongNumbers) {
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] { barrier(16, 0, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] { barrier(0, 33, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] { barrier(0, 160, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneBlock, [] { barrier(0, thread_index() < 32 ? 64 : 96, Place()); }));
}

// ---- collectives

TEST(WarpCollective, BallotShowsWhoVotes) {
  EXPECT_TRUE(is_right(kOneBlock, [] {
    EXPECT_EQ(ballot(thread_index() % 3 == 0), [] {
      uint32_t votes = 0;
      for (uint32_t lane = 0; lane < 32; ++lane) votes |= uint32_t{(self().warp * 32 + lane) % 3 == 0} << lane;
      return votes;
    }());
  }));
}

TEST(WarpCollective, ShuffleTakesTheValueOfTheSource) {
  EXPECT_TRUE(is_right(kOneBlock, [] {
    for (uint32_t distance = 0; distance < 32; ++distance) {
      const uint64_t value = (uint64_t{thread_index()} << 40) + distance;
      const uint32_t source = self().lane ^ distance;
      EXPECT_EQ(shuffle(value, source), (uint64_t{self().warp * 32 + source} << 40) + distance);
    }
  }));
}

TEST(WarpCollective, ReductionsAreOfThirtyTwoBits) {
  const auto reduce = [](Collective kind, uint32_t value) { return collective(kind, ~0u, value, 0, Place()); };
  run(kOneWarp, [&] {
    const uint32_t lane = self().lane;
    const auto negative = static_cast<uint32_t>(static_cast<int32_t>(lane) - 16); // -16 to 15
    EXPECT_EQ(reduce(Collective::kReduceAdd, lane), 496u);
    EXPECT_EQ(reduce(Collective::kReduceAdd, 0x80000000u + lane), 496u);
    EXPECT_EQ(reduce(Collective::kReduceMin, negative), 0u);
    EXPECT_EQ(reduce(Collective::kReduceMax, negative), 0xffffffffu);
    EXPECT_EQ(reduce(Collective::kReduceMinSigned, negative), 0xfffffff0u);
    EXPECT_EQ(reduce(Collective::kReduceMaxSigned, negative), 15u);
    EXPECT_EQ(reduce(Collective::kReduceAnd, ~(1u << lane)), 0u);
    EXPECT_EQ(reduce(Collective::kReduceOr, 1u << lane), 0xffffffffu);
    EXPECT_EQ(reduce(Collective::kReduceXor, lane | 0x100), 0u);
  });
}

TEST(WarpCollective, MatchFindsTheLanesOfEqualValue) {
  EXPECT_TRUE(is_right(kOneWarp, [] {
    const uint64_t value = uint64_t{self().lane % 4} << 33;
    EXPECT_EQ(collective(Collective::kMatchAny, ~0u, value, 0, Place()), 0x11111111u << (self().lane % 4));
  }));
}

TEST(WarpCollective, SubsetsOfAWarpWorkApart) {
  EXPECT_TRUE(is_right(kOneWarp, [] {
    const uint32_t mask = self().lane < 8 ? 0xffu : 0xffffff00u;
    for (uint32_t i = 0; i < (self().lane < 8 ? 5u : 2u); ++i) EXPECT_EQ(ballot(true, mask), mask);
    EXPECT_EQ(ballot(true), ~0u);
  }));
}

TEST(WarpCollective, LanesMayBeAheadOfOthersThatStillMeetInASmallerMask) {
  EXPECT_TRUE(is_right(kOneWarp, [] {
    if (self().lane < 4) {
      for (int i = 0; i < 10; ++i) sync_warp(0xf);
    }
    sync_warp();
  }));
}

TEST(WarpCollective, RefusesWrongMasks) {
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] { sync_warp(self().lane == 3 ? 0xf0u : 0xffu); }));
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] { sync_warp(0); }));
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] { sync_warp(self().lane < 16 ? ~0u : 0xfffffffeu); }));
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, {{1}, {16}}, [] { sync_warp(); }));
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] {
    if (self().lane != 9) sync_warp();
  }));
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] {
    if (self().lane < 16)
      ballot(true);
    else
      sync_warp();
  }));
}

TEST(WarpCollective, RefusesAShuffleFromOutsideOfTheMask) {
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] {
    if (self().lane < 16) shuffle(1, 20, 0xffff);
  }));
  EXPECT_TRUE(fails_with(FailureKind::kWrongMask, kOneWarp, [] { shuffle(1, 32); }));
}

TEST(WarpCollective, ALaneAtABarrierAndTheRestAtACollectiveFail) {
  EXPECT_TRUE(fails_with(FailureKind::kBarrier, kOneWarp, [] {
    if (self().lane == 0)
      sync_block();
    else
      sync_warp();
  }));
}

// ---- hangs

TEST(Hang, SpinningForWhatNobodyWritesIsOne) {
  Buffer<uint32_t> flag(1);
  EXPECT_TRUE(fails_with(FailureKind::kHang, {{2}, {64}}, [&] {
    while (atomic_load(flag.data()) == 0) sleep();
  }));
  EXPECT_TRUE(fails_with(FailureKind::kHang, {{2}, {64}}, [&] {
    while (atomic_load(flag.data()) == 0) {
    }
  }));
}

TEST(Hang, WaitingForABlockThatCannotStartIsOne) {
  Buffer<uint32_t> flag(1);
  LaunchOptions options;
  options.blocks_in_flight = 2;
  const auto body = [&] {
    if (block_index() == 2)
      atomic_store(flag.data(), 1);
    else
      while (atomic_load(flag.data()) == 0) sleep();
  };
  const auto failure = failure_of({{3}, {32}}, body, options);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kHang);
  EXPECT_NE(message_of(failure).find("1 blocks have not started"), std::string::npos) << failure->what();
  flag[0] = 0;
  options.block_order = BlockOrder::kDescending;
  EXPECT_FALSE(failure_of({{3}, {32}}, body, options));
}

TEST(Hang, AThreadThatSpinsWithoutSleepingLetsOthersRun) {
  Buffer<uint32_t> flag(1);
  EXPECT_TRUE(is_right({{2}, {32}}, [&] {
    if (block_index() == 1) atomic_store(flag.data(), 1);
    while (atomic_load(flag.data()) == 0) {
    }
  }));
}

TEST(Hang, MoreInstructionsThanTheBudgetAreOne) {
  LaunchOptions options;
  options.instruction_budget = 10000;
  Buffer<uint32_t> lock(1);
  const auto failure = failure_of(
      {{1}, {64}},
      [&] {
        while (true) {
          self().instructions += 10;
          atomic_add(lock.data(), 1);
        }
      },
      options);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kHang);
  EXPECT_FALSE(failure_of({{1}, {64}}, [&] { self().instructions += 10000 / 64; }, options));
}

// ---- failures

TEST(AFailure, IsOfTheKindThatTheKernelSays) {
  const auto failure = failure_of({{2}, {4}}, [] {
    if (grid_thread_index() == 6) fail(FailureKind::kTrap, "assertion `x` failed", {"kernel.cu", 12, 0});
  });
  EXPECT_EQ(message_of(failure), "trap at kernel.cu:12 in kernel, block (1, 0, 0) thread (2, 0, 0): assertion `x` failed");
}

TEST(AFailure, LeavesNothingBehindAndTheNextLaunchWorks) {
  for (int i = 0; i < 3; ++i) {
    const auto object = std::make_shared<int>(0);
    const auto failure = failure_of({{4}, {64}, 64}, [&] {
      const std::shared_ptr<int> mine = object; // as the interpreter's registers would be
      sync_block();
      if (grid_thread_index() == 100) fail(FailureKind::kTrap, "", Place());
      sync_block();
      sync_block();
    });
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->kind, FailureKind::kTrap);
    EXPECT_EQ(object.use_count(), 1);
    EXPECT_TRUE(is_right({{4}, {64}, 64}, [] { sync_block(); }));
  }
}

TEST(AFailure, OfAnyTypeIsCarriedOutOfTheLaunch) {
  EXPECT_THROW(run(kOneBlock,
                   [] {
                     sync_block();
                     if (thread_index() == 5) throw std::out_of_range("x");
                     sync_block();
                   }),
               std::out_of_range);
}

TEST(AFailure, ThreadsMaySwitchWhileTheyHandleExceptions) {
  run({{2}, {64}}, [] {
    for (int i = 0; i < 3; ++i) {
      try {
        throw static_cast<int>(grid_thread_index());
      } catch (int mine) {
        sync_block();
        try {
          throw;
        } catch (int again) {
          EXPECT_EQ(again, mine);
        }
      }
      EXPECT_EQ(std::uncaught_exceptions(), 0);
    }
  });
}

TEST(AFailure, HasANameForEachKind) {
  std::set<std::string> names;
  for (int kind = 0; kind <= static_cast<int>(FailureKind::kUnsupported); ++kind) names.insert(name_of(static_cast<FailureKind>(kind)));
  EXPECT_EQ(names.size(), 9u);
}

} // namespace
} // namespace simt::testing
