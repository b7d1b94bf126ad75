#include "cpu/compensate_select.h"

#include <set>

#include "selection_reference.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using Numbers = std::vector<int64_t>;
using Floats = std::vector<float>;
using Indices = std::vector<int32_t>;

constexpr int64_t kBlockNumel = 65536; // compensate_select.cpp; the sizes below put borders around it
const float kNan = float_of(kCanonicalNanBits);

Selection select(const SelectionCase& c, const FilterKernels& kernels = best_filter()) {
  CompensateSelect plan(c.layout, kernels);
  return run_selection(c, plan);
}

SelectionCase fp32_case(const Layout& layout, const Floats& gradient, const Floats& residual = {}) {
  return {layout, TypedBuffer(GradientType::kFloat32, gradient), residual};
}

void expect_entries(const Selection& selection, const Indices& indices, const Floats& values) {
  EXPECT_TRUE(same_integers(indices, selection.indices));
  EXPECT_TRUE(same_bits(values, selection.values));
}

// ---- the rules, by hand

TEST(CompensateSelect, TakesTheLargestMagnitudesInIndexOrder) {
  const Selection selection = select(fp32_case(one_group(6, 3), {1, -6, 2, 5, -3, 4}, Floats(6)));
  expect_entries(selection, {1, 3, 5}, {-6, 5, 4});
  EXPECT_TRUE(same_bits(Floats{1, 0, 2, 0, -3, 0}, selection.residual));
}

TEST(CompensateSelect, SelectsByGradientPlusResidual) {
  const Selection selection = select(fp32_case(one_group(4, 2), {1, 1, 1, 1}, {-1, 3, 0.5f, 4}));
  expect_entries(selection, {1, 3}, {4, 5});
  EXPECT_TRUE(same_bits(Floats{0, 0, 1.5f, 0}, selection.residual));
}

TEST(CompensateSelect, TiesPreferTheLowerIndex) {
  expect_entries(select(fp32_case(one_group(5, 2), {2, -2, 2, 2, -2})), {0, 1}, {2, -2});
  expect_entries(select(fp32_case(one_group(6, 3), {1, 2, 9, -2, 2, 2})), {1, 2, 3}, {2, 9, -2});
}

TEST(CompensateSelect, TiesAreCountedAcrossBlocksAndSegments) {
  // 2 in front, all others 1: what is left of k after the front ends in the middle of the second segment.
  const int64_t numel = 2 * kBlockNumel + 100;
  const Layout layout = Layout::make(Numbers{numel, 7, numel}, Numbers{0, -1, 0}, Numbers{numel + 50});
  Floats gradient(static_cast<size_t>(layout.numel), 1.0f);
  gradient.back() = 2.0f;
  const Selection selection = select(fp32_case(layout, gradient));
  Indices expected;
  for (int64_t i = 0; i < numel; ++i) expected.push_back(static_cast<int32_t>(i));
  for (int64_t i = 0; i < 49; ++i) expected.push_back(static_cast<int32_t>(numel + 7 + i));
  expected.push_back(static_cast<int32_t>(layout.numel - 1));
  EXPECT_TRUE(same_integers(expected, selection.indices));
}

TEST(CompensateSelect, NanComesBeforeInfinityBeforeFiniteNumbers) {
  const Floats gradient{1, HUGE_VALF, 3e38f, float_of(0xffc00001), -HUGE_VALF, 2};
  expect_entries(select(fp32_case(one_group(6, 1), gradient)), {3}, {kNan});
  expect_entries(select(fp32_case(one_group(6, 2), gradient)), {1, 3}, {HUGE_VALF, kNan});
  expect_entries(select(fp32_case(one_group(6, 4), gradient)), {1, 2, 3, 4}, {HUGE_VALF, 3e38f, kNan, -HUGE_VALF});
}

TEST(CompensateSelect, EveryNanIsATieAndIsSentAsTheCanonicalOne) {
  const Floats gradient{float_of(0x7f800001), float_of(0xffffffff), 0, float_of(0x7fc00000), float_of(0xff812345)};
  for (const FilterKernels* kernels : runnable_kernels()) {
    SCOPED_TRACE(kernels->name);
    expect_entries(select(fp32_case(one_group(5, 3), gradient), *kernels), {0, 1, 3}, {kNan, kNan, kNan});
    expect_entries(select(fp32_case(one_group(5, 3), gradient, Floats(5)), *kernels), {0, 1, 3}, {kNan, kNan, kNan});
  }
}

TEST(CompensateSelect, NonFiniteEntriesLeaveTheResidualAsItWas) {
  // Sent or not: 1 and 3 are sent, 4 is one too many.
  const Selection selection = select(fp32_case(one_group(6, 2), {5, HUGE_VALF, 7, kNan, -HUGE_VALF, 9}, {1, 2, 3, 4, 5, 6}));
  expect_entries(selection, {1, 3}, {HUGE_VALF, kNan});
  EXPECT_TRUE(same_bits(Floats{6, 2, 10, 4, 5, 15}, selection.residual));
  EXPECT_EQ(selection.statistics.non_finite, 3);
}

TEST(CompensateSelect, AnOverflowOfTheSumIsNonFinite) {
  const Selection selection = select(fp32_case(one_group(2, 1), {3e38f, 1}, {3e38f, 1}));
  expect_entries(selection, {0}, {HUGE_VALF});
  EXPECT_TRUE(same_bits(Floats{3e38f, 2}, selection.residual));
}

TEST(CompensateSelect, ZerosAreSentFromTheLowestIndexOnlyWhenNothingElseIsLeft) {
  const Selection selection = select(fp32_case(one_group(6, 4), {0, 0, 3, 0, 0, 1e-45f}, Floats(6)));
  expect_entries(selection, {0, 1, 2, 5}, {0, 0, 3, 1e-45f});
}

TEST(CompensateSelect, ZerosKeepTheirSignOnTheWireAndLeaveNothingBehind) {
  const Selection selection = select(fp32_case(one_group(4, 3), {-0.0f, 0.0f, -0.0f, -0.0f}, {-0.0f, -0.0f, -0.0f, -0.0f}));
  expect_entries(selection, {0, 1, 2}, {-0.0f, 0.0f, -0.0f});
  EXPECT_TRUE(same_bits(Floats{0, 0, 0, -0.0f}, selection.residual));
  expect_entries(select(fp32_case(one_group(2, 1), {-0.0f, 0.0f})), {0}, {-0.0f});
}

TEST(CompensateSelect, AnUnusedSegmentSendsZerosAndKeepsItsResidual) {
  SelectionCase c = fp32_case(Layout::make(Numbers{3, 4, 2}, Numbers{0, 1, 2}, Numbers{1, 2, 1}), {1, 2, 3, kNan, HUGE_VALF, 7, 8, 4, 5},
                              Floats(9, 10.0f));
  c.unused = {0, 1, 0};
  const Selection selection = select(c);
  expect_entries(selection, {2, 3, 4, 8}, {13, 0, 0, 15});
  EXPECT_TRUE(same_bits(Floats{11, 12, 0, 10, 10, 10, 10, 14, 0}, selection.residual));
  EXPECT_EQ(selection.statistics.non_finite, 0);
  EXPECT_EQ(selection.statistics.gradient_sq, 1 + 4 + 9 + 16 + 25);
}

TEST(CompensateSelect, AGroupWhoseSegmentsAreAllUnusedSendsItsFirstEntriesAsZeros) {
  SelectionCase c = fp32_case(Layout::make(Numbers{2, 1, 3}, Numbers{0, -1, 0}, Numbers{4}), Floats(6, 5.0f), Floats(6, 1.0f));
  c.unused = {1, 1, 1};
  const Selection selection = select(c);
  expect_entries(selection, {0, 1, 3, 4}, {0, 0, 0, 0});
  EXPECT_TRUE(same_bits(Floats(6, 1.0f), selection.residual));
}

TEST(CompensateSelect, DenseSegmentsAreNeitherSelectedNorStored) {
  const Layout layout = Layout::make(Numbers{2, 2, 2}, Numbers{0, -1, 0}, Numbers{2});
  std::vector<float> residual(2, 1.0f), last(2, 1.0f), values(2);
  Indices indices(2);
  float* const residuals[] = {residual.data(), nullptr, last.data()}; // a dense segment has no residual
  const Floats gradient{1, 2, 100, 100, 3, 4};
  CompensateSelect plan(layout);
  compensate_select(plan, {gradient.data(), GradientType::kFloat32, residuals, nullptr, indices.data(), values.data()},
                    all_cuts()[0].parallel_for);
  EXPECT_TRUE(same_integers(Indices{4, 5}, indices));
  EXPECT_TRUE(same_bits(Floats{4, 5}, values));
  EXPECT_TRUE(same_bits(Floats{2, 3}, residual));
  EXPECT_TRUE(same_bits(Floats{0, 0}, last));
}

TEST(CompensateSelect, OneEntryAndKOfOneAndKOfNumelWork) {
  expect_entries(select(fp32_case(one_group(1, 1), {0}, {0})), {0}, {0});
  expect_entries(select(fp32_case(one_group(1, 1), {kNan}, {0})), {0}, {kNan});
  for (const Data data : kAllData)
    for (const int64_t numel : {1, 2, 1000, 70001})
      for (const int64_t k : {int64_t{1}, numel}) {
        SCOPED_TRACE(std::string(name_of(data)) + ", numel " + std::to_string(numel) + ", k " + std::to_string(k) + ", seed 1");
        const GradientAndResidual made = make_data(data, numel, 1);
        for (const bool error_feedback : {true, false})
          expect_reference(make_case(one_group(numel, k), GradientType::kFloat32, made, error_feedback), runnable_kernels());
        if (HasFatalFailure()) return;
      }
}

TEST(CompensateSelect, ABucketWithoutGroupsIsFine) {
  const Layout layout = Layout::make(Numbers{5}, Numbers{-1}, {});
  const Selection selection = select(fp32_case(layout, Floats(5, 1.0f), Floats(5, 2.0f)));
  EXPECT_TRUE(selection.indices.empty());
  EXPECT_TRUE(same_bits(Floats(5, 2.0f), selection.residual));
  EXPECT_EQ(selection.statistics.gradient_sq, 0);
}

// ---- the filter kernels

TEST(Filter, EveryKernelKeepsTheContractForAllDataTypesSourcesAndTails) {
  for (const FilterKernels* kernels : runnable_kernels()) {
    expect_filter_contract_everywhere(*kernels);
    if (HasFatalFailure()) return;
  }
}

TEST(Filter, TheBestKernelsAreOnesThatThisTestRuns) {
  std::set<std::string> names;
  for (const FilterKernels* kernels : runnable_kernels()) names.insert(kernels->name);
  EXPECT_TRUE(names.contains(best_filter().name));
  RecordProperty("best_filter", best_filter().name);
}

TEST(CompensateSelectFilter, WhatBf16LosesStaysWhateverTheValue) {
  // The largest that rounds to a finite number, the least that is cut off, the largest of all, denormals, and some that are not sent.
  const std::vector<uint32_t> odd = {0x7f7f7fffu, 0x7f7f8000u, 0xff7f8001u, 0x7f7fffffu, 0xff7fffffu, 0x3f808000u, 0x3f818000u,
                                     0x7f800000u, 0xff800000u, 0x7fc12345u, 0x00000001u, 0x80008000u, 0x00000000u};
  Floats gradient;
  for (size_t i = 0; i < 40 * odd.size(); ++i) gradient.push_back(float_of(odd[i % odd.size()]));
  const auto numel = static_cast<int64_t>(gradient.size());
  for (const int64_t k : {numel / 8, numel / 2, numel})
    for (const FilterKernels* kernels : runnable_kernels()) {
      SCOPED_TRACE(std::string(kernels->name) + ", k " + std::to_string(k));
      SelectionCase c = fp32_case(one_group(numel, k), gradient, Floats(gradient.size()));
      c.layout.value_format = ValueFormat::kBFloat16;
      const Selection selection = select(c, *kernels);
      Floats expected(gradient.size());
      for (size_t i = 0; i < gradient.size(); ++i)
        if (std::isfinite(gradient[i])) expected[i] = gradient[i];
      for (const int32_t index : selection.indices) {
        const float sent = gradient[static_cast<size_t>(index)];
        if (std::isfinite(sent)) expected[static_cast<size_t>(index)] = sent - to_float(BFloat16{wire_bfloat16(sent)});
      }
      EXPECT_TRUE(same_bits(expected, selection.residual));
    }
}

// ---- the emit kernels

// Candidates as the filter leaves them, and what one kernel makes of them.
struct Emitted {
  Floats values, residual;
  Indices indices;
  EmitResult sums;
};

Emitted emit(EmitKernel kernel, Floats values, uint32_t threshold, int64_t ties, bool has_residual) {
  const auto count = static_cast<int64_t>(values.size());
  Indices indices;
  int64_t selected = ties;
  for (int64_t c = 0; c < count; ++c) {
    indices.push_back(static_cast<int32_t>(3 * c + 1));
    selected += selection_key(values[static_cast<size_t>(c)]) > threshold;
  }
  values.resize(values.size() + kFilterSlack);
  indices.resize(values.size());
  Emitted emitted;
  emitted.residual.assign(static_cast<size_t>(3 * count + 1), -7.0f);
  // Exactly as large as allowed, so that a sanitizer sees a store beyond; and with a guard, so that this test does.
  emitted.values.assign(static_cast<size_t>(selected) + 1, 42.0f);
  emitted.indices.assign(static_cast<size_t>(selected) + 1, 42);
  emitted.sums = kernel({values.data(), indices.data(), count, selected, ties, threshold, 1000,
                         has_residual ? emitted.residual.data() : nullptr, emitted.values.data(), emitted.indices.data()});
  EXPECT_EQ(emitted.values.back(), 42.0f);
  EXPECT_EQ(emitted.indices.back(), 42);
  return emitted;
}

TEST(Emit, TheBestKernelGivesWhatThePortableOneGives) {
  Random random(21);
  const float odd[] = {kNan, -kNan, std::numeric_limits<float>::infinity(), 2.0f, -2.0f};
  for (int64_t count = 0; count < 70; ++count)
    for (const int64_t one_odd_in : {1, 3, 20, 1000}) {
      SCOPED_TRACE("count " + std::to_string(count) + ", one odd in " + std::to_string(one_odd_in) + ", seed 21");
      Floats values;
      int64_t equal = 0;
      for (int64_t c = 0; c < count; ++c) {
        values.push_back(random.one_in(one_odd_in) ? odd[random.integer(0, 5)] : 4 * random.normal());
        equal += selection_key(values.back()) == selection_key(2.0f);
      }
      const int64_t ties = equal == 0 ? 0 : random.integer(0, equal + 1);
      for (const bool has_residual : {true, false}) {
        const Emitted expected = emit(emit_portable, values, selection_key(2.0f), ties, has_residual);
        const Emitted actual = emit(best_emit(), values, selection_key(2.0f), ties, has_residual);
        EXPECT_TRUE(same_bits(expected.values, actual.values));
        EXPECT_TRUE(same_integers(expected.indices, actual.indices));
        EXPECT_TRUE(same_bits(expected.residual, actual.residual));
        EXPECT_TRUE(sums_near("sent_sq", expected.sums.sent_sq, actual.sums.sent_sq, 1e-12));
        EXPECT_TRUE(sums_near("rejected_sq", expected.sums.rejected_sq, actual.sums.rejected_sq, 1e-12));
      }
      if (HasFailure()) return;
    }
}

// ---- against the reference

TEST(CompensateSelect, AdversarialDataGivesWhatTheReferenceGives) {
  struct Shape {
    const char* name;
    Numbers numels, groups;
    std::vector<uint8_t> unused;
  };
  const std::vector<Shape> shapes = {
      {"one tensor over blocks", {kBlockNumel + 4099}, {0}, {}},
      {"tensor groups", {3001, 17, 1, 2048}, {0, 1, 2, 3}, {}},
      {"bucket group around dense segments", {1000, 33, 2500, 64, 5}, {0, -1, 0, -1, 0}, {}},
      {"bucket group with unused segments", {700, 10, 1300, 900}, {0, -1, 0, 0}, {0, 0, 1, 0}},
  };
  for (const Shape& shape : shapes)
    for (const Data data : kAllData)
      for (const double density : {0.5, 0.01}) {
        Numbers group_numels;
        for (size_t s = 0; s < shape.numels.size(); ++s) {
          if (shape.groups[s] == kDenseGroup) continue;
          if (shape.groups[s] == static_cast<int64_t>(group_numels.size())) group_numels.push_back(0);
          group_numels.back() += shape.numels[s];
        }
        Numbers group_k;
        for (const int64_t numel : group_numels) group_k.push_back(selection_k(density, numel));
        const Layout layout = Layout::make(shape.numels, shape.groups, group_k);
        const GradientAndResidual made = make_data(data, layout.numel, 11);
        for (const GradientType type : kGradientTypes)
          for (const bool error_feedback : {true, false}) {
            SCOPED_TRACE(std::string(shape.name) + ", " + name_of(data) + ", density " + std::to_string(density) + ", " + name_of(type) +
                         (error_feedback ? "" : ", no error feedback") + ", seed 11");
            SelectionCase c = make_case(layout, type, made, error_feedback);
            c.unused = shape.unused;
            expect_reference(c, runnable_kernels());
            if (HasFatalFailure()) return;
          }
      }
}

TEST(CompensateSelect, RandomBucketsGiveWhatTheReferenceGives) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("random_case of seed " + std::to_string(seed));
    expect_reference(random_case(seed), runnable_kernels(), all_cuts()[seed % all_cuts().size()]);
    if (HasFatalFailure()) return;
  }
}

TEST(CompensateSelect, EveryTailBehindABlockIsHandled) {
  for (const int64_t lanes : {8, 16, 32, 64})
    for (const int64_t beyond : {-1, 0, 1})
      for (const int64_t numel : {lanes + beyond, kBlockNumel - lanes + beyond, kBlockNumel + lanes + beyond, 2 * kBlockNumel + beyond})
        for (const double density : {0.001, 0.1}) {
          SCOPED_TRACE("numel " + std::to_string(numel) + ", density " + std::to_string(density) + ", seed 12");
          const GradientAndResidual made = make_data(Data::kNormal, numel, 12);
          expect_reference(make_case(one_group(numel, selection_k(density, numel)), GradientType::kBFloat16, made, true),
                           runnable_kernels());
          if (HasFatalFailure()) return;
        }
}

TEST(CompensateSelect, GradientsMayBeginAnywhere) {
  const Layout layout = Layout::make(Numbers{1001, 77, 3003}, Numbers{0, -1, 1}, Numbers{11, 31});
  const GradientAndResidual made = make_data(Data::kNormal, layout.numel, 13);
  for (const GradientType type : kGradientTypes)
    for (int64_t misalignment = 0; misalignment < 32; ++misalignment) {
      SCOPED_TRACE(std::string(name_of(type)) + ", misalignment " + std::to_string(misalignment) + ", seed 13");
      expect_reference(make_case(layout, type, made, true, misalignment), runnable_kernels());
      if (HasFatalFailure()) return;
    }
}

// ---- conservation

TEST(CompensateSelect, WhatIsSentAndWhatStaysIsWhatCame) {
  // Integers: every sum is exact, so the identity holds bit for bit, over several steps.
  constexpr uint64_t kSeed = 14;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  const Layout layout = Layout::make(Numbers{5000, 100, 3000}, Numbers{0, -1, 1}, Numbers{50, 30});
  CompensateSelect plan(layout);
  Floats residual(static_cast<size_t>(layout.numel)), came(residual), sent(residual);
  for (uint64_t step = 0; step < 20; ++step) {
    GradientAndResidual made = make_data(Data::kIntegers, layout.numel, kSeed + step);
    std::fill_n(made.gradient.begin() + 5000, 100, 0.0f); // the dense segment is not part of it
    const Selection selection = run_selection(fp32_case(layout, made.gradient, residual), plan);
    residual = selection.residual;
    for (size_t i = 0; i < came.size(); ++i) came[i] += made.gradient[i];
    for (size_t e = 0; e < selection.indices.size(); ++e) sent[static_cast<size_t>(selection.indices[e])] += selection.values[e];
  }
  for (size_t i = 0; i < came.size(); ++i) ASSERT_EQ(sent[i] + residual[i], came[i]) << "entry " << i;
}

// ---- guesses that are wrong

// The portable kernels, counted: [source]. A second try without residual filters the gradient again.
std::array<int64_t, 3> calls;
template <typename gradient_t, FilterSource source, Kept kept>
struct Counted {
  static FilterResult run(const FilterArguments& arguments) {
    ++calls[static_cast<size_t>(source)];
    FilterResult result;
    filter_scalar<gradient_t, source, kept>(arguments, 0, result);
    return result;
  }
};
constexpr FilterKernels kCountedFilter = make_filter_kernels<Counted>("counted");

// All large values lie just where the guess looks (sample_lines, each of 16 entries), so that it takes the
// whole group for large and finds fewer than k candidates.
struct Aimed {
  int64_t numel = 1 << 19;
  int64_t k = 10000;
  GradientAndResidual data;
  Indices large;
  Aimed() {
    data = make_data(Data::kNormal, numel, 15);
    const int64_t num_lines = sample_lines(numel, k);
    for (int64_t line = 0; line < num_lines; ++line)
      for (int64_t i = sample_position(line, num_lines, numel); i < sample_position(line, num_lines, numel) + 16; ++i) {
        large.push_back(static_cast<int32_t>(i));
        data.gradient[static_cast<size_t>(i)] += 1000.0f;
      }
  }
};

void expect_second_try(const SelectionCase& c) {
  const int64_t num_blocks = (c.layout.numel + kBlockNumel - 1) / kBlockNumel;
  std::vector<const FilterKernels*> kernels = runnable_kernels();
  kernels.push_back(&kCountedFilter);
  calls = {};
  expect_reference(c, kernels);
  if (c.residual.empty()) {
    EXPECT_EQ(calls[1], 2 * num_blocks) << "the guess was meant to fail; does sample_position still say where the sample lies?";
  } else {
    EXPECT_EQ(calls[0], num_blocks);
    EXPECT_EQ(calls[2], num_blocks) << "the guess was meant to fail; does sample_position still say where the sample lies?";
  }
}

TEST(CompensateSelect, AGuessThatIsTooHighIsMended) {
  const Aimed aimed;
  for (const GradientType type : kGradientTypes)
    for (const bool error_feedback : {true, false}) {
      SCOPED_TRACE(std::string(name_of(type)) + (error_feedback ? "" : ", no error feedback"));
      expect_second_try(make_case(one_group(aimed.numel, aimed.k), type, aimed.data, error_feedback));
    }
}

TEST(CompensateSelect, AGuessThatIsTooHighIsMendedWithNonFiniteEntriesToo) {
  Aimed aimed;
  Random random(16);
  for (int i = 0; i < 300; ++i) { // among the candidates and elsewhere, side by side and at both ends
    const auto inside = static_cast<size_t>(aimed.large[static_cast<size_t>(random.integer(0, static_cast<int64_t>(aimed.large.size())))]);
    aimed.data.gradient[inside] = i % 2 == 0 ? random_nan(random) : HUGE_VALF;
    aimed.data.gradient[static_cast<size_t>(random.integer(0, aimed.numel))] = i % 2 == 0 ? random_nan(random) : -HUGE_VALF;
  }
  aimed.data.gradient.front() = aimed.data.gradient.back() = kNan;
  for (size_t i = 70000; i < 70010; ++i) aimed.data.gradient[i] = kNan;
  // Old residuals that would themselves be candidates: they stay where they are all the same.
  for (size_t i = 0; i < aimed.data.gradient.size(); ++i) {
    if (!std::isfinite(aimed.data.gradient[i]) && i % 3 != 0) aimed.data.residual[i] = 500.0f;
  }
  for (const bool error_feedback : {true, false}) {
    SCOPED_TRACE(error_feedback ? "seed 16" : "no error feedback, seed 16");
    expect_second_try(make_case(one_group(aimed.numel, aimed.k), GradientType::kFloat32, aimed.data, error_feedback));
  }
}

TEST(CompensateSelect, AGuessThatIsTooHighIsMendedWhenTheRestIsZero) {
  // The second low key ends at the bottom, and zeros have to fill up the k.
  Aimed aimed;
  for (float& value : aimed.data.gradient)
    if (std::fabs(value) < 100.0f) value = 0.0f;
  std::fill(aimed.data.residual.begin(), aimed.data.residual.end(), -0.0f);
  aimed.data.gradient[12345] = -HUGE_VALF;
  for (const bool error_feedback : {true, false})
    expect_second_try(make_case(one_group(aimed.numel, aimed.k), GradientType::kFloat32, aimed.data, error_feedback));
}

TEST(CompensateSelect, AGuessThatIsTooHighIsMendedInAGroupOfSeveralSegments) {
  // The same group in three segments, between dense ones, the middle one unused.
  const Aimed aimed;
  const Layout layout = Layout::make(Numbers{150000, 10, 124289, 20, aimed.numel - 274289}, Numbers{0, -1, 0, -1, 0}, Numbers{aimed.k});
  GradientAndResidual data;
  for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, 150000}, {0, 10}, {150000, 274289}, {0, 20}, {274289, aimed.numel}}) {
    data.gradient.insert(data.gradient.end(), aimed.data.gradient.begin() + from, aimed.data.gradient.begin() + to);
    data.residual.insert(data.residual.end(), aimed.data.residual.begin() + from, aimed.data.residual.begin() + to);
  }
  for (const bool error_feedback : {true, false}) {
    SelectionCase c = make_case(layout, GradientType::kFloat16, data, error_feedback);
    c.unused = {0, 0, 1, 0, 0};
    std::vector<const FilterKernels*> kernels = runnable_kernels();
    kernels.push_back(&kCountedFilter);
    calls = {};
    expect_reference(c, kernels);
    EXPECT_EQ(calls[error_feedback ? 2 : 1], error_feedback ? 7 : 14) << "3 + 4 used blocks, a second time";
  }
}

TEST(CompensateSelect, AGuessThatIsFarTooLowOnlyCostsTime) {
  // Small values wherever the guess looks, so that nearly everything becomes a candidate.
  Aimed aimed;
  for (float& value : aimed.data.gradient) value += 1000.0f;
  for (const int32_t i : aimed.large) aimed.data.gradient[static_cast<size_t>(i)] = 1e-3f;
  for (const bool error_feedback : {true, false})
    expect_reference(make_case(one_group(aimed.numel, aimed.k), GradientType::kFloat32, aimed.data, error_feedback), runnable_kernels());
}

TEST(CompensateSelect, SampledLinesAscendAndLieInsideTheGroup) {
  for (const int64_t numel : {1000, 1024, 4096, 100000, 1 << 20, 2147483647}) {
    const int64_t num_lines = std::max<int64_t>(64, numel / 8192);
    int64_t before = -1;
    for (int64_t line = 0; line < num_lines; ++line) {
      const int64_t position = sample_position(line, num_lines, numel);
      ASSERT_GT(position, before) << "numel " << numel << ", line " << line;
      ASSERT_LT(position, numel);
      before = position;
    }
  }
}

// ---- the same result however the work is done

void expect_same_statistics(const CompensateSelectStatistics& a, const CompensateSelectStatistics& b) {
  for (const auto member :
       {&CompensateSelectStatistics::gradient_sq, &CompensateSelectStatistics::residual_sq, &CompensateSelectStatistics::sent_sq})
    EXPECT_EQ(std::bit_cast<uint64_t>(a.*member), std::bit_cast<uint64_t>(b.*member)) << a.*member << ", " << b.*member;
  EXPECT_EQ(a.non_finite, b.non_finite);
}

TEST(CompensateSelect, DoesNotDependOnHowRangesAreCutNorOnTheirOrder) {
  const Layout layout = Layout::make(Numbers{200000, 50, 70000, 300, 1, 65536}, Numbers{0, -1, 0, 1, 2, 3}, Numbers{2700, 3, 1, 656});
  for (const Data data : {Data::kNormal, Data::kTies, Data::kOneSpike, Data::kWideRange, Data::kSomeInfinite}) {
    const GradientAndResidual made = make_data(data, layout.numel, 17);
    for (const bool error_feedback : {true, false}) {
      const SelectionCase c = make_case(layout, GradientType::kFloat32, made, error_feedback);
      const Selection expected = reference_selection(c);
      for (const FilterKernels* kernels : runnable_kernels()) {
        CompensateSelect plan(layout, *kernels);
        const Selection whole = run_selection(c, plan);
        for (const Cut& cut : all_cuts()) {
          SCOPED_TRACE(std::string(name_of(data)) + ", kernels " + kernels->name + ", ranges " + cut.name + ", seed 17");
          const Selection selection = run_selection(c, plan, cut);
          expect_selection(expected, selection);
          expect_same_statistics(whole.statistics, selection.statistics);
        }
      }
    }
  }
}

TEST(CompensateSelect, APlanServesManyCalls) {
  // Nothing of one call may show in the next: other data, another type, with and without residual, other unused segments.
  const Layout layout = Layout::make(Numbers{90000, 9, 500}, Numbers{0, -1, 0}, Numbers{900});
  CompensateSelect plan(layout);
  for (uint64_t call = 0; call < 60; ++call) {
    const Data data = kAllData[call * 7 % kAllData.size()];
    SelectionCase c = make_case(layout, kGradientTypes[call % 3], make_data(data, layout.numel, call), call % 4 != 0);
    if (call % 5 == 0) c.unused = {0, 0, 1};
    if (call % 7 == 0) c.unused = {1, 1, 0};
    SCOPED_TRACE("call " + std::to_string(call) + ", also the seed; data " + name_of(data));
    expect_selection(reference_selection(c), run_selection(c, plan));
    if (HasFatalFailure()) return;
  }
}

TEST(CompensateSelect, PlansMayShareScratch) {
  CompensateSelect::Scratch scratch;
  const Layout layouts[] = {one_group(1000, 10), one_group(200000, 2000),
                            Layout::make(Numbers{70000, 5, 300}, Numbers{0, -1, 1}, Numbers{700, 3})};
  std::vector<std::unique_ptr<CompensateSelect>> plans;
  for (const Layout& layout : layouts) {
    plans.push_back(std::make_unique<CompensateSelect>(layout));
    plans.back()->use_scratch(scratch);
  }
  for (uint64_t call = 0; call < 9; ++call) {
    const size_t which = call * 2 % 3;
    const SelectionCase c = make_case(layouts[which], GradientType::kFloat32, make_data(Data::kNormal, layouts[which].numel, call), true);
    SCOPED_TRACE("call " + std::to_string(call) + ", also the seed");
    expect_selection(reference_selection(c), run_selection(c, *plans[which]));
  }
  EXPECT_GE(scratch.numel, 200000) << "the shared scratch was used";
}

// ---- statistics

TEST(CompensateSelect, StatisticsAreTheSumsOfSquares) {
  const Selection selection = select(fp32_case(one_group(4, 2), {1, 2, -3, 4}, {1, 1, 1, 1})); // acc 2, 3, -2, 5
  EXPECT_EQ(selection.statistics.gradient_sq, 1 + 4 + 9 + 16);
  EXPECT_EQ(selection.statistics.sent_sq, 9 + 25);
  EXPECT_EQ(selection.statistics.residual_sq, 4 + 4);
  EXPECT_EQ(selection.statistics.non_finite, 0);
}

TEST(CompensateSelect, WithoutErrorFeedbackTheResidualIsStillMeasured) {
  const Selection selection = select(fp32_case(one_group(3, 1), {1, 2, 3}));
  EXPECT_EQ(selection.statistics.residual_sq, 1 + 4);
  EXPECT_EQ(selection.statistics.sent_sq, 9);
}

TEST(CompensateSelect, InfiniteEntriesAreCountedAndLeftOutOfSentAndResidual) {
  const Selection selection = select(fp32_case(one_group(5, 2), {HUGE_VALF, kNan, -HUGE_VALF, 3, 4}, Floats(5)));
  EXPECT_EQ(selection.statistics.non_finite, 3);
  EXPECT_EQ(selection.statistics.sent_sq, 0);
  EXPECT_EQ(selection.statistics.residual_sq, 9 + 16);
}

} // namespace
} // namespace compressed_ddp
