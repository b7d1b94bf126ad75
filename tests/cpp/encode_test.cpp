#include "cpu/encode.h"

#include <cmath>

#include "testing.h"

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
  return {payload_dense(layout, payload.data()), static_cast<size_t>(layout.dense_numel)};
}

std::vector<uint8_t> blank_payload(const Layout& layout) { return std::vector<uint8_t>(static_cast<size_t>(payload_bytes(layout)), 0xff); }

TEST(Encode, SelectedEntriesComeBackAsTheyWere) {
  const Layout layout = layout_with_dense_parts();
  const std::vector<int32_t> indices{4, 8, 15};
  const std::vector<float> values{-0.0f, float_of(0x7fc00000), HUGE_VALF};
  std::vector<uint8_t> payload = blank_payload(layout);
  encode_selected(layout, values.data(), indices.data(), payload.data());
  EXPECT_TRUE(same_integers(indices, {payload_indices(layout, payload.data()), 3}));
  EXPECT_TRUE(same_bits(values, {payload_values(layout, payload.data()), 3}));
}

TEST(Encode, SelectionMayBeWrittenInPlace) {
  const Layout layout = layout_with_dense_parts();
  std::vector<uint8_t> payload = blank_payload(layout);
  const PayloadEntries entries = payload_entries(layout, payload.data());
  EXPECT_EQ(entries.indices, payload_indices(layout, payload.data()));
  EXPECT_EQ(entries.values, payload_values(layout, payload.data()));
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
    const bool inside = i >= dense_offset_bytes(layout) && i < dense_offset_bytes(layout) + 4 * layout.dense_numel;
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
  encode_header(layout, 6, 7, 1234567890123, true, payload.data());
  const PayloadHeader header = read_header(payload.data());
  EXPECT_EQ(header.magic, kPayloadMagic);
  EXPECT_EQ(header.version, kWireVersion);
  EXPECT_EQ(header.flags, kFlagNonFinite);
  EXPECT_EQ(header.rank, 6u);
  EXPECT_EQ(header.world_size, 7u);
  EXPECT_EQ(header.layout_hash, layout.hash);
  EXPECT_EQ(header.step, 1234567890123);
  EXPECT_EQ(header.numel, layout.numel);
  EXPECT_EQ(header.selected_numel, 3);
  EXPECT_EQ(header.dense_numel, 8);
  EXPECT_EQ(header.payload_bytes, payload_bytes(layout));
  const int64_t used_bytes = dense_offset_bytes(layout) + 4 * layout.dense_numel;
  ASSERT_LT(used_bytes, payload_bytes(layout));
  for (int64_t i = 64; i < payload_bytes(layout); ++i)
    EXPECT_EQ(payload[static_cast<size_t>(i)], i < used_bytes ? 0xff : 0x00) << "byte " << i;
}

TEST(Encode, ABucketWithoutSelectionsOrWithoutDensePartsIsFine) {
  const Layout dense_only = Layout::make(Numbers{4}, Numbers{-1}, {});
  std::vector<uint8_t> payload = blank_payload(dense_only);
  const std::vector<float> gradient{1, 2, 3, 4};
  encode_dense(dense_only, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  encode_selected(dense_only, nullptr, nullptr, payload.data());
  encode_header(dense_only, 0, 1, 0, false, payload.data());
  EXPECT_TRUE(same_bits(gradient, dense_of(dense_only, payload)));

  const Layout selected_only = testing::one_group(4, 1);
  payload = blank_payload(selected_only);
  const EncodeStatistics statistics = encode_dense(selected_only, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  EXPECT_EQ(statistics.gradient_sq, 0);
  EXPECT_EQ(payload, blank_payload(selected_only));
}

} // namespace
} // namespace compressed_ddp
