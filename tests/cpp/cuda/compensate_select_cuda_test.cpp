// compensate_select_ and encode on CUDA against the CPU engine, bit for bit: payload bytes and residual.
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "cuda_cases.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using cuda::kTileNumel;
using cuda::Method;
using Numbers = std::vector<int64_t>;

constexpr Method kMethods[] = {Method::kOnePass, Method::kTwoPasses};
const char* name_of(Method method) { return method == Method::kOnePass ? "one pass" : "two passes"; }

void expect_as_on_cpu(const SelectionCase& c, CudaPlan& plan, size_t gradient_front = 0, size_t residual_front = 0) {
  const EncodedCase expected = on_cpu(c);
  for (const Method method : kMethods) {
    SCOPED_TRACE(name_of(method));
    expect_same(c.layout, expected, plan.run(c, method, gradient_front, residual_front));
    if (::testing::Test::HasFatalFailure()) return;
    ASSERT_TRUE(plan.workspace_is_clear());
  }
}

TEST(CompensateSelectCuda, EqualsTheCpuEngineOnAdversarialDataOfAllTypes) {
  const int64_t t = kTileNumel;
  // A small group, one of several tiles with a tail, a dense segment between, one in which nearly all is sent.
  const auto layout_with = [&](ValueFormat value_format) {
    return Layout::make(Numbers{300, 3 * t + 77, 50, 2 * t + 1, t}, Numbers{0, 1, -1, 2, 3},
                        Numbers{3, selection_k(0.01, 3 * t + 77), 7000, 41}, value_format);
  };
  std::vector<std::unique_ptr<CudaPlan>> plans;
  for (const ValueFormat value_format : kValueFormats) plans.push_back(std::make_unique<CudaPlan>(layout_with(value_format)));
  size_t round = 0; // the value formats take turns
  for (const Data data : kAllData)
    for (const GradientType type : kGradientTypes)
      for (const bool error_feedback : {true, false}) {
        if (type != GradientType::kFloat32 && !error_feedback) continue;
        const size_t format = round++ % kValueFormats.size();
        const Layout layout = layout_with(kValueFormats[format]);
        SCOPED_TRACE(std::string(testing::name_of(data)) + ", " + testing::name_of(type) + (error_feedback ? "" : ", no residual") + ", " +
                     name_of(layout.value_format) + ", seed 31");
        expect_as_on_cpu(make_case(layout, type, make_data(data, layout.numel, 31), error_feedback), *plans[format]);
        if (HasFatalFailure()) return;
      }
}

TEST(CompensateSelectCuda, EqualsTheCpuEngineAtAllTails) {
  // Every residue of the vector width and both sides of tiles, runs and rows; densities from one entry to everything.
  Numbers numels;
  for (int64_t n = 1; n <= 9; ++n) numels.push_back(n);
  const int64_t row = 1024, t = kTileNumel;
  for (const int64_t border : {row, t, t + row, t + 2 * row, t + 3 * row, 2 * t, 8 * t})
    for (int64_t d = -2; d <= 2; ++d) numels.push_back(border + d);
  for (const int64_t numel : numels)
    for (const double density : {1e-9, 0.03, 0.5, 1.0}) {
      if (numel > 8000 && density > 0.4) continue;
      if (numel > kTileNumel + 2 && numel < 8000 && density != 0.03) continue; // the rows of a large group's last tile
      SCOPED_TRACE("numel " + std::to_string(numel) + ", density " + std::to_string(density) + ", seed 32");
      const ValueFormat value_format = kValueFormats[static_cast<size_t>(numel) % kValueFormats.size()];
      const Layout layout = Layout::make(Numbers{numel}, Numbers{0}, Numbers{selection_k(density, numel)}, value_format);
      const GradientType type = kGradientTypes[static_cast<size_t>(numel + std::lround(density * 100)) % kGradientTypes.size()];
      CudaPlan plan(layout);
      expect_as_on_cpu(make_case(layout, type, make_data(Data::kNormal, numel, 32), true), plan);
      if (HasFatalFailure()) return;
    }
}

TEST(CompensateSelectCuda, EqualsTheCpuEngineOnSmallGroupsAlone) { // which take a launch of their own
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout =
        Layout::make(Numbers{300, 1, 70, kTileNumel, 1025}, Numbers{0, 1, -1, 2, 3}, Numbers{3, 1, 40, 900}, value_format);
    CudaPlan plan(layout);
    for (const Data data : {Data::kNormal, Data::kTies, Data::kSomeNan})
      for (const GradientType type : kGradientTypes) {
        SCOPED_TRACE(std::string(testing::name_of(data)) + ", " + testing::name_of(type) + ", " + name_of(value_format) + ", seed 38");
        expect_as_on_cpu(make_case(layout, type, make_data(data, layout.numel, 38), true), plan);
        if (HasFatalFailure()) return;
      }
  }
}

Layout two_runs(ValueFormat value_format) { // so that blocks meet in the tickets and in the look-back
  const int64_t numel = 12 * kTileNumel + 5;
  return Layout::make(Numbers{numel}, Numbers{0}, Numbers{numel / 100}, value_format);
}

// Groups of one tile, in a launch of their own and in the one that large groups bring along.
void expect_small_groups_as_on_cpu(Numbers numels, Numbers k, const std::function<void(const Layout&, GradientAndResidual&)>& change) {
  Numbers groups;
  for (const bool beside_large : {false, true}) {
    if (beside_large) numels.insert(numels.begin(), kTileNumel + 1), k.insert(k.begin(), 40);
    groups.resize(numels.size());
    std::iota(groups.begin(), groups.end(), 0);
    for (const ValueFormat value_format : kValueFormats) {
      SCOPED_TRACE(std::string(name_of(value_format)) + (beside_large ? ", beside a large one" : "") + ", seed 49");
      const Layout layout = Layout::make(numels, groups, k, value_format);
      CudaPlan plan(layout);
      GradientAndResidual data = make_data(Data::kNormal, layout.numel, 49);
      change(layout, data);
      SelectionCase c = make_case(layout, GradientType::kFloat32, data, true);
      expect_as_on_cpu(c, plan);
      for (size_t s = 0; s < numels.size(); ++s) c.unused.push_back(s % 3 == 0);
      expect_as_on_cpu(c, plan);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

// They end in every row of a block, with every entry of a thread.
TEST(CompensateSelectCuda, EqualsTheCpuEngineOnSmallGroupsOfAllTails) {
  Numbers numels, k;
  for (const int64_t row : {0, 1024, 2048, 3072, 4096})
    for (int64_t numel = row - 3; numel <= std::min<int64_t>(row + 3, kTileNumel - 1); ++numel)
      if (numel > 0) numels.push_back(numel), k.push_back(1 + numel / 50);
  expect_small_groups_as_on_cpu(numels, k, [](const Layout&, GradientAndResidual&) {});
  if (HasFatalFailure()) return;
  expect_small_groups_as_on_cpu(numels, k, [](const Layout& layout, GradientAndResidual& data) { // the last entry of each
    for (const Segment& segment : layout.segments) data.gradient[static_cast<size_t>(segment.offset + segment.numel - 1)] = NAN;
  });
}

// All entries are equal: the last one that is taken lies in every row of a block, and is every entry of a thread.
TEST(CompensateSelectCuda, TiesEndAnywhereInASmallGroup) {
  Numbers k;
  for (int64_t row = 0; row < kTileNumel; row += 1024)
    for (int64_t j = 0; j < 4; ++j) k.push_back(row + 500 + j);
  expect_small_groups_as_on_cpu(Numbers(k.size(), kTileNumel), k, [](const Layout&, GradientAndResidual& data) {
    std::fill(data.gradient.begin(), data.gradient.end(), 1.0f);
    std::fill(data.residual.begin(), data.residual.end(), 0.0f);
  });
}

// An eighth of all keys at a time, spread evenly in the logarithm, so that every bin of every thread holds some.
TEST(CompensateSelectCuda, EqualsTheCpuEngineOnValuesOfEveryMagnitude) {
  for (uint32_t eighth = 0; eighth < 8; ++eighth) {
    const Layout layout = two_runs(kValueFormats[eighth % kValueFormats.size()]);
    CudaPlan plan(layout);
    GradientAndResidual data = make_data(Data::kNormal, layout.numel, 50);
    Random random(50);
    for (float& g : data.gradient) {
      const uint32_t key = eighth << 28 | static_cast<uint32_t>(random.integer(0, 1 << 28));
      g = std::copysign(float_of(std::min(key, kInfinityKey - 1)), g);
    }
    std::fill(data.residual.begin(), data.residual.end(), 0.0f);
    const SelectionCase c = make_case(layout, GradientType::kFloat32, data, true);
    const EncodedCase expected = on_cpu(c);
    for (const Method method : kMethods) {
      SCOPED_TRACE("eighth " + std::to_string(eighth) + ", " + name_of(method) + ", seed 50");
      const EncodedCase got = plan.run(c, method); // but for the statistics, whose squares overflow
      expect_same_payload(layout, expected.payload, got.payload);
      if (HasFatalFailure()) return;
      ASSERT_TRUE(same_bits(expected.residual, got.residual));
      ASSERT_TRUE(plan.workspace_is_clear());
    }
  }
}

// Whichever thread of whichever warp meets it, and nobody else.
TEST(CompensateSelectCuda, OneNonFiniteEntryFlagsThePayloadWhereverItLies) {
  const Numbers with_large{kTileNumel - 3, 2 * kTileNumel + 77, 900}, small_only{300, 2000, 900};
  for (const ValueFormat value_format : kValueFormats)
    for (const Numbers& segments : {with_large, small_only}) {
      const Layout layout = Layout::make(segments, Numbers{0, 1, -1}, Numbers{3, 40}, value_format);
      CudaPlan plan(layout);
      for (const Segment& segment : layout.segments)
        for (const int64_t at : {int64_t{0}, int64_t{77}, segment.numel / 2 + 1, segment.numel - 1}) {
          SCOPED_TRACE(std::string(name_of(value_format)) + ", segment at " + std::to_string(segment.offset) + ", entry " +
                       std::to_string(at) + ", seed 44");
          GradientAndResidual data = make_data(Data::kNormal, layout.numel, 44);
          data.gradient[static_cast<size_t>(segment.offset + at)] = at % 2 == 0 ? INFINITY : -NAN;
          const SelectionCase c = make_case(layout, GradientType::kFloat32, data, true);
          ASSERT_EQ(read_header(on_cpu(c).payload.data()).flags, kFlagNonFinite);
          expect_as_on_cpu(c, plan);
          if (HasFatalFailure()) return;
        }
    }
}

TEST(CompensateSelectCuda, TheLargestFiniteNumberIsFinite) {
  for (const ValueFormat value_format : kValueFormats)
    for (const Numbers& segments : {Numbers{kTileNumel, kTileNumel + 77, 900}, Numbers{300, kTileNumel - 1, 900}})
      for (const bool beside_inf : {false, true}) { // then the residual of its tile is left to the last kernel
        SCOPED_TRACE(std::string(name_of(value_format)) + (beside_inf ? ", beside Inf" : "") + ", seed 45");
        const Layout layout = Layout::make(segments, Numbers{0, 1, -1}, Numbers{40, 40}, value_format);
        CudaPlan plan(layout);
        GradientAndResidual data = make_data(Data::kNormal, layout.numel, 45);
        for (const Segment& segment : layout.segments)
          for (int64_t row = 0; row < segment.numel; row += 1024)
            for (int64_t i = row + 60; i < std::min(row + 64, segment.numel); ++i) { // every entry of a thread, in every row
              const auto at = static_cast<size_t>(segment.offset + i);
              data.gradient[at] = -std::numeric_limits<float>::max();
              data.residual[at] = 1; // which the sum swallows
              if (beside_inf) data.gradient[at + 8] = INFINITY;
            }
        const SelectionCase c = make_case(layout, GradientType::kFloat32, data, true);
        const EncodedCase expected = on_cpu(c);
        ASSERT_EQ(read_header(expected.payload.data()).flags, beside_inf ? kFlagNonFinite : 0);
        for (const Method method : kMethods) {
          const EncodedCase got = plan.run(c, method); // but for the statistics, whose squares overflow
          expect_same_payload(layout, expected.payload, got.payload);
          if (HasFatalFailure()) return;
          ASSERT_TRUE(same_bits(expected.residual, got.residual)) << name_of(method);
        }
      }
}

// Sums of ones have no rounding: every thread's part shows, whatever kind of segment it is of.
TEST(CompensateSelectCuda, NoEntryIsMissingFromTheSumsOfSquares) {
  const int64_t t = kTileNumel;
  for (const ValueFormat value_format : kValueFormats)
    for (const Numbers& segments : {Numbers{t - 5, 2 * t + 1023, 1500}, Numbers{300, 2000, 1500}}) {
      const Layout layout = Layout::make(segments, Numbers{0, 1, -1}, Numbers{30, 40}, value_format);
      CudaPlan plan(layout);
      const auto numel = static_cast<size_t>(layout.numel);
      const SelectionCase c = make_case(layout, GradientType::kFloat32, {std::vector<float>(numel, 1.0f), std::vector<float>(numel)}, true);
      for (const Method method : kMethods) {
        SCOPED_TRACE(std::string(name_of(value_format)) + ", " + name_of(method));
        const EncodedCase got = plan.run(c, method);
        EXPECT_EQ(got.gradient_sq, static_cast<double>(layout.numel));
        EXPECT_EQ(got.residual_sq, static_cast<double>(layout.numel - segments[2] - layout.selected_numel));
        EXPECT_EQ(got.sent_sq, static_cast<double>(layout.selected_numel));
      }
    }
}

TEST(CompensateSelectCuda, ZerosTravelWhereLessIsThere) {
  const int64_t t = kTileNumel; // tails that fill no warp's row
  for (const ValueFormat value_format : kValueFormats) {
    SCOPED_TRACE(name_of(value_format));
    const Layout layout = Layout::make(Numbers{2 * t + 77, t + 13, 301}, Numbers{0, 1, 2}, Numbers{900, 40, 200}, value_format);
    CudaPlan plan(layout);
    const std::vector<float> zeros(static_cast<size_t>(layout.numel));
    GradientAndResidual data{zeros, zeros};
    for (int64_t i = 0; i < layout.numel; i += 997) data.gradient[static_cast<size_t>(i)] = static_cast<float>(i % 7 - 3);
    expect_as_on_cpu(make_case(layout, GradientType::kFloat32, data, true), plan);
    if (HasFatalFailure()) return;
  }
}

TEST(CompensateSelectCuda, TwoSegmentsOfSignsAsTwoGroupsAndAsOne) { // searches end where two are left
  const int64_t t = kTileNumel;
  for (const Numbers& groups : {Numbers{0, 1}, Numbers{0, 0}}) {
    const Layout layout =
        Layout::make(Numbers{t + 77, t + 5}, groups, groups[1] == 0 ? Numbers{300} : Numbers{30, 290}, ValueFormat::kSign);
    CudaPlan plan(layout);
    expect_as_on_cpu(make_case(layout, GradientType::kFloat32, make_data(Data::kNormal, layout.numel, 46), true), plan);
    if (HasFatalFailure()) return;
  }
}

TEST(CompensateSelectCuda, MoreGroupsAndRunsThanABlockHasThreads) {
  constexpr int64_t kGroups = cuda::kThreads + 3;
  Numbers numels, groups, k;
  for (int64_t g = 0; g < kGroups; ++g) numels.push_back(kTileNumel + 1 + g % 3), groups.push_back(g), k.push_back(1 + g % 5);
  for (const ValueFormat value_format : kValueFormats) {
    SCOPED_TRACE(std::string(name_of(value_format)) + ", seed 47");
    const Layout layout = Layout::make(numels, groups, k, value_format);
    CudaPlan plan(layout);
    const SelectionCase c = make_case(layout, GradientType::kFloat32, make_data(Data::kNormal, layout.numel, 47), true);
    expect_same(layout, on_cpu(c), plan.run(c, Method::kOnePass));
    if (HasFatalFailure()) return;
    ASSERT_TRUE(plan.workspace_is_clear());
  }
}

TEST(CompensateSelectCuda, EqualsTheCpuEngineAtAnyAlignment) {
  const Layout layout = Layout::make(Numbers{5001, 3, 9001, 130}, Numbers{0, 1, 2, -1}, Numbers{50, 1, 90});
  CudaPlan plan(layout);
  for (const GradientType type : kGradientTypes)
    for (size_t gradient_front = 0; gradient_front < 4; ++gradient_front)
      for (const size_t residual_front : {0, 1, 3}) {
        SCOPED_TRACE(std::string(testing::name_of(type)) + ", gradient moved by " + std::to_string(gradient_front) + ", residual by " +
                     std::to_string(residual_front) + ", seed 33");
        expect_as_on_cpu(make_case(layout, type, make_data(Data::kNormal, layout.numel, 33), true), plan, gradient_front, residual_front);
        if (HasFatalFailure()) return;
      }
}

TEST(CompensateSelectCuda, EqualsTheCpuEngineOnOneGroupOverManySegments) {
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout =
        Layout::make(Numbers{100, 5000, 64, 9000, 1, 4096, 33}, Numbers{0, 0, -1, 0, 0, 0, -1}, Numbers{180}, value_format);
    CudaPlan plan(layout);
    for (const Data data : {Data::kNormal, Data::kTies, Data::kOneSpike, Data::kSomeNan, Data::kZeros}) {
      SCOPED_TRACE(std::string(testing::name_of(data)) + ", " + name_of(value_format) + ", seed 34");
      SelectionCase c = make_case(layout, GradientType::kFloat32, make_data(data, layout.numel, 34), true);
      expect_as_on_cpu(c, plan);
      c.unused = {0, 1, 1, 0, 0, 1, 0};
      SCOPED_TRACE("some segments unused");
      expect_as_on_cpu(c, plan);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CompensateSelectCuda, RandomCasesEqualTheCpuEngine) {
  for (uint64_t seed = 0; seed < 25; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const SelectionCase c = random_case(seed);
    CudaPlan plan(c.layout);
    expect_as_on_cpu(c, plan);
    if (HasFatalFailure()) return;
  }
}

TEST(CompensateSelectCuda, AGuessThatSaysNothingIsMended) {
  // Nearly all zeros: the guess gives up. A clump that fills some tiles: their slots overflow.
  const int64_t numel = two_runs(ValueFormat::kFloat32).numel;
  GradientAndResidual sparse = make_data(Data::kNormal, numel, 35);
  for (int64_t i = 0; i < numel; ++i)
    if (i % 90 != 0) sparse.gradient[static_cast<size_t>(i)] = sparse.residual[static_cast<size_t>(i)] = 0;
  GradientAndResidual clump = make_data(Data::kNormal, numel, 36);
  for (int64_t i = kTileNumel; i < 2 * kTileNumel; ++i) clump.gradient[static_cast<size_t>(i)] *= 1000.0f;
  for (const auto& [data, value_format] :
       {std::pair{sparse, ValueFormat::kBFloat16}, {clump, ValueFormat::kSign}, {sparse, ValueFormat::kSign}})
    for (const GradientType type : kGradientTypes) {
      SCOPED_TRACE(std::string(testing::name_of(type)) + ", " + name_of(value_format));
      const Layout layout = two_runs(value_format);
      CudaPlan plan(layout);
      expect_as_on_cpu(make_case(layout, type, data, true), plan);
      expect_as_on_cpu(make_case(layout, type, data, false), plan);
      if (HasFatalFailure()) return;
    }
}

// Large values that fill whole sectors, which is what the guess samples: it sees eight times fewer independent places than it counts on.
GradientAndResidual large_sectors(int64_t numel, int64_t num_sectors, uint64_t seed) {
  GradientAndResidual data = make_data(Data::kNormal, numel, seed);
  Random random(seed);
  for (int64_t s = 0; s < num_sectors; ++s) {
    const int64_t sector = random.integer(0, numel / cuda::kSectorNumel);
    for (int64_t i = sector * cuda::kSectorNumel; i < (sector + 1) * cuda::kSectorNumel; ++i)
      data.gradient[static_cast<size_t>(i)] = 50 * (1 + random.normal() / 4);
  }
  return data;
}

TEST(CompensateSelectCuda, AWrongGuessIsMended) {
  const int64_t numel = two_runs(ValueFormat::kFloat32).numel;
  constexpr uint64_t kSeed = 14; // with which the sample holds so many that fewer than k entries seem large enough
  const GradientAndResidual data = large_sectors(numel, numel / 100 / cuda::kSectorNumel, kSeed);
  for (const GradientType type : kGradientTypes) {
    const Layout layout = two_runs(kValueFormats[static_cast<size_t>(type)]);
    CudaPlan plan(layout);
    SCOPED_TRACE(std::string(testing::name_of(type)) + ", " + name_of(layout.value_format) + ", seed " + std::to_string(kSeed));
    expect_as_on_cpu(make_case(layout, type, data, true), plan);
    if (HasFatalFailure()) return;
  }
}

// Powers of two are where bins begin: thresholds, guessed well or badly, are then keys that entries have.
TEST(CompensateSelectCuda, EntriesAtTheEdgesOfBinsAreOnTheRightSide) {
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout = two_runs(value_format);
    CudaPlan plan(layout);
    const int64_t k = layout.selected_numel;
    const auto expect_equal = [&](const char* what, const auto& value) { // of entry i, whose place in a permutation is given, too
      SCOPED_TRACE(std::string(name_of(value_format)) + ", " + what);
      GradientAndResidual data = make_data(Data::kNormal, layout.numel, 48);
      for (size_t i = 0; i < data.gradient.size(); ++i) {
        const auto place = static_cast<int64_t>(i * 7919 % data.gradient.size());
        data.gradient[i] = std::copysign(value(place, data.gradient[i]), data.gradient[i]);
        data.residual[i] = 0;
      }
      expect_as_on_cpu(make_case(layout, GradientType::kFloat32, data, true), plan);
    };
    const auto tiny = [](float g) { return 0.01f * g; };
    expect_equal("one value", [&](int64_t place, float g) { return place < 2 * k ? 1.0f : tiny(g); });
    expect_equal("one value, and a few where the guess's bin of it ends", [&](int64_t place, float g) {
      return place < 10 ? 1.03125f : place < 2 * k ? 1.0f : tiny(g);
    });
    // Multiples of 2^-14 between 1 and 1.125 are where the bins of the second pass begin, 1.125 where its upper end is.
    expect_equal("all of them", [&](int64_t place, float g) {
      return place < k / 2 ? 1.125f : place < 2 * k ? 1 + static_cast<float>(place % 2048) / 16384 : tiny(g);
    });
    expect_equal("the k-th is the first of its bin", [&](int64_t place, float g) {
      return place < k - 1 ? 1.9f : place < 3 * k ? 1.05f : tiny(g);
    });
    // Where the guess's bins begin: all its thresholds are keys that entries have.
    expect_equal("a coarse grid", [&](int64_t, float g) { return float_of(bits_of(g) & ~0x3ffffu); });
    for (const int64_t fewer : {0, 1, 2}) // then zeros must travel
      expect_equal("zeros", [&](int64_t place, float g) { return place < k - fewer ? 1 + std::abs(g) : 0; });
    expect_equal("more Inf and NaN than can travel", [&](int64_t place, float g) {
      return place < k / 2 ? NAN : place < 2 * k ? INFINITY : g;
    });
    if (HasFatalFailure()) return;
  }
}

// The same where the guess is wrong, which these seeds make it. A run of one tile, and a sparse and a dense selection.
TEST(CompensateSelectCuda, EntriesAtTheEdgesOfBinsAreOnTheRightSideAfterAWrongGuess) {
  struct Case {
    int64_t numel, one_in;
    uint64_t seed;
  };
  enum Rest { kAsItIs, kKthIsTheFirstOfItsBin, kDenormal };
  size_t round = 0; // the value formats take turns
  for (const auto& [numel, one_in, seed] : {Case{12 * kTileNumel + 5, 100, 14}, {12 * kTileNumel + 5, 10, 2}, {9 * kTileNumel, 100, 1}})
    for (const Rest rest : {kAsItIs, kKthIsTheFirstOfItsBin, kDenormal})
      for (const bool error_feedback : {true, false}) {
        const int64_t k = numel / one_in;
        const ValueFormat value_format = kValueFormats[round++ % kValueFormats.size()];
        const Layout layout = Layout::make(Numbers{numel}, Numbers{0}, Numbers{k}, value_format);
        CudaPlan plan(layout);
        SCOPED_TRACE(std::string(name_of(value_format)) + ", numel " + std::to_string(numel) + ", density 1 / " + std::to_string(one_in) +
                     ", rest " + std::to_string(rest) + ", seed " + std::to_string(seed));
        GradientAndResidual data = large_sectors(numel, k / cuda::kSectorNumel, seed);
        data.residual.assign(data.residual.size(), 0);
        int64_t above = std::count_if(data.gradient.begin(), data.gradient.end(), [](float g) { return std::abs(g) > 20; });
        ASSERT_LT(above, k - 1);
        Random random(seed);
        for (float& g : data.gradient)
          if (std::abs(g) > 20)
            g = std::copysign(64.0f, g);
          else if (rest == kKthIsTheFirstOfItsBin)
            g = above < k - 1 ? (++above, 1.9f) : 1.05f;
          else if (rest == kDenormal)
            g = std::copysign(float_of(static_cast<uint32_t>(random.integer(1, 1 << 20))), g); // of the first bin
        SelectionCase c = make_case(layout, GradientType::kFloat32, data, error_feedback);
        if (rest == kAsItIs) c.unused = {0}; // asked, and used
        expect_as_on_cpu(c, plan);
        if (HasFatalFailure()) return;
      }
}

TEST(CompensateSelectCuda, ManyStepsKeepWhatWasNotSent) {
  struct Formats {
    GradientType type;
    ValueFormat value_format;
  };
  for (const auto& [type, value_format] : {Formats{GradientType::kFloat32, ValueFormat::kFloat32},
                                           {GradientType::kFloat32, ValueFormat::kBFloat16},
                                           {GradientType::kFloat32, ValueFormat::kSign},
                                           {GradientType::kFloat16, ValueFormat::kBFloat16},
                                           {GradientType::kBFloat16, ValueFormat::kSign}}) {
    const Layout layout =
        Layout::make(Numbers{2 * kTileNumel + 9, 700, kTileNumel + 5}, Numbers{0, 1, 2}, Numbers{90, 7, 50}, value_format);
    CudaPlan plan(layout);
    for (const Method method : kMethods) {
      std::vector<float> on_device(static_cast<size_t>(layout.numel)), on_host = on_device;
      for (uint64_t step = 0; step < 6; ++step) {
        SCOPED_TRACE(std::string(name_of(method)) + ", " + testing::name_of(type) + ", " + name_of(value_format) + ", step " +
                     std::to_string(step));
        const GradientAndResidual data = make_data(Data::kNormal, layout.numel, 40 + step);
        const EncodedCase expected = on_cpu({layout, TypedBuffer(type, data.gradient), on_host});
        const EncodedCase actual = plan.run({layout, TypedBuffer(type, data.gradient), on_device}, method);
        expect_same(layout, expected, actual);
        if (HasFatalFailure()) return;
        on_host = expected.residual;
        on_device = actual.residual;
      }
    }
  }
}

TEST(CompensateSelectCuda, ALayoutWithoutSelectionsStillGetsItsHeader) {
  for (const ValueFormat value_format : kValueFormats)
    for (const Layout& layout : {Layout::make(Numbers{}, Numbers{}, Numbers{}, value_format),
                                 Layout::make(Numbers{5000, 0, 3}, Numbers{-1, -1, -1}, Numbers{}, value_format)}) {
      CudaPlan plan(layout);
      expect_as_on_cpu(make_case(layout, GradientType::kFloat32, make_data(Data::kSomeInfinite, layout.numel, 37), true), plan);
    }
}

} // namespace
} // namespace compressed_ddp
