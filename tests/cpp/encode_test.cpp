#include "cpu/encode.h"

#include <cmath>
#include <cstdlib>
#include <new>

#include "testing.h"

// Counts what is allocated. Not inlined: GCC warns of a malloc that meets a delete, and of a new that meets a free.
static int64_t num_allocations = 0;
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++num_allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace compressed_ddp {
namespace {

using testing::float_of;
using testing::same_bits;
using testing::same_integers;
using testing::TypedBuffer;
using Numbers = std::vector<int64_t>;

//                                       0  1  2  3  4
Layout layout_with_dense_parts() { return Layout::make(Numbers{3, 6, 5, 0, 2}, Numbers{-1, 0, -1, -1, 1}, Numbers{2, 1}); }

std::span<const float> dense_of(const Layout& layout, const std::vector<uint8_t>& payload) {
  return {reinterpret_cast<const float*>(payload.data() + payload_sections(layout).dense), static_cast<size_t>(layout.dense_numel)};
}

std::vector<uint8_t> blank_payload(const Layout& layout) { return std::vector<uint8_t>(static_cast<size_t>(payload_bytes(layout)), 0xff); }

TEST(Encode, Fp32EntriesComeBackAsTheyWere) {
  const Layout layout = layout_with_dense_parts();
  const std::vector<int32_t> indices{4, 8, 15};
  const std::vector<float> values{-0.0f, float_of(0x7fc00000), HUGE_VALF};
  const Entries entries = testing::entries_of(layout, testing::payload_of_entries(layout, indices, values, nullptr, 0, 0).data());
  EXPECT_TRUE(same_integers(indices, entries.indices));
  EXPECT_TRUE(same_bits(values, entries.values));
}

// As decode_apply reads them, from the second tile on with a cursor that was sent there.
std::vector<int32_t> read_in_tiles(const Layout& layout, const std::vector<uint8_t>& payload, int64_t width) {
  const PayloadSections sections = payload_sections(layout);
  std::vector<int32_t> indices;
  IndexCursor cursor(sections, payload.data(), layout.selected_numel);
  for (int64_t begin = 0; begin < layout.numel; begin += width) {
    std::vector<uint16_t> offsets(static_cast<size_t>(width + IndexCursor::kOffsetSlack));
    IndexCursor sent(sections, payload.data(), layout.selected_numel);
    sent.go_to_index(begin);
    EXPECT_EQ(sent.entry(), cursor.entry());
    const int64_t count = (begin / width % 2 == 0 ? cursor : sent).offsets_below(begin, begin + width, offsets.data());
    for (int64_t i = 0; i < count; ++i) indices.push_back(static_cast<int32_t>(begin + offsets[static_cast<size_t>(i)]));
    if (begin / width % 2 != 0) cursor = sent;
  }
  return indices;
}

TEST(Encode, IndicesComeBackWhateverTheirPattern) {
  constexpr uint64_t kSeed = 2;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  testing::Random random(kSeed);
  struct Case {
    int64_t numel, k;
  };
  // Around the borders of low bytes, words, directory strides and pieces; all, one, and hardly any of the entries.
  for (const auto& [numel, k] : std::vector<Case>{{1, 1},
                                                  {256, 1},
                                                  {257, 1},
                                                  {64, 64},
                                                  {256, 256},
                                                  {300, 255},
                                                  {300, 256},
                                                  {300, 257},
                                                  {70000, 2},
                                                  {70000, 70000},
                                                  {1 << 20, 300},
                                                  {kPieceNumel + 1, kPieceNumel + 1},
                                                  {300000, 2 * kPieceNumel},
                                                  {300000, 2 * kPieceNumel + 77},
                                                  {1 << 22, 3 * kPieceNumel + 1}}) {
    SCOPED_TRACE("numel " + std::to_string(numel) + ", k " + std::to_string(k));
    const Layout layout = testing::one_group(numel, k);
    std::vector<int32_t> first(static_cast<size_t>(k)), last = first;
    for (int64_t e = 0; e < k; ++e) {
      first[static_cast<size_t>(e)] = static_cast<int32_t>(e);
      last[static_cast<size_t>(e)] = static_cast<int32_t>(numel - k + e);
    }
    for (const std::vector<int32_t>& indices : {testing::random_indices(layout, random), first, last}) {
      const std::vector<float> values(indices.size(), float_of(0x3fffffff)); // the byte behind the high bits is no more of them
      for (const testing::Cut& cut : testing::all_cuts()) {
        std::vector<uint8_t> payload = blank_payload(layout);
        encode_selected(layout, {values.data(), indices.data(), nullptr, false, payload.data()}, cut.parallel_for);
        encode_header(layout, 0, 0, false, payload.data());
        Entries entries;
        ASSERT_EQ(decode_own(layout, payload.data(), entries, cut.parallel_for), "") << cut.name;
        ASSERT_TRUE(same_integers(indices, entries.indices)) << cut.name;
        for (const int64_t width : {256, 8192, 65536}) ASSERT_TRUE(same_integers(indices, read_in_tiles(layout, payload, width))) << width;
      }
    }
  }
}

TEST(Encode, AllocatesNothingOnceTheEntriesHaveLeftTheResidual) {
  for (const ValueFormat value_format : testing::kValueFormats) {
    const Layout layout = Layout::make(Numbers{100000, 500}, Numbers{0, 1}, Numbers{2 * kPieceNumel + 5, 50}, value_format);
    testing::Random random(5);
    const std::vector<int32_t> indices = testing::random_indices(layout, random);
    const std::vector<float> values = testing::normal_values(layout.selected_numel, 6);
    std::vector<float> residual(static_cast<size_t>(layout.numel));
    const std::vector<float*> residuals = testing::segment_pointers(layout, residual.data());
    std::vector<uint8_t> payload = blank_payload(layout);
    const int64_t before = num_allocations;
    encode_selected(layout, {values.data(), indices.data(), residuals.data(), false, payload.data()}, testing::in_one_go);
    encode_header(layout, 0, 0, false, payload.data());
    EXPECT_EQ(num_allocations, before) << name_of(value_format);
  }
}

struct Lossy { // what came back of the values, and what the residual holds then
  std::vector<float> decoded, residual;
  double lost_sq;
};

Lossy encoded(ValueFormat value_format, const std::vector<float>& values, std::vector<float> residual, bool non_finite = false) {
  const auto k = static_cast<int64_t>(values.size());
  const Layout layout = Layout::make(Numbers{k}, Numbers{0}, Numbers{k}, value_format);
  std::vector<int32_t> indices(values.size());
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int32_t>(i);
  std::vector<uint8_t> payload = blank_payload(layout);
  float* const residuals[] = {residual.data()};
  const double lost_sq =
      encode_selected(layout, {values.data(), indices.data(), residuals, non_finite, payload.data()}, testing::in_one_go);
  encode_header(layout, 0, 0, non_finite, payload.data());
  return {testing::entries_of(layout, payload.data()).values, residual, lost_sq};
}

TEST(Encode, Bf16ValuesAreRoundedToNearestEvenAndTheResidualKeepsTheRestExactly) {
  constexpr uint64_t kSeed = 3;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::vector<float> values = testing::normal_values(50000, kSeed);
  for (const uint32_t bits : {0x3f808000u, 0x3f818000u, 0xbf808000u, 0x3f807fffu, 0x3f808001u, 0x00000001u, 0x80008000u, 0x007fffffu})
    values.push_back(float_of(bits));
  const Lossy result = encoded(ValueFormat::kBFloat16, values, std::vector<float>(values.size()));
  double lost_sq = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    BFloat16 nearest;
    from_float(values[i], nearest);
    ASSERT_EQ(testing::bits_of(result.decoded[i]), testing::bits_of(to_float(nearest))) << i;
    ASSERT_EQ(result.decoded[i] + static_cast<double>(result.residual[i]), values[i]) << i;
    lost_sq += static_cast<double>(result.residual[i]) * result.residual[i];
  }
  EXPECT_NEAR(result.lost_sq, lost_sq, 1e-12 * lost_sq);
}

TEST(Encode, Bf16NeverMakesAFiniteValueInfinite) {
  const float largest = float_of(0x7f7fffff);
  const Lossy result =
      encoded(ValueFormat::kBFloat16, {largest, -largest, HUGE_VALF, -HUGE_VALF, float_of(0xffc12345)}, {0, 0, 1, 2, 3}, true);
  EXPECT_TRUE(same_bits(std::vector<float>{float_of(0x7f7f0000), float_of(0xff7f0000), HUGE_VALF, -HUGE_VALF, float_of(kCanonicalNanBits)},
                        result.decoded));
  EXPECT_TRUE(
      same_bits(std::vector<float>{float_of(0x7f7fffff) - float_of(0x7f7f0000), float_of(0x7f7f0000) - float_of(0x7f7fffff), 1, 2, 3},
                result.residual))
      << "non-finite entries leave the residual alone";
}

TEST(Encode, SignValuesCountTheMeanMagnitudeOfTheirGroup) {
  const Lossy result = encoded(ValueFormat::kSign, {3.0f, -1.0f, 2.0f, -0.0f}, {0, 0, 0, 0});
  EXPECT_TRUE(same_bits(std::vector<float>{1.5f, -1.5f, 1.5f, -1.5f}, result.decoded));
  EXPECT_TRUE(same_bits(std::vector<float>{1.5f, 0.5f, 0.5f, 1.5f}, result.residual));
  EXPECT_EQ(result.lost_sq, 2.25 + 0.25 + 0.25 + 2.25);
}

TEST(Encode, TheScaleOfSignsIsTheRoundedMeanWhateverTheOrder) {
  constexpr uint64_t kSeed = 4;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  testing::Random random(kSeed);
  for (const int spread : {0, 1, 20, 120}) {
    std::vector<float> values = testing::normal_values(3001, kSeed);
    for (float& value : values) value = std::ldexp(value, static_cast<int>(random.integer(-spread, spread + 1)));
    long double sum = 0;
    for (const float value : values) sum += std::abs(static_cast<long double>(value));
    const float scale = encoded(ValueFormat::kSign, values, values).decoded[0];
    EXPECT_FLOAT_EQ(std::abs(scale), static_cast<float>(sum / static_cast<long double>(values.size())));
    std::reverse(values.begin(), values.end());
    EXPECT_EQ(std::abs(encoded(ValueFormat::kSign, values, values).decoded[0]), std::abs(scale));
  }
}

TEST(Encode, ALargeGroupHasTheScaleOfAllItsEntriesHoweverTheWorkIsCut) {
  constexpr int64_t kLarge = 3 * kPieceNumel + 77;
  const Layout layout = Layout::make(Numbers{100, kLarge}, Numbers{0, 1}, Numbers{100, kLarge}, ValueFormat::kSign);
  const std::vector<float> values = testing::normal_values(layout.selected_numel, 7);
  std::vector<int32_t> indices(values.size());
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int32_t>(i);
  const auto scale = [&](size_t begin, size_t end) {
    const Lossy alone =
        encoded(ValueFormat::kSign, {values.begin() + static_cast<int64_t>(begin), values.begin() + static_cast<int64_t>(end)},
                std::vector<float>(end - begin));
    return std::abs(alone.decoded[0]);
  };
  const std::vector<float> expected{scale(0, 100), scale(100, values.size())};
  double sum = 0;
  for (size_t i = 100; i < values.size(); ++i) sum += std::abs(static_cast<double>(values[i]));
  EXPECT_FLOAT_EQ(expected[1], static_cast<float>(sum / kLarge));
  for (const testing::Cut& cut : testing::all_cuts()) {
    std::vector<uint8_t> payload = blank_payload(layout);
    encode_selected(layout, {values.data(), indices.data(), nullptr, false, payload.data()}, cut.parallel_for);
    const auto* scales = reinterpret_cast<const float*>(payload.data() + payload_sections(layout).scales);
    EXPECT_TRUE(same_bits(expected, {scales, 2})) << cut.name;
  }
}

TEST(Encode, ANonFiniteBucketSendsSignsThatCountNothing) {
  const Lossy result = encoded(ValueFormat::kSign, {3.0f, HUGE_VALF, -2.0f}, {0.0f, 7.0f, 0.0f}, true);
  for (const float value : result.decoded) EXPECT_EQ(value, 0.0f);
  EXPECT_TRUE(same_bits(std::vector<float>{3.0f, 7.0f, -2.0f}, result.residual));
}

TEST(Encode, DenseSegmentsTravelAsFp32InBucketOrderForEveryType) {
  const Layout layout = layout_with_dense_parts();
  const std::vector<float> source = testing::normal_values(layout.numel, 1);
  for (const GradientType type : testing::kGradientTypes)
    for (const int64_t misalignment : {0, 1, 3}) {
      SCOPED_TRACE(testing::name_of(type));
      const TypedBuffer gradient(type, source, misalignment);
      std::vector<float> expected;
      for (const int64_t i : {0, 1, 2, 9, 10, 11, 12, 13}) expected.push_back(gradient.at(i));
      std::vector<uint8_t> payload = blank_payload(layout);
      encode_dense(layout, gradient.data(), type, nullptr, payload.data());
      EXPECT_TRUE(same_bits(expected, dense_of(layout, payload)));
    }
}

TEST(Encode, WritesTheDensePartOnly) {
  const Layout layout = layout_with_dense_parts();
  std::vector<uint8_t> payload = blank_payload(layout);
  const std::vector<float> gradient(static_cast<size_t>(layout.numel));
  encode_dense(layout, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  for (int64_t i = 0; i < payload_bytes(layout); ++i) {
    const int64_t dense = payload_sections(layout).dense;
    const bool inside = i >= dense && i < dense + 4 * layout.dense_numel;
    EXPECT_EQ(payload[static_cast<size_t>(i)], inside ? 0x00 : 0xff) << "byte " << i;
  }
}

TEST(Encode, UnusedDenseSegmentsTravelAsZerosWhateverTheBucketHolds) {
  const Layout layout = layout_with_dense_parts();
  std::vector<float> gradient(static_cast<size_t>(layout.numel), 2.0f);
  gradient[1] = std::nanf(""); // in the unused segment: never read
  const std::vector<uint8_t> unused{1, 0, 0, 0, 0};
  std::vector<uint8_t> payload = blank_payload(layout);
  const EncodeStatistics statistics = encode_dense(layout, gradient.data(), GradientType::kFloat32, unused.data(), payload.data());
  EXPECT_TRUE(same_bits(std::vector<float>{0, 0, 0, 2, 2, 2, 2, 2}, dense_of(layout, payload)));
  EXPECT_EQ(statistics.gradient_sq, 5 * 4.0);
  EXPECT_EQ(statistics.non_finite, 0);
}

TEST(Encode, EveryNanOfADenseSegmentTravelsAsTheCanonicalOne) {
  const Layout layout = Layout::make(Numbers{3}, Numbers{-1}, {});
  const float canonical = float_of(kCanonicalNanBits);
  for (const GradientType type : testing::kGradientTypes) {
    SCOPED_TRACE(testing::name_of(type));
    const TypedBuffer gradient(type, std::vector<float>{float_of(0xff812345), 1.0f, float_of(0x7fffffff)});
    std::vector<uint8_t> payload = blank_payload(layout);
    EXPECT_EQ(encode_dense(layout, gradient.data(), type, nullptr, payload.data()).non_finite, 2);
    EXPECT_TRUE(same_bits(std::vector<float>{canonical, 1.0f, canonical}, dense_of(layout, payload)));
  }
}

TEST(Encode, StatisticsCountTheDenseSegmentsOnly) {
  const Layout layout = layout_with_dense_parts();
  std::vector<float> gradient(static_cast<size_t>(layout.numel), 100.0f);
  for (const int i : {0, 1, 2, 9, 10, 11, 12, 13}) gradient[static_cast<size_t>(i)] = static_cast<float>(i);
  gradient[5] = HUGE_VALF; // in a group: the business of compensate_select
  std::vector<uint8_t> payload = blank_payload(layout);
  EncodeStatistics statistics = encode_dense(layout, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  EXPECT_EQ(statistics.gradient_sq, 0 + 1 + 4 + 81 + 100 + 121 + 144 + 169);
  EXPECT_EQ(statistics.non_finite, 0);

  gradient[2] = -HUGE_VALF;
  gradient[13] = float_of(0xff812345);
  statistics = encode_dense(layout, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  EXPECT_EQ(statistics.non_finite, 2);
}

TEST(Encode, HeaderSaysWhoSentWhatAndThePaddingIsCleared) {
  const Layout layout = layout_with_dense_parts();
  std::vector<uint8_t> payload = blank_payload(layout);
  encode_header(layout, 6, 1234567890123, true, payload.data());
  const PayloadHeader header = read_header(payload.data());
  EXPECT_EQ(header.version, kWireVersion);
  EXPECT_EQ(header.flags, kFlagNonFinite);
  EXPECT_EQ(header.rank, 6);
  EXPECT_EQ(header.step, 1234567890123 % 65536);
  EXPECT_EQ(header.layout, (layout.hash ^ layout.hash >> 16 ^ layout.hash >> 32 ^ layout.hash >> 48) % 65536);
  const PayloadSections sections = payload_sections(layout);
  for (int64_t i = 8; i < payload_bytes(layout); ++i)
    EXPECT_EQ(payload[static_cast<size_t>(i)], i < sections.used_bytes ? 0xff : 0x00) << "byte " << i;
  EXPECT_LT(sections.used_bytes, payload_bytes(layout));
}

TEST(Encode, ABucketWithoutSelectionsOrWithoutDensePartsIsFine) {
  const Layout dense_only = Layout::make(Numbers{4}, Numbers{-1}, {});
  std::vector<uint8_t> payload = blank_payload(dense_only);
  const std::vector<float> gradient{1, 2, 3, 4};
  encode_dense(dense_only, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  encode_selected(dense_only, {nullptr, nullptr, nullptr, false, payload.data()}, testing::in_one_go);
  encode_header(dense_only, 0, 0, false, payload.data());
  EXPECT_TRUE(same_bits(gradient, dense_of(dense_only, payload)));

  const Layout selected_only = testing::one_group(4, 1);
  payload = blank_payload(selected_only);
  const EncodeStatistics statistics = encode_dense(selected_only, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  EXPECT_EQ(statistics.gradient_sq, 0);
  EXPECT_EQ(payload, blank_payload(selected_only));
}

} // namespace
} // namespace compressed_ddp
