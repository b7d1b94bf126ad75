// Memory: where it ends, whether it was written, how accesses must be aligned, and that what was released is gone.
#include "memory.h"

#include "kernels_in_cpp.h"

namespace simt::testing {
namespace {

constexpr Shape kOneThread{{1}, {1}}, kOneBlock{{1}, {128}, 1024};

TEST(Memory, IsGuardedOnBothSides) {
  Buffer<uint32_t> words(100);
  for (const int64_t index : {int64_t{-1}, int64_t{-64}, int64_t{100}, int64_t{163}}) {
    const auto failure = failure_of(kOneThread, [&] { plain_access(words.data() + index, 4, false, Space::kGlobal, Place()); });
    ASSERT_TRUE(failure) << index;
    EXPECT_EQ(failure->kind, FailureKind::kOutOfBounds);
    EXPECT_NE(message_of(failure).find("offset " + std::to_string(index * 4) + " of the allocation of 400 bytes, the nearest"),
              std::string::npos)
        << failure->what();
  }
}

TEST(Memory, AVectorThatReachesOverTheEndFails) {
  Buffer<uint32_t> words(101);
  EXPECT_FALSE(failure_of(kOneThread, [&] { plain_access(words + 96, 16, true, Space::kGlobal, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneThread, [&] { plain_access(words + 100, 16, true, Space::kGlobal, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneThread,
                         [&] { atomic_access(words + 102, 8, true, true, Order::kRelaxed, Space::kGlobal, Place()); }));
}

TEST(Memory, SharedMemoryEndsWhereItEnds) {
  EXPECT_TRUE(
      fails_with(FailureKind::kOutOfBounds, kOneBlock, [] { plain_access(self().shared + 1024, 4, true, Space::kShared, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneBlock, [] { plain_access(self().shared - 4, 4, true, Space::kShared, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneBlock, [] { plain_access(self().shared, 4, true, Space::kGlobal, Place()); }));
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneThread, [] { plain_access(self().shared, 1, true, Space::kShared, Place()); }));
}

TEST(Memory, UnwrittenBytesMayNotBeRead) {
  Buffer<uint16_t> halves(64, false);
  EXPECT_TRUE(fails_with(FailureKind::kUninitialized, kOneThread, [&] { load(halves + 3); }));
  run(kOneThread, [&] { store(halves + 3, 7); });
  EXPECT_FALSE(failure_of(kOneThread, [&] { load(halves + 3); }));
  EXPECT_TRUE(fails_with(FailureKind::kUninitialized, kOneThread, [&] { load(reinterpret_cast<uint32_t*>(halves + 2)); }));
  mark_initialized(halves + 2, 2);
  EXPECT_FALSE(failure_of(kOneThread, [&] { load(reinterpret_cast<uint32_t*>(halves + 2)); }));
  EXPECT_TRUE(fails_with(FailureKind::kUninitialized, kOneThread, [&] { atomic_add(reinterpret_cast<uint32_t*>(halves + 4), 1); }));
}

TEST(Memory, EachBlockFindsItsSharedMemoryUnwritten) {
  LaunchOptions options;
  options.blocks_in_flight = 1;
  const auto failure = failure_of(
      {{2}, {1}, 64},
      [] {
        if (block_index() == 0)
          store(shared<uint32_t>(), 1);
        else
          load(shared<uint32_t>());
      },
      options);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kUninitialized);
}

TEST(Memory, AccessesMustBeAligned) {
  Buffer<uint32_t> words(64);
  const auto* bytes = reinterpret_cast<const std::byte*>(words.data());
  for (const size_t size : {2, 4, 8, 16}) {
    EXPECT_TRUE(
        fails_with(FailureKind::kMisaligned, kOneThread, [&] { plain_access(bytes + size / 2, size, false, Space::kGlobal, Place()); }));
    EXPECT_FALSE(failure_of(kOneThread, [&] { plain_access(bytes + size, size, false, Space::kGlobal, Place()); }));
  }
  EXPECT_TRUE(fails_with(FailureKind::kMisaligned, kOneThread,
                         [&] { atomic_access(bytes + 2, 4, true, true, Order::kRelaxed, Space::kGlobal, Place()); }));
}

TEST(Memory, OfOthersIsAllowedOnlyIfAskedFor) {
  uint32_t word = 0;
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneThread, [&] { store(&word, 1); }));
  LaunchOptions options;
  options.foreign_memory = true;
  EXPECT_FALSE(failure_of({{2}, {32}}, [&] { store(&word, 5); }, options));
  EXPECT_EQ(word, 5u);
  // Memory of ours keeps its bounds.
  Buffer<uint32_t> words(4);
  const auto failure = failure_of(kOneThread, [&] { plain_access(words + 4, 4, true, Space::kGlobal, Place()); }, options);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kOutOfBounds);
}

TEST(Memory, ReleasedIsNotAllocated) {
  auto* words = static_cast<uint32_t*>(allocate(4096, true));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(words) % 256, 0u);
  EXPECT_EQ(words[1023], 0xeeeeeeeeu);
  EXPECT_TRUE(is_allocated(words, 4096));
  EXPECT_TRUE(is_allocated(words + 1, 4092));
  EXPECT_FALSE(is_allocated(words + 1, 4096));
  EXPECT_FALSE(is_allocated(&words, 1));
  EXPECT_THROW(release(words + 1), std::invalid_argument);
  release(words);
  EXPECT_FALSE(is_allocated(words, 1));
  EXPECT_TRUE(fails_with(FailureKind::kOutOfBounds, kOneThread, [&] { plain_access(words, 4, true, Space::kGlobal, Place()); }));
  EXPECT_THROW(release(words), std::invalid_argument);
  release(nullptr);
}

TEST(Memory, IsUnwrittenAgainWhenItIsAllocatedAgain) {
  for (int i = 0; i < 1000; ++i) { // enough to come around to the same addresses
    auto* bytes = static_cast<uint8_t*>(allocate(size_t{1} << 20));
    ASSERT_TRUE(failure_of(kOneThread, [&] { load(bytes + 4096); }));
    run(kOneThread, [&] { store(bytes + 4096, 1); });
    release(bytes);
  }
}

} // namespace
} // namespace simt::testing
