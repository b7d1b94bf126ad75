#include "cpu/return_dropped.h"

#include "cpu/restore.h"
#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::same_bits;
using testing::segment_pointers;
using testing::TypedBuffer;
using Numbers = std::vector<int64_t>;

const Layout kLayout = Layout::make(Numbers{6, 2, 4}, Numbers{0, -1, 1}, Numbers{3, 2}, ValueFormat::kFloat32);
const Entries kEntries{{0, 2, 5, 8, 11}, {1, -2, 3, 4, -5}};

std::vector<float> zeros() { return std::vector<float>(static_cast<size_t>(kLayout.numel)); }

TEST(ReturnDropped, GivesBackWhatTheResultDoesNotHold) {
  for (const GradientType type : testing::kGradientTypes) {
    TypedBuffer result(type, zeros());
    for (const int64_t held : {2, 11}) result.set(held, 0.5f);
    result.set(5, -0.0f); // a zero is a zero
    std::vector<float> residual = zeros();
    residual[0] = 10;
    uint32_t returned = ~0u;
    const double grown_sq =
        return_dropped(kLayout, kEntries, result.data(), type, segment_pointers(kLayout, residual.data()).data(), &returned);
    EXPECT_EQ(returned, 0b01101u);
    EXPECT_EQ(grown_sq, (121.0 - 100) + 9 + 16);
    std::vector<float> expected = zeros();
    expected[0] = 11, expected[5] = 3, expected[8] = 4;
    EXPECT_TRUE(same_bits(expected, residual));

    // And restore then gives back the rest.
    restore(kLayout, kEntries, segment_pointers(kLayout, residual.data()).data(), &returned);
    expected[2] = -2, expected[11] = -5;
    EXPECT_TRUE(same_bits(expected, residual));
  }
}

TEST(ReturnDropped, ABadStepReturnsNothingYet) {
  TypedBuffer result(GradientType::kFloat32, kLayout.numel);
  for (int64_t i = 0; i < kLayout.numel; ++i) result.set(i, std::bit_cast<float>(kCanonicalNanBits));
  std::vector<float> residual = zeros();
  uint32_t returned = ~0u;
  return_dropped(kLayout, kEntries, result.data(), GradientType::kFloat32, segment_pointers(kLayout, residual.data()).data(), &returned);
  EXPECT_EQ(returned, 0u);
  EXPECT_TRUE(same_bits(zeros(), residual));
}

TEST(AddLost, IsUndoneByTheOppositeFactor) {
  Entries averages = kEntries;
  averages.values[1] = 0; // decodes to 0: its senders keep it
  std::vector<float> lost = zeros(), residual = zeros();
  for (size_t i = 0; i < lost.size(); ++i) lost[i] = static_cast<float>(i) + 1;
  const std::vector<float*> residuals = segment_pointers(kLayout, residual.data());
  residual[5] = 1;
  EXPECT_EQ(add_lost(kLayout, averages, lost.data(), 4, GradientType::kFloat32, residuals.data()),
            4.0 * 4 + (25.0 * 25 - 1) + 36.0 * 36 + 48.0 * 48);
  std::vector<float> expected = zeros();
  expected[0] = 4, expected[5] = 25, expected[8] = 36, expected[11] = 48;
  EXPECT_TRUE(same_bits(expected, residual));
  add_lost(kLayout, averages, lost.data(), -4, GradientType::kFloat32, residuals.data());
  expected = zeros();
  expected[5] = 1;
  EXPECT_TRUE(same_bits(expected, residual));
}

// Where the result is 0 in 16 bits, its senders keep everything.
TEST(AddLost, LeavesOutWhatIsZeroInTheTypeOfTheResult) {
  for (const GradientType type : testing::kGradientTypes) {
    const float largest_zero = std::bit_cast<float>(largest_zero_key(type));
    const float smallest = std::bit_cast<float>(largest_zero_key(type) + 1);
    with_gradient_type(type, [&](auto gradient) {
      from_float(largest_zero, gradient);
      EXPECT_EQ(to_float(gradient), 0);
      from_float(smallest, gradient);
      EXPECT_NE(to_float(gradient), 0);
    });
    const Entries averages{{0, 2, 5, 8, 11}, {largest_zero, smallest, -largest_zero, -smallest, 1}};
    std::vector<float> lost(static_cast<size_t>(kLayout.numel), 1.0f), residual = zeros();
    add_lost(kLayout, averages, lost.data(), 4, type, segment_pointers(kLayout, residual.data()).data());
    std::vector<float> expected = zeros();
    expected[2] = expected[8] = expected[11] = 4;
    EXPECT_TRUE(same_bits(expected, residual));
  }
}

} // namespace
} // namespace compressed_ddp
