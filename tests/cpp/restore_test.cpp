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

// One rank's step: the residual keeps the rest.
Bytes compress(const Layout& layout, const std::vector<float>& gradient, const uint8_t* unused, std::vector<float>& residual) {
  Bytes payload(static_cast<size_t>(payload_bytes(layout)));
  const auto entries = static_cast<size_t>(layout.selected_numel);
  std::vector<float> values(entries);
  std::vector<int32_t> indices(entries);
  const std::vector<float*> residuals = segment_pointers(layout, residual.data());
  CompensateSelect plan(layout);
  const CompensateSelectStatistics selected = compensate_select(
      plan, {gradient.data(), GradientType::kFloat32, residuals.data(), unused, indices.data(), values.data()}, testing::in_one_go);
  encode_dense(layout, gradient.data(), GradientType::kFloat32, unused, payload.data());
  const bool is_kept = layout.value_format == ValueFormat::kBFloat16;
  encode_selected(layout, {values.data(), indices.data(), is_kept ? nullptr : residuals.data(), selected.non_finite > 0, payload.data()},
                  testing::in_one_go);
  encode_header(layout, 0, 0, selected.non_finite > 0, payload.data());
  return payload;
}

void restore_into(const Layout& layout, const Bytes& payload, std::vector<float>& residual) {
  restore(layout, testing::entries_of(layout, payload.data()), segment_pointers(layout, residual.data()).data());
}

TEST(Restore, GivesBackTheCompensatedValueBitForBit) {
  constexpr uint64_t kSeed = 1;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  for (const ValueFormat value_format : {ValueFormat::kFloat32, ValueFormat::kBFloat16}) {
    SCOPED_TRACE(name_of(value_format));
    const Layout layout = Layout::make(Numbers{70000, 30, 500, 10, 1}, Numbers{0, -1, 0, 1, 2}, Numbers{700, 10, 1}, value_format);
    const std::vector<float> gradient = testing::normal_values(layout.numel, kSeed);
    const std::vector<float> before = testing::normal_values(layout.numel, kSeed + 1);
    std::vector<float> residual = before;
    const Bytes payload = compress(layout, gradient, nullptr, residual);
    restore_into(layout, payload, residual);

    std::vector<float> expected = before; // in dense segments nothing ever changes
    for (const Segment& segment : layout.segments)
      for (int64_t i = segment.offset; segment.group != kDenseGroup && i < segment.offset + segment.numel; ++i)
        expected[static_cast<size_t>(i)] += gradient[static_cast<size_t>(i)];
    EXPECT_TRUE(same_bits(expected, residual));
  }
}

TEST(Restore, GivesBackSignValuesToTwoRoundings) {
  constexpr uint64_t kSeed = 5;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  const Layout layout = Layout::make(Numbers{7000, 30, 500}, Numbers{0, -1, 1}, Numbers{700, 10}, ValueFormat::kSign);
  const std::vector<float> gradient = testing::normal_values(layout.numel, kSeed);
  std::vector<float> residual(gradient.size());
  const Bytes payload = compress(layout, gradient, nullptr, residual);
  restore_into(layout, payload, residual);
  for (const Segment& segment : layout.segments)
    for (auto i = static_cast<size_t>(segment.offset);
         segment.group != kDenseGroup && i < static_cast<size_t>(segment.offset + segment.numel); ++i)
      EXPECT_NEAR(gradient[i], residual[i], 4 * 0x1p-24f * std::abs(gradient[i]) + 1e-6f) << i;
}

TEST(Restore, ANegativeZeroComesBackAsPositiveZero) {
  const Layout layout = testing::one_group(2, 2);
  std::vector<float> residual{-0.0f, 1.0f};
  const Bytes payload = compress(layout, {-0.0f, 1.0f}, nullptr, residual);
  restore_into(layout, payload, residual);
  EXPECT_TRUE(same_bits(std::vector<float>{0.0f, 2.0f}, residual));
}

// Of segments without a gradient zeros are sent; as signs they count like the others of their group, and so come back, too.
TEST(Restore, LeavesUnusedSegmentsAsTheyWere) {
  const std::vector<uint8_t> unused{0, 1, 0};
  for (const ValueFormat value_format : testing::kValueFormats) {
    SCOPED_TRACE(name_of(value_format));
    const Layout layout = Layout::make(Numbers{4, 4, 4}, Numbers{0, 0, 0}, Numbers{10}, value_format);
    std::vector<float> residual(12, 0.5f);
    const Bytes payload = compress(layout, std::vector<float>(12, 1.0f), unused.data(), residual);
    restore_into(layout, payload, residual);
    for (size_t i = 0; i < residual.size(); ++i) EXPECT_NEAR(residual[i], i / 4 == 1 ? 0.5f : 1.5f, 1e-6f) << i;
  }
}

TEST(Restore, PassesOverNonFiniteEntriesWhoseResidualNeverLeft) {
  const Layout layout = testing::one_group(6, 4);
  const std::vector<float> gradient{1.0f, HUGE_VALF, 3.0f, std::nanf(""), -HUGE_VALF, 2.0f};
  std::vector<float> residual{0.25f, 0.5f, 0.75f, 1.0f, 1.25f, 1.5f};
  const Bytes payload = compress(layout, gradient, nullptr, residual);
  restore_into(layout, payload, residual);
  EXPECT_TRUE(same_bits(std::vector<float>{1.25f, 0.5f, 3.75f, 1.0f, 1.25f, 3.5f}, residual));
}

TEST(Restore, AddsToWhatHasGatheredSince) {
  const Layout layout = testing::one_group(3, 1);
  std::vector<float> residual{0, 0, 0};
  const Bytes payload = compress(layout, {1.0f, -8.0f, 2.0f}, nullptr, residual);
  residual = {10.0f, 20.0f, 30.0f};
  restore_into(layout, payload, residual);
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
  for (const Bytes& payload : payloads) restore_into(layout, payload, residual);
  for (size_t i = 0; i < total.size(); ++i) EXPECT_EQ(residual[i], total[i]) << i;
}

TEST(Restore, EntriesInADenseSegmentArePassedOver) { // a group over several segments may have one in its span
  const Layout layout = Layout::make(Numbers{3, 2, 3}, Numbers{0, -1, 0}, Numbers{3});
  const Bytes payload = testing::payload_of_entries(layout, {0, 3, 7}, {1, 2, 4}, nullptr, 0, 0);
  std::vector<float> first(3), last(3);
  float* const residuals[] = {first.data(), nullptr, last.data()};
  restore(layout, testing::entries_of(layout, payload.data()), residuals);
  EXPECT_TRUE(same_bits(std::vector<float>{1, 0, 0}, first));
  EXPECT_TRUE(same_bits(std::vector<float>{0, 0, 4}, last));
}

} // namespace
} // namespace compressed_ddp
