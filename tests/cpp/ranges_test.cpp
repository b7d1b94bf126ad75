// Where the ranges of a split exchange end.
#include "ranges.h"

#include <limits>

#include "testing.h"
#include "wire_format.h"

namespace compressed_ddp {
namespace {

using testing::Random;
using Parts = std::vector<RangePart>;
using Numbers = std::vector<int64_t>;

int64_t numel_of(const Parts& parts) {
  int64_t numel = 0;
  for (const RangePart& part : parts) numel += part.numel;
  return numel;
}

// The payload of [begin, end), by way of a layout.
int64_t bytes_of(const Parts& parts, int64_t begin, int64_t end, const RangeRule& rule) {
  Numbers numels, groups, group_numels, k;
  int64_t at = 0;
  for (const RangePart& part : parts) {
    const int64_t numel = std::min(end, at + part.numel) - std::max(begin, at);
    at += part.numel;
    if (numel <= 0) continue;
    numels.push_back(numel);
    if (!part.dense && (!rule.one_selection || group_numels.empty())) group_numels.push_back(0);
    if (!part.dense) group_numels.back() += numel;
    groups.push_back(part.dense ? -1 : static_cast<int64_t>(group_numels.size()) - 1);
  }
  for (const int64_t numel : group_numels) k.push_back(selection_k(rule.density, numel));
  return payload_bytes(Layout::make(numels, groups, k, rule.value_format));
}

// The least that the largest of `count` payloads can have, by trying everything.
int64_t least_largest(const Parts& parts, int64_t count, const RangeRule& rule) {
  const int64_t numel = numel_of(parts), units = (numel + kRangeNumel - 1) / kRangeNumel;
  Numbers least(static_cast<size_t>(units) + 1, std::numeric_limits<int64_t>::max()); // of [0, unit u) in so many ranges
  least[0] = 0;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t end = units; end > 0; --end)
      for (int64_t begin = 0; begin < end; ++begin) {
        const int64_t last = bytes_of(parts, begin * kRangeNumel, std::min(end * kRangeNumel, numel), rule);
        int64_t& of_end = least[static_cast<size_t>(end)];
        of_end = std::min(of_end, std::max(least[static_cast<size_t>(begin)], last));
      }
  return least.back();
}

TEST(RangeEnds, MakeTheLargestPayloadAsSmallAsItCanBe) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    Parts parts;
    for (int64_t p = random.integer(1, 6); p > 0; --p) parts.push_back({random.integer(0, 60), random.one_in(3)});
    const RangeRule rule{0.01 + 0.2 * static_cast<double>(random.integer(0, 5)), testing::kValueFormats[seed % 3], random.one_in(2)};
    const int64_t count = random.integer(1, 7), numel = numel_of(parts);
    SCOPED_TRACE("seed " + std::to_string(seed) + ", numel " + std::to_string(numel) + ", count " + std::to_string(count));
    const Numbers ends = range_ends(parts, count, rule);
    ASSERT_EQ(static_cast<int64_t>(ends.size()), count);
    int64_t begin = 0, largest = 0;
    for (const int64_t end : ends) {
      ASSERT_GE(end, begin);
      ASSERT_TRUE(end % kRangeNumel == 0 || end == numel) << end;
      ASSERT_TRUE(end > begin || begin == numel) << "an empty range before " << begin;
      if (end > begin) largest = std::max(largest, bytes_of(parts, begin, end, rule));
      begin = end;
    }
    ASSERT_EQ(begin, numel);
    EXPECT_EQ(largest, least_largest(parts, count, rule));
  }
}

TEST(RangeEnds, OfAThousandOwnersDifferByLittleMoreThanTheAlignment) {
  Parts parts; // 25 MiB in chunks
  for (int64_t c = 0; c < 1600; ++c) parts.push_back({4096, false});
  const RangeRule rule{0.01, ValueFormat::kBFloat16, false};
  const Numbers ends = range_ends(parts, 1024, rule);
  int64_t begin = 0, sum = 0, largest = 0;
  for (const int64_t end : ends) {
    const int64_t bytes = bytes_of(parts, begin, end, rule);
    sum += bytes, largest = std::max(largest, bytes);
    begin = end;
  }
  EXPECT_LT(static_cast<double>(largest), static_cast<double>(sum) / 1024 + 2 * kPayloadAlignment);
}

TEST(RangeEnds, OfNothingAreAllAtItsEnd) {
  EXPECT_EQ(range_ends(Parts{}, 3, {0.01, ValueFormat::kFloat32, false}), (Numbers{0, 0, 0}));
  EXPECT_EQ(range_ends(Parts{{0, true}}, 2, {0.01, ValueFormat::kFloat32, false}), (Numbers{0, 0}));
  EXPECT_EQ(range_ends(Parts{{5, true}}, 2, {0.01, ValueFormat::kFloat32, false}), (Numbers{5, 5}));
}

} // namespace
} // namespace compressed_ddp
