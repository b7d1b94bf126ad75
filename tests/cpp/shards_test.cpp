#include "cpu/shards.h"

#include <cmath>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::bits_of;
using testing::float_of;
using testing::Random;
using testing::same_bits;
using testing::TypedBuffer;
using Bytes = std::vector<uint8_t>;
using Pieces = std::vector<ShardPiece>;

// ---- pack_shards

// Two parameters of 5 and 3 entries for two ranks: [3 of the first, 2 of the second, presence][2, 1, presence].
const Pieces kPacked = {{0, 0, 3}, {5, 3, 2}, {3, 7, 2}, {7, 9, 1}};
const std::vector<int64_t> kPresenceFrom = {5, 10};

TEST(PackShards, CopiesPiecesAndSaysWhichParametersAreUsed) {
  for (const GradientType type : testing::kGradientTypes) {
    const TypedBuffer bucket(type, std::vector<float>{1, 2, 3, 4, -5, -0.0f, 7, 8}, 1);
    TypedBuffer shards(type, 12, 1);
    const Bytes unused = {0, 1};
    pack_shards({kPacked, kPresenceFrom, unused, bucket.data(), type, shards.data()});
    const std::vector<float> expected = {1, 2, 3, -0.0f, 7, 1, 0, 4, -5, 8, 1, 0};
    EXPECT_TRUE(same_bits(expected, shards.values())) << testing::name_of(type);
    EXPECT_TRUE(shards.guards_intact());
  }
}

// A signalling NaN would become a quiet one if it went through a register for floats.
TEST(PackShards, CopiesBitsAndNotNumbers) {
  for (const GradientType type : {GradientType::kFloat16, GradientType::kBFloat16}) {
    std::vector<uint16_t> bucket = {0x7c01, 0xfc01, 0x7f81, 0xffff, 0x0001, 0x8000, 0x7c00, 0xff80}, shards(12, 0x1234);
    pack_shards({kPacked, kPresenceFrom, Bytes{1, 1}, bucket.data(), type, shards.data()});
    const std::vector<uint16_t> expected = {0x7c01, 0xfc01, 0x7f81, 0x8000, 0x7c00, 0, 0, 0xffff, 0x0001, 0xff80, 0, 0};
    EXPECT_EQ(shards, expected);
  }
}

TEST(PackShards, WritesNothingWithoutPiecesAndParameters) {
  TypedBuffer shards(GradientType::kFloat32, 0);
  pack_shards({{}, kPresenceFrom, {}, nullptr, GradientType::kFloat32, shards.data()});
  pack_shards({Pieces{{0, 0, 0}}, {}, Bytes{0}, nullptr, GradientType::kFloat32, shards.data()});
  EXPECT_TRUE(shards.guards_intact());
}

// ---- mean_of_shards

// One entry after the other, as the contract has it.
std::vector<float> reference_mean(const TypedBuffer& shards, int64_t count) {
  std::vector<float> mean(static_cast<size_t>(shards.numel() / count));
  for (size_t i = 0; i < mean.size(); ++i) {
    float sum = 0;
    for (int64_t s = 0; s < count; ++s) sum += shards.at(s * static_cast<int64_t>(mean.size()) + static_cast<int64_t>(i));
    mean[i] = sum * (1.0f / static_cast<float>(count));
    if (std::isnan(mean[i])) mean[i] = float_of(kCanonicalNanBits);
  }
  return mean;
}

std::vector<float> mean_of(const TypedBuffer& shards, int64_t count) {
  TypedBuffer mean(GradientType::kFloat32, shards.numel() / count, 1);
  mean_of_shards(shards.data(), shards.type(), count, shards.numel() / count, static_cast<float*>(mean.data()));
  EXPECT_TRUE(mean.guards_intact());
  return mean.values();
}

TEST(MeanOfShards, AddsInRankOrderWhateverTheSize) {
  constexpr int64_t kTile = 4096; // shards.cpp
  for (const GradientType type : testing::kGradientTypes)
    for (const int64_t count : {1, 2, 3, 8})
      for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{33}, kTile - 1, kTile, 2 * kTile + 17}) {
        SCOPED_TRACE(std::string(testing::name_of(type)) + ", count " + std::to_string(count) + ", numel " + std::to_string(numel));
        std::vector<float> values = testing::normal_values(count * numel, 71);
        Random random(72);
        for (float& value : values) value = std::ldexp(value, static_cast<int>(random.integer(-8, 8))); // the order of additions shows
        const TypedBuffer shards(type, values, 1);
        ASSERT_TRUE(same_bits(reference_mean(shards, count), mean_of(shards, count)));
      }
}

TEST(MeanOfShards, TheOrderOfRanksIsTheOrderOfAdditions) {
  EXPECT_EQ(mean_of(TypedBuffer(GradientType::kFloat32, std::vector<float>{1e8f, 1, -1e8f, 0}), 4)[0], 0.0f);
  EXPECT_EQ(mean_of(TypedBuffer(GradientType::kFloat32, std::vector<float>{1e8f, -1e8f, 1, 0}), 4)[0], 0.25f);
}

TEST(MeanOfShards, ZerosAreAddedToZeroAndNonFiniteEntriesStaySo) {
  const float nan = float_of(0xffc12345u), canonical = float_of(kCanonicalNanBits);
  for (const GradientType type : testing::kGradientTypes) {
    const TypedBuffer shards(type, std::vector<float>{-0.0f, HUGE_VALF, -HUGE_VALF, HUGE_VALF, nan, 1, //
                                                      -0.0f, 1, -HUGE_VALF, -HUGE_VALF, 1, nan});
    EXPECT_TRUE(same_bits(std::vector<float>{0, HUGE_VALF, -HUGE_VALF, canonical, canonical, canonical}, mean_of(shards, 2)))
        << testing::name_of(type);
  }
}

TEST(MeanOfShards, EveryNumberOfSixteenBitsIsItsOwnMean) {
  for (const GradientType type : {GradientType::kFloat16, GradientType::kBFloat16}) {
    std::vector<uint16_t> all(1 << 16);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
    std::vector<float> mean(all.size());
    mean_of_shards(all.data(), type, 1, 1 << 16, mean.data());
    for (size_t i = 0; i < all.size(); ++i) {
      const float value = type == GradientType::kFloat16 ? to_float(Float16{all[i]}) : to_float(BFloat16{all[i]});
      ASSERT_EQ(bits_of(mean[i]), std::isnan(value) ? kCanonicalNanBits : bits_of(0.0f + value)) << i;
    }
  }
}

#if defined(__SSE2__)
TEST(MeanOfShards, DenormalsAreKeptWhateverTheThreadDoesWithThem) {
  const TypedBuffer shards(GradientType::kFloat32, std::vector<float>{0x1p-140f, 0x1p-127f, 0x1p-140f, 0x1p-127f});
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040); // torch.set_flush_denormal(True)
  const std::vector<float> mean = mean_of(shards, 2);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_TRUE(same_bits(std::vector<float>{0x1p-140f, 0x1p-127f}, mean));
  EXPECT_EQ(after & 0x8040u, 0x8040u);
}
#endif

// ---- check_slots, unpack_shards

constexpr int64_t kSlotBytes = 128; // a header and at most 64 bytes of a shard
constexpr PayloadHeader kExpected{kWireVersion, 0, 4, 7, 0x1234};

// The bucket of 8 entries, from slots of ranks 4 and 5; rank 5 has the longer shard.
struct Slots {
  explicit Slots(GradientType type) : type(type), bytes(2 * kSlotBytes), bucket(type, 8, 1) {
    const int64_t size = element_bytes(type), slot_numel = kSlotBytes / size, header_numel = kSlotAlignment / size;
    pieces = {{5, header_numel, 3}, {3, slot_numel + header_numel + 3, 2}, {0, slot_numel + header_numel, 3}, {8, 0, 0}};
    for (int s = 0; s < 2; ++s) {
      PayloadHeader header = kExpected;
      header.rank = static_cast<uint16_t>(header.rank + s);
      set_header(s, header);
    }
    const TypedBuffer shards(type, std::vector<float>{6, -0.0f, 8, 1, 2, 3, 4, -5});
    const auto* values = static_cast<const uint8_t*>(shards.data());
    std::copy_n(values, 3 * size, bytes.begin() + kSlotAlignment);
    std::copy_n(values + 3 * size, 5 * size, bytes.begin() + kSlotBytes + kSlotAlignment);
  }
  void set_header(int64_t slot, const PayloadHeader& header) { std::memcpy(bytes.data() + slot * kSlotBytes, &header, sizeof header); }
  PayloadHeader header(int64_t slot) const { return read_header(bytes.data() + slot * kSlotBytes); }
  UnpackArguments arguments() { return {pieces, bytes.data(), kSlotBytes, 2, kExpected, bucket.data(), 8, type}; }

  GradientType type;
  Pieces pieces;
  Bytes bytes;
  TypedBuffer bucket;
};

TEST(UnpackShards, PutsEverySlotWhereItBelongs) {
  for (const GradientType type : testing::kGradientTypes) {
    Slots slots(type);
    EXPECT_EQ(check_slots(slots.arguments()), "");
    EXPECT_FALSE(unpack_shards(slots.arguments()));
    EXPECT_TRUE(same_bits(std::vector<float>{1, 2, 3, 4, -5, 6, -0.0f, 8}, slots.bucket.values())) << testing::name_of(type);
    EXPECT_TRUE(slots.bucket.guards_intact());
  }
}

TEST(UnpackShards, OneFlaggedSlotMakesTheWholeBucketNan) {
  for (const GradientType type : testing::kGradientTypes)
    for (const int64_t flagged : {0, 1}) {
      Slots slots(type);
      PayloadHeader header = slots.header(flagged);
      header.flags = kFlagNonFinite;
      slots.set_header(flagged, header);
      EXPECT_EQ(check_slots(slots.arguments()), "");
      EXPECT_TRUE(unpack_shards(slots.arguments()));
      for (int64_t i = 0; i < 8; ++i)
        EXPECT_EQ(slots.bucket.bits_at(i), type == GradientType::kFloat32   ? 0x7fc00000u
                                           : type == GradientType::kFloat16 ? 0x7e00u
                                                                            : 0x7fc0u);
      EXPECT_TRUE(slots.bucket.guards_intact());
    }
}

TEST(CheckSlots, NamesTheFirstRankWhoseHeaderIsAnother) {
  struct Case {
    void (*change)(PayloadHeader&);
    const char* why;
  };
  const Case cases[] = {
      {[](PayloadHeader& h) { h.version = 1; }, "wire format version: expected 3, got 1; install the same compressed_ddp on every rank"},
      {[](PayloadHeader& h) { h.flags = kFlagRefused; }, "its rank had nothing to send: its own error says why"},
      {[](PayloadHeader& h) { h.flags = 4; }, "flags beyond the non-finite one: expected 0, got 4"},
      {[](PayloadHeader& h) { h.rank ^= 2; }, nullptr}, // below
      {[](PayloadHeader& h) { h.step = 6; }, "step: expected 7, got 6 (modulo 65536)"},
      {[](PayloadHeader& h) { h.layout ^= 1; }, "layout differs: other segments, groups, k or value_format"}};
  for (const Case& c : cases)
    for (const int64_t slot : {0, 1}) {
      Slots slots(GradientType::kFloat32);
      PayloadHeader header = slots.header(slot);
      const std::string rank = std::to_string(header.rank);
      c.change(header);
      slots.set_header(slot, header);
      const std::string why =
          c.why != nullptr ? c.why : "rank: expected " + rank + ", got " + std::to_string(header.rank) + " (modulo 65536)";
      EXPECT_EQ(check_slots(slots.arguments()), "the shard of rank " + rank + " is not what this rank expects (" + why + ")");
    }
}

TEST(CheckSlots, NamesTheFirstOfTwo) {
  Slots slots(GradientType::kBFloat16);
  for (const int64_t slot : {0, 1}) {
    PayloadHeader header = slots.header(slot);
    header.step = static_cast<uint16_t>(100 + slot);
    slots.set_header(slot, header);
  }
  EXPECT_EQ(check_slots(slots.arguments()), "the shard of rank 4 is not what this rank expects (step: expected 7, got 100 (modulo 65536))");
}

} // namespace
} // namespace compressed_ddp
