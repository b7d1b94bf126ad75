#include "cpu/restore.h"

#include <cmath>

#include "cpu/compensate_select.h"
#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::bits_of;
using testing::same_bits;
using testing::segment_pointers;
using testing::TypedBuffer;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;

// One rank's step: the selection goes straight into the payload, and the residual keeps the rest.
Bytes compress(const Layout& layout, const std::vector<float>& gradient, const uint8_t* unused, std::vector<float>& residual) {
  Bytes payload(static_cast<size_t>(payload_bytes(layout)));
  const PayloadEntries entries = payload_entries(layout, payload.data());
  const std::vector<float*> residuals = segment_pointers(layout, residual.data());
  CompensateSelect plan(layout);
  compensate_select(plan, {gradient.data(), GradientType::kFloat32, residuals.data(), unused, entries.indices, entries.values},
                    testing::all_cuts()[0].parallel_for);
  encode_dense(layout, gradient.data(), GradientType::kFloat32, unused, payload.data());
  encode_header(layout, 0, 1, 0, false, payload.data());
  return payload;
}

void restore_into(const Layout& layout, const Bytes& payload, const uint8_t* unused, std::vector<float>& residual) {
  restore(layout, payload.data(), unused, segment_pointers(layout, residual.data()).data());
}

TEST(Restore, GivesBackTheCompensatedValueBitForBit) {
  constexpr uint64_t kSeed = 1;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  const Layout layout = Layout::make(Numbers{70000, 30, 500, 10, 1}, Numbers{0, -1, 0, 1, 2}, Numbers{700, 10, 1});
  const std::vector<float> gradient = testing::normal_values(layout.numel, kSeed);
  const std::vector<float> before = testing::normal_values(layout.numel, kSeed + 1);
  std::vector<float> residual = before;
  const Bytes payload = compress(layout, gradient, nullptr, residual);
  restore_into(layout, payload, nullptr, residual);

  std::vector<float> expected = before; // in dense segments nothing ever changes
  for (const Segment& segment : layout.segments)
    for (int64_t i = segment.offset; segment.group != kDenseGroup && i < segment.offset + segment.numel; ++i)
      expected[static_cast<size_t>(i)] += gradient[static_cast<size_t>(i)];
  EXPECT_TRUE(same_bits(expected, residual));
}

TEST(Restore, ANegativeZeroComesBackAsPositiveZero) {
  const Layout layout = testing::one_group(2, 2);
  std::vector<float> residual{-0.0f, 1.0f};
  const Bytes payload = compress(layout, {-0.0f, 1.0f}, nullptr, residual);
  restore_into(layout, payload, nullptr, residual);
  EXPECT_TRUE(same_bits(std::vector<float>{0.0f, 2.0f}, residual));
}

TEST(Restore, PassesOverUnusedSegments) {
  const Layout layout = Layout::make(Numbers{4, 4, 4}, Numbers{0, 1, 2}, Numbers{2, 2, 2});
  const std::vector<uint8_t> unused{0, 1, 0};
  std::vector<float> residual(12, 0.5f);
  const Bytes payload = compress(layout, std::vector<float>(12, 1.0f), unused.data(), residual);
  restore_into(layout, payload, unused.data(), residual);
  const std::vector<float> expected{1.5f, 1.5f, 1.5f, 1.5f, 0.5f, 0.5f, 0.5f, 0.5f, 1.5f, 1.5f, 1.5f, 1.5f};
  EXPECT_TRUE(same_bits(expected, residual));

  // Whatever a payload holds for such a segment.
  Bytes foreign = testing::random_payload(layout, 0, 1, 0, 2);
  const std::vector<uint8_t> all_unused{1, 1, 1};
  restore_into(layout, foreign, all_unused.data(), residual);
  EXPECT_TRUE(same_bits(expected, residual));
}

TEST(Restore, PassesOverNonFiniteEntriesWhoseResidualNeverLeft) {
  const Layout layout = testing::one_group(6, 4);
  const std::vector<float> gradient{1.0f, HUGE_VALF, 3.0f, std::nanf(""), -HUGE_VALF, 2.0f};
  std::vector<float> residual{0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f};
  const Bytes payload = compress(layout, gradient, nullptr, residual);
  restore_into(layout, payload, nullptr, residual);
  EXPECT_TRUE(same_bits(std::vector<float>{1.25f, 0.5f, 3.75f, 1.0f, 1.25f, 3.5f}, residual));
}

TEST(Restore, AddsToWhatHasGatheredSince) {
  const Layout layout = testing::one_group(3, 1);
  std::vector<float> residual{0, 0, 0};
  const Bytes payload = compress(layout, {1.0f, -8.0f, 2.0f}, nullptr, residual);
  residual = {10.0f, 20.0f, 30.0f};
  restore_into(layout, payload, nullptr, residual);
  EXPECT_TRUE(same_bits(std::vector<float>{10.0f, 12.0f, 30.0f}, residual));
}

TEST(Restore, SeveralPayloadsOfOneStepBringEverythingBack) {
  // Integers, so that every sum is exact in any order.
  const Layout layout = testing::one_group(1000, 10);
  std::vector<float> residual(1000), total(1000);
  std::vector<Bytes> payloads;
  testing::Random random(3);
  for (int step = 0; step < 5; ++step) {
    std::vector<float> gradient(1000);
    for (size_t i = 0; i < gradient.size(); ++i) {
      gradient[i] = static_cast<float>(random.integer(-1000, 1001));
      total[i] += gradient[i];
    }
    payloads.push_back(compress(layout, gradient, nullptr, residual));
  }
  for (const Bytes& payload : payloads) restore_into(layout, payload, nullptr, residual);
  for (size_t i = 0; i < total.size(); ++i) EXPECT_EQ(residual[i], total[i]) << i;
}

TEST(Restore, HostileIndicesStayInsideTheCompressedSegments) {
  constexpr uint64_t kSeed = 4;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  testing::Random random(kSeed);
  //                                  0  1  2  3  4  5
  const Layout layout = Layout::make(Numbers{5, 3, 0, 7, 4, 6}, Numbers{0, -1, 1, 1, -1, 2}, Numbers{3, 4, 5});
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
  for (int round = 0; round < 5000; ++round) {
    Bytes payload = testing::random_payload(layout, 0, 1, 0, kSeed);
    const PayloadEntries entries = payload_entries(layout, payload.data());
    for (int64_t e = 0; e < layout.selected_numel; ++e) {
      const int32_t choices[] = {kMin,
                                 -1,
                                 static_cast<int32_t>(random.bits()),
                                 static_cast<int32_t>(random.integer(-3, layout.numel + 4)),
                                 static_cast<int32_t>(layout.numel),
                                 kMax};
      entries.indices[e] = choices[random.integer(0, 6)];
    }
    // Every segment in an allocation of its own and of its exact size: AddressSanitizer sees any step beyond.
    std::vector<std::vector<float>> segments;
    std::vector<float*> residuals;
    for (const Segment& segment : layout.segments) segments.emplace_back(static_cast<size_t>(segment.numel), 7.0f);
    for (auto& segment : segments) residuals.push_back(segment.data());
    residuals[1] = residuals[4] = nullptr; // dense segments have none
    restore(layout, payload.data(), nullptr, residuals.data());
  }
}

} // namespace
} // namespace compressed_ddp
