// What the counters count: the bytes that threads ask for, and the sectors of memory that warps touch.
#include "counters.h"

#include "kernels_in_cpp.h"

namespace simt::testing {
namespace {

struct alignas(16) Vector {
  uint32_t words[4];
};

Counters counted(Shape shape, const std::function<void()>& body, const LaunchOptions& options = {}) {
  reset_counters();
  run(shape, body, options);
  return counters().at("kernel");
}

constexpr Shape kOneWarp{{1}, {32}}, kBlocks{{4}, {128}};

TEST(Sectors, OfACoalescedReadAreFourPerWarp) {
  Buffer<uint32_t> words(32 + 512);
  EXPECT_EQ(counted(kOneWarp, [&] { load(words + thread_index()); }).sectors_read, 4u);
  EXPECT_EQ(counted(kOneWarp, [&] { load(words + (thread_index() + 1)); }).sectors_read, 5u);
  const Counters all = counted(kBlocks, [&] { load(words + grid_thread_index()); });
  EXPECT_EQ(all.sectors_read, 64u);
  EXPECT_EQ(all.global_bytes_read, 2048u);
  EXPECT_EQ(all.sectors_written, 0u);
}

TEST(Sectors, OfAStridedReadAreOnePerLane) {
  Buffer<uint32_t> words(32 * 300);
  EXPECT_EQ(counted(kOneWarp, [&] { load(words + 8 * thread_index()); }).sectors_read, 32u);
  EXPECT_EQ(counted(kOneWarp, [&] { load(words + 300 * thread_index()); }).sectors_read, 32u);
  EXPECT_EQ(counted(kOneWarp, [&] { load(words + 2 * thread_index()); }).sectors_read, 8u);
  EXPECT_EQ(counted(kOneWarp, [&] { load(words.data()); }).sectors_read, 1u);
}

TEST(Sectors, OfVectorsAreSixteenPerWarp) {
  Buffer<Vector> vectors(32);
  const Counters read = counted(kOneWarp, [&] { plain_access(vectors + thread_index(), 16, false, Space::kGlobal, Place()); });
  EXPECT_EQ(read.sectors_read, 16u);
  EXPECT_EQ(read.global_bytes_read, 512u);
  EXPECT_EQ(read.accesses_of_16_bytes, 32u);
  EXPECT_EQ(read.global_accesses, 32u);
  const Counters written = counted(kOneWarp, [&] { plain_access(vectors + thread_index(), 16, true, Space::kGlobal, Place()); });
  EXPECT_EQ(written.sectors_written, 16u);
  EXPECT_EQ(written.global_bytes_written, 512u);
}

TEST(Sectors, AreCountedForEachInstructionAndEachExecutionOfIt) {
  Buffer<uint32_t> words(32);
  EXPECT_EQ(counted(kOneWarp,
                    [&] {
                      load(words + thread_index());
                      load(words + thread_index());
                    })
                .sectors_read,
            8u);
  EXPECT_EQ(counted(kOneWarp,
                    [&] {
                      for (int i = 0; i < 10; ++i) load(words + thread_index());
                    })
                .sectors_read,
            40u);
}

TEST(Sectors, DoNotDependOnWhoRunsFirst) {
  Buffer<uint32_t> words(512 * 20);
  const auto body = [&] {
    for (uint32_t i = 0; i < 20; ++i) load(words + (512 * i + grid_thread_index()));
  };
  for (uint64_t seed = 0; seed < 4; ++seed) EXPECT_EQ(counted(kBlocks, body, fuzzed(seed)).sectors_read, 20u * 64);
}

TEST(Sectors, AreRightInLongLoopsOfLanesThatDoNotRunInStep) {
  constexpr uint32_t kRounds = 3000;
  Buffer<uint32_t> words(32);
  EXPECT_EQ(counted(kOneWarp,
                    [&] {
                      for (uint32_t i = 0; i < kRounds; ++i) load(words + thread_index());
                    })
                .sectors_read,
            4u * kRounds);
}

TEST(Sectors, OfAWarpWhoseLanesDivergeAreThoseOfTheLanesThatExecute) {
  Buffer<uint32_t> words(64);
  const Counters all = counted({{1}, {64}}, [&] {
    if (thread_index() % 2 == 0) load(words + thread_index());
    if (thread_index() < 8) load(words + thread_index());
  });
  EXPECT_EQ(all.sectors_read, 8u + 1u);
}

TEST(Counter, CountsAtomicsAsReadAndWrittenAndReductionsAsWritten) {
  Buffer<uint32_t> words(32);
  const Counters atomics = counted(kOneWarp, [&] { atomic_add(words + thread_index(), 1); });
  EXPECT_EQ(atomics.global_atomics, 32u);
  EXPECT_EQ(atomics.global_bytes_read, 128u);
  EXPECT_EQ(atomics.global_bytes_written, 128u);
  EXPECT_EQ(atomics.sectors_read, 4u);
  EXPECT_EQ(atomics.sectors_written, 4u);
  const Counters reductions = counted(kOneWarp, [&] { reduction_access(words.data(), 4, Order::kRelaxed, Space::kGlobal, Place()); });
  EXPECT_EQ(reductions.global_bytes_read, 0u);
  EXPECT_EQ(reductions.global_bytes_written, 128u);
  EXPECT_EQ(reductions.sectors_written, 1u);
}

TEST(Counter, LeavesSharedMemoryOut) {
  const Counters all = counted({{2}, {32}, 256}, [] { store(shared<uint32_t>() + thread_index(), 1); });
  EXPECT_EQ(all.global_accesses, 0u);
  EXPECT_EQ(all.sectors_written, 0u);
  EXPECT_EQ(all.shared_bytes_peak, 256u);
}

TEST(Counter, AddsUpByKernel) {
  reset_counters();
  const auto body = [] {
    self().instructions += 7;
    fence_all();
  };
  launch("one", {2}, {16}, 0, body);
  launch("one", {1}, {16}, 100, body);
  launch("two", {1}, {8}, 50, body);
  EXPECT_EQ(counters().size(), 2u);
  EXPECT_EQ(counters().at("one").launches, 2u);
  EXPECT_EQ(counters().at("one").instructions, 7u * 48);
  EXPECT_EQ(counters().at("two").fences, 8u);
  const Counters all = total();
  EXPECT_EQ(all.launches, 3u);
  EXPECT_EQ(all.fences, 56u);
  EXPECT_EQ(all.shared_bytes_peak, 100u);
  reset_counters();
  EXPECT_EQ(total().launches, 0u);
}

TEST(Counter, CountsForeignMemoryToo) {
  std::vector<uint32_t> words(64);
  LaunchOptions options;
  options.foreign_memory = true;
  EXPECT_EQ(counted(kOneWarp, [&] { load(words.data() + thread_index()); }, options).global_bytes_read, 128u);
}

} // namespace
} // namespace simt::testing
