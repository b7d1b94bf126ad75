// The execution system on kernels with one mistake each (planted_bugs.cu): every mistake is noticed, and for what it is. Some never give
// a wrong value in any order (a fence is missing, say); only the race detector can tell.
#include <gtest/gtest.h>

#include <numeric>

#include "device_memory.h"
#include "planted_bugs.h"
#include "simt.h"
#include "stand_in_runtime.h"

namespace compressed_ddp::testing {
namespace {

using simt::FailureKind;
using Words = std::vector<uint32_t>;

class PlantedBugs : public ::testing::Test {
 protected:
  void TearDown() override {
    simt::reset_device();
    simt::default_options() = saved_;
  }

  // Runs under several seeds and orders until the device fails; kNone must never. Returns how it failed.
  template <typename Run>
  std::optional<simt::DeviceFailure> failure_of(Run&& run) {
    for (uint64_t seed = 1; seed <= 4; ++seed)
      for (const auto order : {simt::BlockOrder::kAscending, simt::BlockOrder::kDescending, simt::BlockOrder::kRandom}) {
        simt::default_options().seed = seed;
        simt::default_options().block_order = order;
        simt::default_options().fuzz = seed > 1;
        run();
        cudaDeviceSynchronize();
        if (simt::device_failure()) {
          const auto failure = simt::device_failure();
          simt::reset_device();
          return failure;
        }
      }
    return std::nullopt;
  }

  void expect(PlantedBug bug, FailureKind kind, const std::function<void(PlantedBug)>& run) {
    const auto of_right_kernel = failure_of([&] { run(PlantedBug::kNone); });
    EXPECT_FALSE(of_right_kernel) << "the right kernel fails: " << of_right_kernel->message;
    const auto failure = failure_of([&] { run(bug); });
    ASSERT_TRUE(failure) << "nobody has noticed";
    EXPECT_EQ(failure->kind, kind) << failure->message;
    EXPECT_NE(failure->message.find("planted_bugs_cu"), std::string::npos) << failure->message; // in the kernel's name
  }

  simt::LaunchOptions saved_ = simt::default_options();
};

class PlantedInSum : public PlantedBugs {
 protected:
  static constexpr int kBlocks = 5, kNumel = 1000;
  PlantedInSum() : values_(Words(kNumel, 3), 0), partial_(kBlocks), ticket_(Words{0}, 0), sum_(1) {}
  void expect_in_sum(PlantedBug bug, FailureKind kind) {
    expect(bug, kind, [&](PlantedBug planted) {
      ticket_.upload(Words{0});
      run_sum(values_.data(), kNumel, partial_.data(), ticket_.data(), sum_.data(), kBlocks, planted);
    });
  }
  DeviceMemory<uint32_t> values_, partial_, ticket_, sum_;
};

TEST_F(PlantedInSum, AMissingBarrierIsARace) { expect_in_sum(PlantedBug::kNoBarrier, FailureKind::kDataRace); }
TEST_F(PlantedInSum, AMissingFenceBeforeTheTicketIsARace) { expect_in_sum(PlantedBug::kNoFenceBeforeTicket, FailureKind::kDataRace); }
TEST_F(PlantedInSum, AMissingFenceAfterTheTicketIsARace) { expect_in_sum(PlantedBug::kNoFenceAfterTicket, FailureKind::kDataRace); }
TEST_F(PlantedInSum, ALaneThatItsMaskLeavesOutIsNamed) { expect_in_sum(PlantedBug::kWrongMask, FailureKind::kWrongMask); }

TEST_F(PlantedBugs, AMissingSyncWarpIsARace) {
  DeviceMemory<uint32_t> values(Words(32, 1), 0);
  expect(PlantedBug::kNoSyncWarp, FailureKind::kDataRace, [&](PlantedBug bug) { run_rotate(values.data(), bug); });
}

TEST_F(PlantedBugs, ASlotThatOverflowsIsOutOfBounds) {
  DeviceMemory<uint32_t> values(Words(128, 9), 0), slots(100), counts(1);
  expect(PlantedBug::kSlotOverflow, FailureKind::kOutOfBounds,
         [&](PlantedBug bug) { run_slots(values.data(), 5, slots.data(), counts.data(), 100, 1, bug); });
}

TEST_F(PlantedBugs, ALookBackByBlockIndexHangs) {
  constexpr int kBlocks = 20; // more than are in flight
  DeviceMemory<uint32_t> ticket(1), published(kBlocks);
  expect(PlantedBug::kLookBackByBlockIndex, FailureKind::kHang, [&](PlantedBug bug) {
    ticket.fill_bytes(0);
    published.fill_bytes(0);
    run_chain(ticket.data(), published.data(), kBlocks, bug);
  });
}

TEST_F(PlantedBugs, ALostTieShowsInTheResult) {
  const Words values = {5, 7, 5, 9, 5, 1, 5, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  DeviceMemory<uint32_t> device(values, 0), out(5);
  for (const PlantedBug bug : {PlantedBug::kNone, PlantedBug::kLostTie}) {
    out.fill_bytes(0);
    run_ties(device.data(), 5, 2, out.data(), bug);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(out.download() == (Words{0, 1, 2, 3, 7}), bug == PlantedBug::kNone);
  }
}

// A missing wait between streams: device_queue_test.cpp.

} // namespace
} // namespace compressed_ddp::testing
