// What is a race and what is not. A detector that finds too little lets a wrong kernel pass, one that finds too much makes a right one
// impossible: each rule is tested on both sides.
#include "kernels_in_cpp.h"

namespace simt::testing {
namespace {

constexpr Shape kTwoThreads{{1}, {2}}, kOneWarp{{1}, {32}}, kTwoBlocks{{2}, {1}}, kOneBlock{{1}, {128}, 1024};

// ---- two accesses

TEST(Race, TwoWritesOfOneWordAreOne) {
  Buffer<uint32_t> word(1);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoThreads, [&] { store(word.data(), 1); }));
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoBlocks, [&] { store(word.data(), 1); }));
}

TEST(Race, AReadAndAWriteAreOne) {
  Buffer<uint32_t> word(1);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoThreads, [&] {
    if (thread_index() == 0)
      store(word.data(), 1);
    else
      load(word.data());
  }));
}

TEST(Race, AWriteByTheLastOfManyReadersIsOne) {
  Buffer<uint32_t> word(1);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kOneBlock, [&] {
    load(word.data());
    if (thread_index() == 127) store(word.data(), 1);
  }));
}

TEST(Race, ManyReadersAreNone) {
  Buffer<uint32_t> words(4);
  EXPECT_TRUE(is_right({{50}, {64}}, [&] {
    for (size_t i = 0; i < 4; ++i) load(words + i);
  }));
}

TEST(Race, NeighbouringBytesOfAWordAreNone) {
  Buffer<uint8_t> bytes(128);
  EXPECT_TRUE(is_right(kOneBlock, [&] {
    store(bytes + thread_index(), 1);
    load(bytes + thread_index());
    store(bytes + thread_index(), 2);
  }));
}

TEST(Race, AWordOverlapsItsBytes) {
  Buffer<uint32_t> word(1);
  auto* bytes = reinterpret_cast<uint8_t*>(word.data());
  for (const bool read : {false, true}) {
    EXPECT_TRUE(fails_with(FailureKind::kDataRace, {{1}, {3}}, [&] {
      if (thread_index() < 2)
        store(bytes + thread_index(), 1);
      else if (read)
        load(word.data());
      else
        store(word.data(), 1);
    }));
  }
}

TEST(Race, HalfWordsOfOneThreadAreRememberedApart) {
  Buffer<uint16_t> halves(2);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoBlocks, [&] {
    if (block_index() == 0) {
      store(halves + 0, 1);
      store(halves + 1, 1);
    } else {
      load(halves + 1);
    }
  }));
}

TEST(Race, ManyReadsOfAByteDoNotHideAnEarlierReadOfItsNeighbour) {
  Buffer<uint8_t> bytes(2);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoBlocks, [&] {
    if (block_index() == 0) load(bytes + 0);
    for (int i = 0; i < 200 && block_index() == 0; ++i) {
      fence_block(); // time goes on: each read is remembered apart
      load(bytes + 1);
    }
    if (block_index() == 1) store(bytes + 0, 1);
  }));
}

TEST(Race, AVectorOverlapsEachOfItsWords) {
  struct alignas(16) Vector {
    uint32_t words[4];
  };
  Buffer<Vector> vector(1);
  for (size_t word = 0; word < 4; ++word) {
    EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoThreads, [&] {
      if (thread_index() == 0)
        load(vector.data());
      else
        store(&vector[0].words[word], 1);
    }));
  }
}

TEST(Race, AtomicsAreNoneAmongThemselvesButWithPlainAccesses) {
  Buffer<uint32_t> word(1);
  EXPECT_TRUE(is_right({{4}, {64}}, [&] {
    atomic_add(word.data(), 1);
    atomic_load(word.data());
    atomic_store(word.data(), 3);
  }));
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoThreads, [&] {
    if (thread_index() == 0)
      atomic_add(word.data(), 1);
    else
      load(word.data());
  }));
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kTwoThreads, [&] {
    if (thread_index() == 0)
      atomic_load(word.data());
    else
      store(word.data(), 1);
  }));
  EXPECT_TRUE(is_right(kTwoThreads, [&] {
    if (thread_index() == 0)
      atomic_load(word.data());
    else
      load(word.data());
  }));
}

TEST(Race, APlainReadIsNotForgottenBehindAnAtomicThatFollowsIt) {
  Buffer<uint32_t> word(1);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, {{2}, {64}}, [&] {
    if (block_index() == 0) {
      if (thread_index() == 0) load(word.data());
      sync_block();
      if (thread_index() == 1) atomic_add(word.data(), 1);
    } else if (thread_index() == 0) {
      atomic_add(word.data(), 1);
    }
  }));
}

TEST(Race, ReportNamesBothPlacesThreadsAndTheByte) {
  Buffer<uint32_t> words(10);
  uint32_t write_line = 0, read_line = 0;
  const auto failure = failure_of({{3}, {8, 4}}, [&] {
    if (block_index() == 1 && thread_index() == 9) store(words + 5, 1, (write_line = __LINE__, Place()));
    if (block_index() == 2 && thread_index() == 31) load(words + 5, (read_line = __LINE__, Place()));
  });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->what(),
            "data race at kernel.cu:" + std::to_string(read_line) +
                " in kernel, block (2, 0, 0) thread (7, 3, 0): read of 4 bytes is not ordered with the write at kernel.cu:" +
                std::to_string(write_line) + " by block (1, 0, 0) thread (1, 1, 0); both touch offset 20 of the allocation of 40 bytes");
}

TEST(Race, DetectionCanBeOff) {
  Buffer<uint32_t> word(1);
  LaunchOptions options;
  options.detect_races = false;
  EXPECT_FALSE(failure_of(kOneBlock, [&] { store(word.data(), 1); }, options));
}

// ---- launches, barriers, collectives

TEST(Order, LaunchesAreOrdered) {
  Buffer<uint32_t> words(64);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(is_right({{2}, {32}}, [&] { store(words + grid_thread_index(), 1); }));
    EXPECT_TRUE(is_right({{2}, {32}}, [&] { store(words + (63 - grid_thread_index()), load(words + (63 - grid_thread_index()))); }));
    EXPECT_TRUE(is_right({{2}, {32}}, [&] { load(words + 7); }));
  }
}

TEST(Order, ABarrierOrdersItsBlock) {
  EXPECT_TRUE(is_right(kOneBlock, [] {
    for (uint32_t round = 1; round < 5; ++round) {
      store(shared<uint32_t>() + thread_index(), round);
      sync_block();
      EXPECT_EQ(load(shared<uint32_t>() + (thread_index() + 77) % 128), round);
      sync_block();
    }
  }));
}

TEST(Order, AMissingSecondBarrierIsFound) {
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kOneBlock, [] {
    for (uint32_t round = 1; round < 5; ++round) {
      store(shared<uint32_t>() + thread_index(), round);
      sync_block();
      load(shared<uint32_t>() + (thread_index() + 77) % 128);
    }
  }));
}

TEST(Order, ABarrierDoesNotOrderOtherBlocks) {
  Buffer<uint32_t> words(64);
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, {{2}, {64}}, [&] {
    if (block_index() == 0) store(words + thread_index(), 1);
    sync_block();
    if (block_index() == 1) load(words + thread_index());
  }));
}

TEST(Order, ABarrierOfSomeWarpsOrdersThem) {
  const auto kernel = [](bool third_warp_reads) {
    return [third_warp_reads] {
      const uint32_t warp = thread_index() / 32;
      if (warp < 2) {
        store(shared<uint32_t>() + thread_index(), 1);
        barrier(1, 64, Place());
        load(shared<uint32_t>() + (thread_index() + 32) % 64);
      } else if (third_warp_reads && warp == 2) {
        load(shared<uint32_t>() + 5);
      }
    };
  };
  EXPECT_TRUE(is_right(kOneBlock, kernel(false)));
  const auto failure = failure_of(kOneBlock, kernel(true));
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kDataRace);
}

TEST(Order, SyncWarpOrdersItsLanesAndItsAbsenceIsFound) {
  EXPECT_TRUE(is_right(kOneBlock, [] {
    for (uint32_t round = 0; round < 40; ++round) {
      store(shared<uint32_t>() + thread_index(), round);
      sync_warp();
      EXPECT_EQ(load(shared<uint32_t>() + (thread_index() ^ 1)), round);
      sync_warp();
    }
  }));
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, kOneBlock, [] {
    for (uint32_t round = 0; round < 40; ++round) {
      store(shared<uint32_t>() + thread_index(), round);
      sync_warp();
      load(shared<uint32_t>() + (thread_index() ^ 1));
    }
  }));
}

TEST(Order, SyncWarpOrdersTheLanesOfItsMaskOnly) {
  const auto kernel = [](uint32_t distance) {
    return [distance] {
      if (thread_index() >= 8) return;
      const bool is_first_half = thread_index() < 4;
      if (is_first_half) store(shared<uint32_t>() + thread_index(), 1);
      sync_warp(is_first_half ? 0x0fu : 0xf0u);
      // Each half has met, but nothing says which half came first.
      if (is_first_half == (distance < 4)) atomic_add(shared<uint32_t>() + (thread_index() ^ distance), 1);
    };
  };
  EXPECT_TRUE(is_right({{1}, {32}, 128}, kernel(3)));
  for (const uint64_t seed : {1, 2, 3, 4}) {
    const auto failure = failure_of({{1}, {32}, 128}, kernel(4), fuzzed(seed));
    ASSERT_TRUE(failure);
    EXPECT_TRUE(failure->kind == FailureKind::kDataRace || failure->kind == FailureKind::kUninitialized) << failure->what();
  }
}

TEST(Order, OtherCollectivesOrderNothing) {
  for (const Collective kind : {Collective::kBallot, Collective::kShuffle, Collective::kReduceAdd, Collective::kMatchAny}) {
    Buffer<uint32_t> words(32);
    EXPECT_TRUE(fails_with(FailureKind::kDataRace, kOneWarp, [&] {
      store(words + thread_index(), 1);
      collective(kind, ~0u, 1, 0, Place());
      load(words + (thread_index() ^ 1));
    })) << static_cast<int>(kind);
  }
}

TEST(Order, WhatOneLaneLearntASyncWarpTellsTheOthers) {
  Buffer<uint32_t> data(1), flag(1);
  EXPECT_TRUE(is_right({{2}, {32}}, [&] {
    if (block_index() == 0) {
      if (thread_index() != 0) return;
      store(data.data(), 42);
      atomic_store(flag.data(), 1, Order::kRelease);
    } else {
      if (thread_index() == 3)
        while (atomic_load(flag.data(), Order::kAcquire) == 0) sleep();
      sync_warp();
      EXPECT_EQ(load(data.data()), 42u);
      sync_warp();
      if (thread_index() == 3) store(flag.data(), 0); // for the next round
      if (thread_index() == 4) store(data.data(), 0);
    }
  }));
}

// ---- shared memory

TEST(SharedMemory, AHistogramByAtomicsBetweenBarriersIsRight) {
  Buffer<uint32_t> total(64);
  EXPECT_TRUE(is_right({{6}, {128}, 64 * 4}, [&] {
    auto* bins = shared<uint32_t>();
    if (thread_index() < 64) store(bins + thread_index(), 0);
    sync_block();
    for (uint32_t i = 0; i < 30; ++i) atomic_add(bins + (thread_index() * 7 + i * 13) % 64, 1);
    sync_block();
    if (thread_index() < 64) atomic_add(total + thread_index(), load(bins + thread_index()));
  }));
}

TEST(SharedMemory, OfTheNextBlockHasNoPast) {
  LaunchOptions options;
  options.blocks_in_flight = 1;
  const auto failure = failure_of({{20}, {64}, 256}, [] { store(shared<uint32_t>() + (thread_index() + block_index()) % 64, 1); }, options);
  EXPECT_FALSE(failure) << failure->what();
}

} // namespace
} // namespace simt::testing
