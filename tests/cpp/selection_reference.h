// What compensate_select has to give, written as plainly as possible, and checks of the code under test against it.
// Shared by compensate_select_test.cpp and compensate_select_avx512_test.cpp.
#pragma once

#include <cmath>
#include <memory>

#include "cpu/compensate_select.h"
#include "testing.h"

namespace compressed_ddp::testing {

// ---- data

// Kinds of gradients, with the residual that meets them. Random unless the name says otherwise.
enum class Data {
  kNormal,
  kZeros, // of both signs
  kTies,  // -1, 0, 1
  kAllEqual,
  kOneSpike, // among zeros
  kDenormals,
  kSomeInfinite,
  kSomeNan,         // with payload bits, quiet and signalling
  kMostlyNonFinite, // many more than k
  kNanAmongZeros,
  kWideRange, // 2^-30 .. 2^30
  kAscending, // magnitudes ascend with the index
  kDescending,
  kSameLeadingBits, // magnitudes differ in their last 12 bits only
  kCancelling,      // gradient == -residual, nearly everywhere
  kClump,           // all large ones side by side, between the sampled places
  kPeriodic,        // large ones in step with cache lines
  kIntegers,        // small, so that every sum is exact
};
inline constexpr std::array kAllData = {Data::kNormal,          Data::kZeros,           Data::kTies,         Data::kAllEqual,
                                        Data::kOneSpike,        Data::kDenormals,       Data::kSomeInfinite, Data::kSomeNan,
                                        Data::kMostlyNonFinite, Data::kNanAmongZeros,   Data::kWideRange,    Data::kAscending,
                                        Data::kDescending,      Data::kSameLeadingBits, Data::kCancelling,   Data::kClump,
                                        Data::kPeriodic,        Data::kIntegers};

inline const char* name_of(Data data) {
  constexpr const char* kNames[] = {"normal",     "zeros",         "ties",       "all equal",         "one spike",
                                    "denormals",  "some infinite", "some nan",   "mostly non-finite", "nan among zeros",
                                    "wide range", "ascending",     "descending", "same leading bits", "cancelling",
                                    "clump",      "periodic",      "integers"};
  return kNames[static_cast<int>(data)];
}

struct GradientAndResidual {
  std::vector<float> gradient;
  std::vector<float> residual;
};

inline float random_nan(Random& random) {
  const auto payload = static_cast<uint32_t>(random.integer(1, 1 << 23));
  return float_of((random.one_in(2) ? 0xff800000u : 0x7f800000u) | payload);
}

inline GradientAndResidual make_data(Data data, int64_t numel, uint64_t seed) {
  Random random(seed);
  GradientAndResidual made{std::vector<float>(static_cast<size_t>(numel)), std::vector<float>(static_cast<size_t>(numel))};
  const int64_t spike = random.integer(0, std::max<int64_t>(numel, 1));
  for (int64_t i = 0; i < numel; ++i) {
    float& g = made.gradient[static_cast<size_t>(i)];
    float& r = made.residual[static_cast<size_t>(i)];
    const float sign = random.one_in(2) ? -1.0f : 1.0f;
    g = random.normal();
    r = 0.1f * random.normal();
    switch (data) {
      case Data::kNormal:
        break;
      case Data::kZeros:
        g = sign * 0.0f;
        r = random.one_in(2) ? -0.0f : 0.0f;
        break;
      case Data::kTies:
        g = static_cast<float>(random.integer(-1, 2));
        r = 0;
        break;
      case Data::kAllEqual:
        g = sign * 0.5f;
        r = g;
        break;
      case Data::kOneSpike:
        g = i == spike ? 3.0f : sign * 0.0f;
        r = 0;
        break;
      case Data::kDenormals:
        g = float_of(static_cast<uint32_t>(random.integer(0, 1000))) * sign;
        r = float_of(static_cast<uint32_t>(random.integer(0, 1000)));
        break;
      case Data::kSomeInfinite:
        if (random.one_in(50)) g = sign * HUGE_VALF;
        break;
      case Data::kSomeNan:
        if (random.one_in(50)) g = random_nan(random);
        break;
      case Data::kMostlyNonFinite:
        if (!random.one_in(5)) g = random.one_in(2) ? sign * HUGE_VALF : random_nan(random);
        break;
      case Data::kNanAmongZeros:
        g = random.one_in(20) ? random_nan(random) : sign * 0.0f;
        r = random.one_in(4) ? 1.0f : 0.0f;
        break;
      case Data::kWideRange:
        g = std::ldexp(g, static_cast<int>(random.integer(-30, 31)));
        r = std::ldexp(r, static_cast<int>(random.integer(-30, 31)));
        break;
      case Data::kAscending:
        g = sign * static_cast<float>(i + 1);
        r = 0;
        break;
      case Data::kDescending:
        g = sign * static_cast<float>(numel - i);
        r = 0;
        break;
      case Data::kSameLeadingBits:
        g = sign * float_of(0x3f800000u + static_cast<uint32_t>(random.integer(0, 4096)));
        r = 0;
        break;
      case Data::kCancelling:
        r = random.one_in(30) ? r : -g;
        break;
      case Data::kClump:
        g = i >= numel / 3 && i < numel / 3 + numel / 20 ? 100.0f + g : 0.01f * g;
        break;
      case Data::kPeriodic:
        g = i % 64 < 16 ? 100.0f * g : 0.01f * g;
        break;
      case Data::kIntegers:
        g = static_cast<float>(random.integer(-500, 501));
        r = static_cast<float>(random.integer(-500, 501));
        break;
    }
  }
  return made;
}

// ---- kernels

// All that this processor runs.
inline std::vector<const FilterKernels*> runnable_kernels() {
  std::vector<const FilterKernels*> kernels{&kPortableFilter};
#if COMPRESSED_DDP_X86
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&kAvx2Filter);
#endif
  if (&best_filter() != kernels.back()) kernels.push_back(&best_filter());
  return kernels;
}

// ---- selection

struct Selection {
  std::vector<float> values;
  std::vector<int32_t> indices;
  std::vector<float> residual; // of the whole bucket, after
  CompensateSelectStatistics statistics;
};

struct SelectionCase {
  Layout layout;
  TypedBuffer gradient;
  std::vector<float> residual;   // of the whole bucket; empty = no error feedback
  std::vector<uint8_t> unused{}; // per segment; empty = all are used
};

inline SelectionCase make_case(const Layout& layout, GradientType type, const GradientAndResidual& data, bool error_feedback,
                               int64_t misalignment = 0) {
  return {layout, TypedBuffer(type, data.gradient, misalignment), error_feedback ? data.residual : std::vector<float>{}};
}

// The contract at the head of compensate_select.h, group by group, by a stable sort.
inline Selection reference_selection(const SelectionCase& c) {
  Selection result;
  result.residual = c.residual;
  for (size_t g = 0; g < c.layout.groups.size(); ++g) {
    struct Entry {
      uint32_t key;
      int32_t index;
      float acc;
      bool unused;
    };
    std::vector<Entry> entries;
    entries.reserve(static_cast<size_t>(c.layout.groups[g].numel));
    for (size_t s = 0; s < c.layout.segments.size(); ++s) {
      const Segment& segment = c.layout.segments[s];
      if (segment.group != static_cast<int32_t>(g)) continue;
      const bool unused = !c.unused.empty() && c.unused[s] != 0;
      for (int64_t i = segment.offset; i < segment.offset + segment.numel; ++i) {
        const float gradient = unused ? 0.0f : c.gradient.at(i);
        const float acc = unused || c.residual.empty() ? gradient : gradient + c.residual[static_cast<size_t>(i)];
        if (!unused) result.statistics.gradient_sq += static_cast<double>(gradient) * gradient;
        result.statistics.non_finite += !std::isfinite(acc);
        entries.push_back({selection_key(acc), static_cast<int32_t>(i), acc, unused});
      }
    }
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.key > b.key; });
    const auto k = static_cast<size_t>(c.layout.groups[g].k);
    std::sort(entries.begin(), entries.begin() + static_cast<int64_t>(k), [](const Entry& a, const Entry& b) { return a.index < b.index; });
    for (size_t e = 0; e < entries.size(); ++e) {
      const auto [key, index, acc, unused] = entries[e];
      const double square = std::isfinite(acc) ? static_cast<double>(acc) * acc : 0.0;
      const bool is_sent = e < k;
      (is_sent ? result.statistics.sent_sq : result.statistics.residual_sq) += square;
      if (is_sent) {
        result.indices.push_back(index);
        result.values.push_back(key == kNanKey ? float_of(kCanonicalNanBits) : acc);
      }
      if (!c.residual.empty() && !unused && std::isfinite(acc)) result.residual[static_cast<size_t>(index)] = is_sent ? 0.0f : acc;
    }
  }
  return result;
}

// The code under test on copies of the case's data. The outputs lie between guards.
inline Selection run_selection(const SelectionCase& c, CompensateSelect& plan, const Cut& cut = all_cuts()[0]) {
  constexpr size_t kGuard = 16;
  const float guard_value = float_of(0xdeadbeef);
  constexpr int32_t kGuardIndex = -77;
  const auto selected_numel = static_cast<size_t>(c.layout.selected_numel);
  std::vector<float> values(selected_numel + 2 * kGuard, guard_value);
  std::vector<int32_t> indices(selected_numel + 2 * kGuard, kGuardIndex);
  Selection result;
  result.residual = c.residual;
  const TypedBuffer gradient = c.gradient;
  const std::vector<float*> residuals = segment_pointers(c.layout, result.residual.data());
  result.statistics = compensate_select(plan,
                                        {gradient.data(), gradient.type(), c.residual.empty() ? nullptr : residuals.data(),
                                         c.unused.empty() ? nullptr : c.unused.data(), indices.data() + kGuard, values.data() + kGuard},
                                        cut.parallel_for);
  for (size_t i = 0; i < kGuard; ++i)
    for (const size_t at : {i, kGuard + selected_numel + i}) {
      EXPECT_EQ(bits_of(values[at]), bits_of(guard_value))
          << "written outside of values, at " << static_cast<int64_t>(at) - static_cast<int64_t>(kGuard);
      EXPECT_EQ(indices[at], kGuardIndex) << "written outside of indices, at " << static_cast<int64_t>(at) - static_cast<int64_t>(kGuard);
    }
  result.values.assign(values.begin() + kGuard, values.end() - kGuard);
  result.indices.assign(indices.begin() + kGuard, indices.end() - kGuard);
  return result;
}

// Kernels add squares in fp32, in an order of their own; a sum that is not finite only has to be not finite.
inline ::testing::AssertionResult sums_near(const char* what, double expected, double actual, double relative) {
  const double smallest = 1e-30; // squares of denormals vanish in fp32
  if (std::isfinite(expected) ? std::fabs(actual - expected) <= relative * expected + smallest : !std::isfinite(actual))
    return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << what << ": expected " << expected << ", got " << actual;
}

inline void expect_selection(const Selection& expected, const Selection& actual) {
  ASSERT_TRUE(same_integers(expected.indices, actual.indices)) << "(indices)";
  ASSERT_TRUE(same_bits(expected.values, actual.values)) << "(values)";
  ASSERT_TRUE(same_bits(expected.residual, actual.residual)) << "(residual)";
  ASSERT_EQ(expected.statistics.non_finite, actual.statistics.non_finite);
  EXPECT_TRUE(sums_near("gradient_sq", expected.statistics.gradient_sq, actual.statistics.gradient_sq, 1e-3));
  EXPECT_TRUE(sums_near("residual_sq", expected.statistics.residual_sq, actual.statistics.residual_sq, 1e-3));
  EXPECT_TRUE(sums_near("sent_sq", expected.statistics.sent_sq, actual.statistics.sent_sq, 1e-9));
}

inline void expect_reference(const SelectionCase& c, std::span<const FilterKernels* const> kernels, const Cut& cut = all_cuts()[0]) {
  const Selection expected = reference_selection(c);
  for (const FilterKernels* kernel : kernels) {
    SCOPED_TRACE(std::string("kernels ") + kernel->name);
    CompensateSelect plan(c.layout, *kernel, kernel == &kPortableFilter ? emit_portable : best_emit());
    expect_selection(expected, run_selection(c, plan, cut));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// A bucket of random shape, content and options.
inline SelectionCase random_case(uint64_t seed) {
  Random random(seed);
  const bool one_bucket_group = random.one_in(2);
  const double densities[] = {1.0, 0.5, 0.1, 0.01, 0.001};
  const double density = densities[random.integer(0, 5)];
  std::vector<int64_t> numels, groups, group_numels;
  const int64_t num_segments = random.integer(1, 6);
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t numel = random.one_in(6) ? random.integer(60000, 140000) : random.integer(1, 3000);
    numels.push_back(numel);
    if (random.one_in(4)) {
      groups.push_back(kDenseGroup);
    } else if (one_bucket_group && !group_numels.empty()) {
      groups.push_back(0);
      group_numels[0] += numel;
    } else {
      groups.push_back(static_cast<int64_t>(group_numels.size()));
      group_numels.push_back(numel);
    }
  }
  std::vector<int64_t> group_k;
  for (const int64_t numel : group_numels) group_k.push_back(selection_k(density, numel));
  const Layout layout = Layout::make(numels, groups, group_k);
  const Data data = kAllData[static_cast<size_t>(random.integer(0, static_cast<int64_t>(kAllData.size())))];
  const GradientType type = kGradientTypes[static_cast<size_t>(random.integer(0, 3))];
  SelectionCase c = make_case(layout, type, make_data(data, layout.numel, seed), !random.one_in(4), random.integer(0, 8));
  if (random.one_in(3))
    for (int64_t s = 0; s < num_segments; ++s) c.unused.push_back(random.one_in(3) ? 1 : 0);
  return c;
}

// ---- the filter alone

struct Filtered {
  std::vector<float> values;
  std::vector<int32_t> indices;
  std::vector<float> residual;
  int64_t non_finite = 0;
  double gradient_sq = 0;
  double residual_sq = 0;
};

// The contract at the head of compensate_select_filter.h.
inline Filtered reference_filter(FilterSource source, Kept kept, const TypedBuffer& gradient, const std::vector<float>& residual,
                                 uint32_t low_key) {
  Filtered result;
  result.residual = residual;
  for (int64_t i = 0; i < gradient.numel(); ++i) {
    float& r = result.residual[static_cast<size_t>(i)];
    const float g = source == FilterSource::kResidual ? 0.0f : gradient.at(i);
    const float acc = source == FilterSource::kGradient ? g : source == FilterSource::kResidual ? r : g + r;
    result.gradient_sq += static_cast<double>(g) * g;
    if (selection_key(acc) < low_key) {
      result.residual_sq += static_cast<double>(acc) * acc;
      if (source != FilterSource::kGradient) r = acc;
    } else {
      result.values.push_back(acc);
      result.indices.push_back(static_cast<int32_t>(i));
      result.non_finite += !std::isfinite(acc);
      if (source != FilterSource::kGradient && std::isfinite(acc))
        r = kept == Kept::kZero ? 0.0f : acc - to_float(BFloat16{wire_bfloat16(acc)});
    }
  }
  return result;
}

inline void expect_filter(const FilterKernels& kernels, FilterSource source, Kept kept, const TypedBuffer& gradient,
                          const std::vector<float>& residual, uint32_t low_key) {
  const Filtered expected = reference_filter(source, kept, gradient, residual, low_key);
  std::vector<float> actual_residual = residual;
  // Exactly the room that the contract grants: AddressSanitizer sees any step beyond.
  const auto room = static_cast<size_t>(gradient.numel() + kFilterSlack);
  std::vector<float> values(room);
  std::vector<int32_t> indices(room);
  const FilterResult actual = kernels.of(gradient.type(), source, kept)(
      {source == FilterSource::kResidual ? nullptr : gradient.data(), source == FilterSource::kGradient ? nullptr : actual_residual.data(),
       gradient.numel(), low_key, values.data(), indices.data()});
  ASSERT_EQ(actual.count, static_cast<int64_t>(expected.values.size()));
  values.resize(expected.values.size());
  indices.resize(expected.indices.size());
  // Which NaN an addition gives depends on the order of its operands, which C++ leaves open: compare NaN as NaN.
  for (size_t c = 0; c < values.size(); ++c)
    if (std::isnan(values[c]) && std::isnan(expected.values[c])) values[c] = expected.values[c];
  ASSERT_TRUE(same_bits(expected.values, values)) << "(candidates)";
  ASSERT_TRUE(same_integers(expected.indices, indices)) << "(candidates)";
  ASSERT_TRUE(same_bits(expected.residual, actual_residual)) << "(residual)";
  ASSERT_EQ(actual.non_finite, expected.non_finite);
  ASSERT_TRUE(sums_near("gradient_sq", expected.gradient_sq, actual.gradient_sq, 1e-4));
  ASSERT_TRUE(sums_near("residual_sq", expected.residual_sq, actual.residual_sq, 1e-4));
}

// Both things that may be kept.
inline void expect_filter(const FilterKernels& kernels, FilterSource source, const TypedBuffer& gradient,
                          const std::vector<float>& residual, uint32_t low_key) {
  for (const Kept kept : {Kept::kZero, Kept::kLostByBFloat16}) {
    SCOPED_TRACE(kept == Kept::kZero ? "0 is kept" : "what bf16 loses is kept");
    expect_filter(kernels, source, kept, gradient, residual, low_key);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// All types and sources; low keys at, just below and just above keys that occur, and the two ends of what is allowed.
inline void expect_filter_contract(const FilterKernels& kernels, Data data, int64_t numel, uint64_t seed, int64_t misalignment = 0) {
  constexpr const char* kSourceNames[] = {"gradient + residual", "gradient", "residual"};
  Random random(seed);
  const GradientAndResidual made = make_data(data, numel, seed);
  for (const GradientType type : kGradientTypes) {
    const TypedBuffer gradient(type, made.gradient, misalignment);
    for (const FilterSource source : {FilterSource::kCompensate, FilterSource::kGradient, FilterSource::kResidual}) {
      // The second try reads whole compensated values from the residual.
      std::vector<float> residual = source == FilterSource::kResidual ? gradient.values() : made.residual;
      std::vector<uint32_t> low_keys{1, kInfinityKey};
      for (int pick = 0; numel > 0 && pick < 3; ++pick) {
        const int64_t i = random.integer(0, numel);
        const float acc = source == FilterSource::kCompensate ? gradient.at(i) + residual[static_cast<size_t>(i)] : gradient.at(i);
        for (const uint32_t key : {selection_key(acc) - 1, selection_key(acc), selection_key(acc) + 1})
          if (key >= 1 && key <= kInfinityKey) low_keys.push_back(key);
      }
      for (const uint32_t low_key : low_keys) {
        SCOPED_TRACE(std::string(kernels.name) + ", " + name_of(type) + ", " + kSourceNames[static_cast<int>(source)] + ", data " +
                     name_of(data) + ", numel " + std::to_string(numel) + ", low key " + std::to_string(low_key) + ", misalignment " +
                     std::to_string(misalignment) + ", seed " + std::to_string(seed));
        expect_filter(kernels, source, gradient, residual, low_key);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// Every tail behind the widest group of lanes that any kernel takes at once, and misaligned beginnings.
inline void expect_filter_contract_everywhere(const FilterKernels& kernels) {
  uint64_t seed = 0;
  for (int64_t numel = 0; numel <= 2 * 64 + 1; ++numel) {
    expect_filter_contract(kernels, Data::kNormal, numel, ++seed, numel % 8);
    expect_filter_contract(kernels, Data::kTies, numel, ++seed, numel % 3);
    if (::testing::Test::HasFatalFailure()) return;
  }
  for (const Data data : kAllData)
    for (const int64_t numel : {1, 31, 32, 33, 63, 64, 65, 127, 200, 1000, 4099}) {
      expect_filter_contract(kernels, data, numel, ++seed);
      if (::testing::Test::HasFatalFailure()) return;
    }
}

} // namespace compressed_ddp::testing
