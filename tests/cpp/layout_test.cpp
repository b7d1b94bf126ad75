#include "layout.h"

#include <cmath>
#include <stdexcept>

#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::Random;
using Numbers = std::vector<int64_t>;

std::string refusal(const Numbers& segment_numels, const Numbers& segment_groups, const Numbers& group_k) {
  try {
    (void)Layout::make(segment_numels, segment_groups, group_k);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

// ---- k

TEST(SelectionK, IsTheCeilingOfTheProductInDouble) {
  EXPECT_EQ(selection_k(0.01, 1000), 10);
  EXPECT_EQ(selection_k(0.01, 1001), 11);
  EXPECT_EQ(selection_k(0.5, 7), 4);
  // In double 0.07 * 100 is 7.000000000000001, and Python's math.ceil makes 8 of it: both languages have to.
  EXPECT_EQ(selection_k(0.07, 100), 8);
  EXPECT_EQ(selection_k(0.29, 100), 29);
  EXPECT_EQ(selection_k(0.001, 2147483647), 2147484);

  constexpr uint64_t kSeed = 1;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  for (int i = 0; i < 10000; ++i) {
    const double density = std::ldexp(static_cast<double>((random.bits() >> 11) + 1), -53);
    const int64_t numel = random.integer(1, int64_t{1} << 31);
    const double product = density * static_cast<double>(numel);
    ASSERT_EQ(selection_k(density, numel), static_cast<int64_t>(std::ceil(product))) << "density " << density << ", numel " << numel;
  }
}

TEST(SelectionK, IsAtLeastOneAndAtMostNumel) {
  EXPECT_EQ(selection_k(1e-12, 5), 1);
  EXPECT_EQ(selection_k(std::numeric_limits<double>::denorm_min(), 1), 1);
  EXPECT_EQ(selection_k(1.0, 5), 5);
  EXPECT_EQ(selection_k(std::nextafter(1.0, 0.0), 1000), 1000);
  EXPECT_EQ(selection_k(1.0, 2147483647), 2147483647);
}

TEST(SelectionK, IsZeroForAnEmptyTensor) {
  EXPECT_EQ(selection_k(0.01, 0), 0);
  EXPECT_EQ(selection_k(1.0, 0), 0);
}

TEST(SelectionK, RefusesDensitiesOutsideZeroToOne) {
  for (const double density : {0.0, -0.5, 1.0000001, 100.0, std::nan(""), HUGE_VAL}) {
    try {
      (void)selection_k(density, 100);
      ADD_FAILURE() << "accepted " << density;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("density must be in (0, 1], got"), std::string::npos) << error.what();
    }
  }
}

// ---- positions

TEST(Layout, PlacesSegmentsGroupsAndDensePartsOneAfterAnother) {
  //                                  0   1   2  3   4  5   6
  const Layout layout = Layout::make(Numbers{10, 3, 20, 0, 5, 7, 4}, Numbers{0, -1, 1, -1, 1, -1, 2}, Numbers{2, 6, 4});
  EXPECT_EQ(layout.numel, 49);
  EXPECT_EQ(layout.selected_numel, 12);
  EXPECT_EQ(layout.dense_numel, 10);

  const Numbers offsets{0, 10, 13, 33, 33, 38, 45};
  const Numbers dense_offsets{0, 0, 0, 3, 0, 3, 0};
  ASSERT_EQ(layout.segments.size(), offsets.size());
  for (size_t s = 0; s < offsets.size(); ++s) {
    SCOPED_TRACE("segment " + std::to_string(s));
    EXPECT_EQ(layout.segments[s].offset, offsets[s]);
    if (layout.segments[s].group == kDenseGroup) {
      EXPECT_EQ(layout.segments[s].dense_offset, dense_offsets[s]);
    }
  }

  ASSERT_EQ(layout.groups.size(), 3u);
  EXPECT_EQ(layout.groups[0].numel, 10);
  EXPECT_EQ(layout.groups[1].numel, 25);
  EXPECT_EQ(layout.groups[2].numel, 4);
  EXPECT_EQ(layout.groups[0].entry_offset, 0);
  EXPECT_EQ(layout.groups[1].entry_offset, 2);
  EXPECT_EQ(layout.groups[2].entry_offset, 8);
  EXPECT_EQ(layout.groups[1].first_segment, 2);
  EXPECT_EQ(layout.groups[1].last_segment, 4);
}

TEST(Layout, MayBeEmptyOrAllDense) {
  const Layout empty = Layout::make({}, {}, {});
  EXPECT_EQ(empty.numel, 0);
  EXPECT_EQ(empty.selected_numel, 0);
  EXPECT_EQ(empty.dense_numel, 0);

  const Layout dense = Layout::make(Numbers{4, 5}, Numbers{-1, -1}, {});
  EXPECT_TRUE(dense.groups.empty());
  EXPECT_EQ(dense.dense_numel, 9);
}

// ---- refused descriptions

TEST(Layout, RefusesAsManyGroupsAsNotSegments) {
  EXPECT_EQ(refusal({1, 2}, {0}, {1}), "layout: expected one group per segment but got 2 segments and 1 groups");
}

TEST(Layout, RefusesANegativeNumel) { EXPECT_EQ(refusal({3, -2}, {-1, -1}, {}), "layout: segment 1 has a negative numel -2"); }

TEST(Layout, RefusesGroupsThatAreNotNumberedInBucketOrder) {
  const std::string words = "layout: groups must be numbered 0, 1, 2, .. in bucket order (-1 = dense), ";
  EXPECT_EQ(refusal({4, 4}, {1, 0}, {1, 1}), words + "segment 0 has group 1");
  EXPECT_EQ(refusal({4, 4}, {0, 2}, {1, 1}), words + "segment 1 has group 2");
  EXPECT_EQ(refusal({4, 4, 4}, {0, 1, 0}, {1, 1}), words + "segment 2 has group 0");
  EXPECT_EQ(refusal({4, 4}, {0, -2}, {1}), words + "segment 1 has group -2");
}

TEST(Layout, RefusesAsManyKAsNotGroups) {
  EXPECT_EQ(refusal({4, 4}, {0, 1}, {1}), "layout: expected one k per group but got 2 groups and 1 k");
  EXPECT_EQ(refusal({4}, {-1}, {1}), "layout: expected one k per group but got 0 groups and 1 k");
}

TEST(Layout, RefusesKOutsideOneToNumelOfTheGroup) {
  EXPECT_EQ(refusal({4, 9}, {0, 1}, {4, 0}), "layout: k of group 1 must be in [1, 9], got 0");
  EXPECT_EQ(refusal({4, 9}, {0, 1}, {5, 9}), "layout: k of group 0 must be in [1, 4], got 5");
  EXPECT_EQ(refusal({4}, {0}, {-1}), "layout: k of group 0 must be in [1, 4], got -1");
  EXPECT_EQ(refusal({0}, {0}, {1}), "layout: k of group 0 must be in [1, 0], got 1");
}

TEST(Layout, HoldsAsManyEntriesAsAnInt32CanIndex) {
  constexpr int64_t kLimit = 2147483647;
  EXPECT_EQ(Layout::make(Numbers{kLimit - 5, 5}, Numbers{0, -1}, Numbers{1}).numel, kLimit);
  EXPECT_EQ(Layout::make(Numbers{kLimit}, Numbers{0}, Numbers{kLimit}).selected_numel, kLimit);
  const std::string refused = refusal({kLimit - 5, 6}, {0, -1}, {1});
  EXPECT_NE(refused.find("at most 2147483647 entries, segment 1 goes beyond"), std::string::npos) << refused;
  EXPECT_NE(refused.find("dense_steps >= 1"), std::string::npos) << "the remedy is missing: " << refused;
  // A sum that would wrap around in int64 is no way in.
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  EXPECT_NE(refusal({kHuge, kHuge}, {-1, -1}, {}).find("segment 0 goes beyond"), std::string::npos);
  EXPECT_NE(refusal({1, kHuge}, {-1, -1}, {}).find("segment 1 goes beyond"), std::string::npos);
}

// ---- hash

TEST(Layout, HashIsEqualForEqualLayoutsAndDiffersForAnyOtherDescription) {
  const Layout layout = Layout::make(Numbers{8, 4, 8}, Numbers{0, -1, 1}, Numbers{2, 3});
  EXPECT_EQ(layout.hash, Layout::make(Numbers{8, 4, 8}, Numbers{0, -1, 1}, Numbers{2, 3}).hash);

  const std::vector<Layout> others = {
      Layout::make(Numbers{8, 4, 8}, Numbers{0, -1, 1}, Numbers{3, 2}),        // k moved between groups
      Layout::make(Numbers{8, 4, 8}, Numbers{0, -1, 1}, Numbers{2, 2}),        // another k
      Layout::make(Numbers{8, 4, 8}, Numbers{0, -1, 0}, Numbers{5}),           // one group
      Layout::make(Numbers{8, 4, 8}, Numbers{-1, 0, 1}, Numbers{2, 3}),        // another dense segment
      Layout::make(Numbers{4, 8, 8}, Numbers{-1, 0, 1}, Numbers{2, 3}),        // another order
      Layout::make(Numbers{8, 4, 8, 0}, Numbers{0, -1, 1, -1}, Numbers{2, 3}), // an empty segment more
      Layout::make(Numbers{8, 4, 9}, Numbers{0, -1, 1}, Numbers{2, 3}),        // one entry more
      Layout::make({}, {}, {}),
  };
  for (size_t i = 0; i < others.size(); ++i) {
    EXPECT_NE(layout.hash, others[i].hash) << "other layout " << i;
    for (size_t j = 0; j < i; ++j) EXPECT_NE(others[i].hash, others[j].hash) << i << " and " << j;
  }
}

TEST(Hash, IsFnv1aWithItsPublishedVectors) {
  EXPECT_EQ(hash_bytes("", 0), 0xcbf29ce484222325ull);
  EXPECT_EQ(hash_bytes("a", 1), 0xaf63dc4c8601ec8cull);
  EXPECT_EQ(hash_bytes("foobar", 6), 0x85944171f73967e8ull);
  EXPECT_EQ(hash_bytes("bar", 3, hash_bytes("foo", 3)), hash_bytes("foobar", 6)) << "continued";
}

} // namespace
} // namespace compressed_ddp
