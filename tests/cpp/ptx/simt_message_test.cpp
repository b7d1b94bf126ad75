// Messages between threads by fences and atomics, and the last block that adds up what all blocks left: with each step that the memory
// model asks for, and without.
#include "kernels_in_cpp.h"

namespace simt::testing {
namespace {

constexpr Shape kTwoThreads{{1}, {2}}, kTwoBlocks{{2}, {1}};

struct Message {
  Buffer<uint32_t> data{1}, flag{1};

  // The sender waits for nothing, the receiver for the flag. Each side with the steps given.
  std::function<void()> kernel(std::function<void(uint32_t*)> send, std::function<uint32_t(uint32_t*)> receive) {
    return [this, send, receive] {
      const bool is_sender = grid_thread_index() == 0;
      if (is_sender) {
        store(data.data(), 42);
        send(flag.data());
      } else if (grid_thread_index() == self().grid_dim.count() * self().block_dim.count() - 1) {
        while (receive(flag.data()) == 0) sleep();
        load(data.data());
      }
    };
  }
  ::testing::AssertionResult passes(Shape shape, const std::function<void()>& body) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      flag[0] = 0;
      if (const auto failure = failure_of(shape, body, fuzzed(seed))) return ::testing::AssertionFailure() << failure->what();
    }
    return ::testing::AssertionSuccess();
  }
  ::testing::AssertionResult races(Shape shape, const std::function<void()>& body) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      flag[0] = 0;
      const auto failure = failure_of(shape, body, fuzzed(seed));
      if (!failure) return ::testing::AssertionFailure() << "no failure";
      if (failure->kind != FailureKind::kDataRace) return ::testing::AssertionFailure() << failure->what();
    }
    return ::testing::AssertionSuccess();
  }
};

void send_relaxed(uint32_t* flag) { atomic_store(flag, 1); }
void send_release(uint32_t* flag) { atomic_store(flag, 1, Order::kRelease); }
void send_behind_fence(uint32_t* flag) {
  fence_all();
  atomic_store(flag, 1);
}
void send_behind_block_fence(uint32_t* flag) {
  fence_block();
  atomic_store(flag, 1);
}
void send_before_fence(uint32_t* flag) {
  atomic_store(flag, 1);
  fence_all();
}
uint32_t receive_relaxed(uint32_t* flag) { return atomic_load(flag); }
uint32_t receive_acquire(uint32_t* flag) { return atomic_load(flag, Order::kAcquire); }
uint32_t receive_before_fence(uint32_t* flag) {
  const uint32_t value = atomic_load(flag);
  fence_all();
  return value;
}
uint32_t receive_before_block_fence(uint32_t* flag) {
  const uint32_t value = atomic_load(flag);
  fence_block();
  return value;
}
uint32_t receive_behind_fence(uint32_t* flag) {
  fence_all();
  return atomic_load(flag);
}

TEST(MessagePassing, NeedsAReleaseAndAnAcquire) {
  Message message;
  for (const Shape shape : {kTwoThreads, kTwoBlocks, Shape{{1}, {64}}}) {
    for (const auto& send : {send_release, send_behind_fence})
      for (const auto& receive : {receive_acquire, receive_before_fence}) EXPECT_TRUE(message.passes(shape, message.kernel(send, receive)));
    for (const auto& send : {send_relaxed, send_before_fence})
      for (const auto& receive : {receive_acquire, receive_before_fence}) EXPECT_TRUE(message.races(shape, message.kernel(send, receive)));
    for (const auto& receive : {receive_relaxed, receive_behind_fence})
      EXPECT_TRUE(message.races(shape, message.kernel(send_release, receive)));
  }
}

TEST(MessagePassing, AFenceOfBlockScopeServesOneBlockOnly) {
  Message message;
  const Shape one_block{{1}, {64}};
  EXPECT_TRUE(message.passes(one_block, message.kernel(send_behind_block_fence, receive_before_block_fence)));
  EXPECT_TRUE(message.passes(one_block, message.kernel(send_behind_block_fence, receive_before_fence)));
  EXPECT_TRUE(message.passes(one_block, message.kernel(send_behind_fence, receive_before_block_fence)));
  EXPECT_TRUE(message.passes(one_block, message.kernel(send_behind_block_fence, receive_acquire)));
  EXPECT_TRUE(message.races(kTwoBlocks, message.kernel(send_behind_block_fence, receive_before_block_fence)));
  EXPECT_TRUE(message.races(kTwoBlocks, message.kernel(send_behind_block_fence, receive_before_fence)));
  EXPECT_TRUE(message.races(kTwoBlocks, message.kernel(send_behind_fence, receive_before_block_fence)));
  EXPECT_TRUE(message.races(kTwoBlocks, message.kernel(send_behind_block_fence, receive_acquire)));
}

TEST(MessagePassing, AReadModifyWriteContinuesTheReleaseSequenceAndAStoreEndsIt) {
  Message message;
  Buffer<uint32_t> go(1);
  enum Middle { kReadModifyWrite, kReduction, kStore };
  const auto kernel = [&](Middle middle) {
    return [&, middle] {
      uint32_t* const flag = message.flag.data();
      if (block_index() == 0) {
        store(message.data.data(), 42);
        atomic_store(flag, 1, Order::kRelease);
      } else if (block_index() == 1) {
        atomic_store(go.data(), 0);
        while (atomic_load(flag) != 1) sleep();
        if (middle == kReadModifyWrite) atomic_add(flag, 1);
        if (middle == kStore) atomic_store(flag, 2);
        if (middle == kReduction) {
          reduction_access(flag, 4, Order::kRelaxed, Space::kGlobal, Place());
          *flag = 2;
        }
        atomic_store(go.data(), 1);
      } else {
        // Only once the flag is 2 is it looked at: whoever had seen the 1 would have acquired.
        while (atomic_load(go.data()) == 0 || *flag != 2) sleep();
        atomic_load(flag, Order::kAcquire);
        load(message.data.data());
      }
    };
  };
  EXPECT_TRUE(message.passes({{3}, {1}}, kernel(kReadModifyWrite)));
  EXPECT_TRUE(message.passes({{3}, {1}}, kernel(kReduction)));
  EXPECT_TRUE(message.races({{3}, {1}}, kernel(kStore)));
}

TEST(MessagePassing, AStoreToAPartOfTheVariableEndsTheReleaseSequence) {
  Buffer<uint32_t> data(1), go(1);
  Buffer<uint64_t> flag(1);
  for (const bool with_store : {false, true}) {
    go[0] = 0;
    const auto failure = failure_of({{3}, {1}}, [&] {
      if (block_index() == 0) {
        store(data.data(), 42);
        atomic_store(flag.data(), 1, Order::kRelease);
        atomic_add(go.data(), 1);
      } else if (block_index() == 1) {
        while (atomic_load(go.data()) != 1) sleep();
        if (with_store) atomic_store(reinterpret_cast<uint32_t*>(flag.data()) + 1, 1);
        atomic_add(go.data(), 1);
      } else {
        while (atomic_load(go.data()) != 2) sleep();
        atomic_load(flag.data(), Order::kAcquire);
        load(data.data());
      }
    });
    EXPECT_EQ(failure.has_value(), with_store);
  }
}

TEST(MessagePassing, AReductionCannotAcquire) {
  Message message;
  const auto receive = [](uint32_t* flag) -> uint32_t {
    const uint32_t value = *flag;
    reduction_access(flag, 4, Order::kAcquire, Space::kGlobal, Place());
    fence_all();
    return value;
  };
  EXPECT_TRUE(message.races({{2}, {1}}, message.kernel(send_release, receive)));
}

TEST(MessagePassing, GoesOnThroughAThirdBlock) {
  Buffer<uint32_t> data(1), flags(2);
  for (uint64_t seed = 0; seed < 5; ++seed) {
    flags[0] = flags[1] = 0;
    const auto failure = failure_of(
        {{3}, {1}},
        [&] {
          if (block_index() == 0) {
            store(data.data(), 42);
            atomic_store(flags + 0, 1, Order::kRelease);
          } else if (block_index() == 1) {
            while (atomic_load(flags + 0, Order::kAcquire) == 0) sleep();
            atomic_store(flags + 1, 1, Order::kRelease);
          } else {
            while (atomic_load(flags + 1, Order::kAcquire) == 0) sleep();
            EXPECT_EQ(load(data.data()), 42u);
          }
        },
        fuzzed(seed));
    EXPECT_FALSE(failure) << failure->what();
  }
}

TEST(MessagePassing, StatusAndValueInOneWordNeedNoFence) {
  Buffer<uint64_t> slots(40);
  Buffer<uint32_t> sums(40);
  EXPECT_TRUE(is_right({{40}, {1}}, [&] {
    const uint64_t tile = block_index();
    if (self().grid_dim.x != 40) return;
    atomic_store(slots + tile, uint64_t{1} << 32 | tile);
    store(sums + tile, static_cast<uint32_t>(atomic_load(slots + (tile == 0 ? 0 : tile - 1))));
  }));
}

// ---- the last block

struct Ticket {
  Buffer<uint32_t> partial{64 * 8}, ticket{1}, sum{1};

  std::function<void()> kernel(const std::function<uint32_t(uint32_t*)>& take) {
    return [this, take] {
      store(partial + grid_thread_index(), static_cast<uint32_t>(grid_thread_index()));
      if (take(ticket.data()) != self().grid_dim.x - 1) return;
      if (thread_index() != 5) return;
      uint32_t total = 0;
      for (size_t i = 0; i < 64 * 8; ++i) total += load(partial + i);
      store(sum.data(), total);
    };
  }
  std::optional<Failure> outcome(const std::function<uint32_t(uint32_t*)>& take, uint64_t seed) {
    ticket[0] = 0;
    return failure_of({{8}, {64}, 4}, kernel(take), fuzzed(seed));
  }
};

uint32_t tell_block(uint32_t mine) {
  if (thread_index() == 0) store(shared<uint32_t>(), mine);
  sync_block();
  return load(shared<uint32_t>());
}

TEST(LastBlock, FencesOfThreadZeroBetweenTheBarriersAreRight) {
  Ticket ticket;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const auto failure = ticket.outcome(
        [](uint32_t* counter) {
          sync_block();
          uint32_t mine = 0;
          if (thread_index() == 0) {
            fence_all();
            mine = atomic_add(counter, 1);
            if (mine == self().grid_dim.x - 1) fence_all();
          }
          return tell_block(mine);
        },
        seed);
    EXPECT_FALSE(failure) << failure->what();
    EXPECT_EQ(ticket.sum[0], 64u * 8 * (64 * 8 - 1) / 2);
  }
}

TEST(LastBlock, FencesOfAllThreadsBeforeTheBarrierAreNotEnough) {
  Ticket ticket;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const auto failure = ticket.outcome(
        [](uint32_t* counter) {
          fence_all();
          sync_block();
          uint32_t mine = 0;
          if (thread_index() == 0) {
            mine = atomic_add(counter, 1);
            fence_all();
          }
          return tell_block(mine);
        },
        seed);
    ASSERT_TRUE(failure) << "seed " << seed;
    EXPECT_EQ(failure->kind, FailureKind::kDataRace) << failure->what();
  }
}

TEST(LastBlock, AMissingStepIsFound) {
  enum Step { kFirstBarrier, kFirstFence, kSecondFence };
  for (const Step missing : {kFirstBarrier, kFirstFence, kSecondFence}) {
    Ticket ticket;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const auto failure = ticket.outcome(
          [missing](uint32_t* counter) {
            if (missing != kFirstBarrier) sync_block();
            uint32_t mine = 0;
            if (thread_index() == 0) {
              if (missing != kFirstFence) fence_all();
              mine = atomic_add(counter, 1);
              if (missing != kSecondFence) fence_all();
            }
            return tell_block(mine);
          },
          seed);
      ASSERT_TRUE(failure) << "missing step " << missing << ", seed " << seed;
      EXPECT_EQ(failure->kind, FailureKind::kDataRace) << failure->what();
    }
  }
}

TEST(LastBlock, WithoutTheBarrierBehindTheTicketIsFound) {
  EXPECT_TRUE(fails_with(FailureKind::kDataRace, {{1}, {64}, 4}, [] {
    if (thread_index() == 0) store(shared<uint32_t>(), 1);
    ballot(true);
    if (thread_index() != 0 && thread_index() < 32) load(shared<uint32_t>());
  }));
}

} // namespace
} // namespace simt::testing
