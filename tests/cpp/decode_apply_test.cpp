#include "cpu/decode_apply.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>

#include "cpu/decode_apply_store.h"
#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::all_cuts;
using testing::Cut;
using testing::random_gathered;
using testing::TypedBuffer;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;

constexpr int64_t kTileNumel = 8192;             // decode_apply.cpp; the layouts below put borders around it
constexpr int64_t kStreamNumel = (16 << 20) / 4; // fp32 entries from which on stores go past the caches

uint8_t* payload_of(const Layout& layout, Bytes& gathered, int64_t rank) { return gathered.data() + rank * payload_bytes(layout); }

// The contract as a plain loop: rank by rank, entry by entry, one multiplication, one rounding.
TypedBuffer reference(const Layout& layout, const Bytes& gathered, int64_t world_size, GradientType type) {
  std::vector<float> sums(static_cast<size_t>(layout.numel), 0.0f);
  for (int64_t rank = 0; rank < world_size; ++rank) {
    const uint8_t* payload = gathered.data() + rank * payload_bytes(layout);
    const Entries entries = testing::entries_of(layout, payload);
    const auto* dense = reinterpret_cast<const float*>(payload + payload_sections(layout).dense);
    for (size_t e = 0; e < entries.indices.size(); ++e) sums[static_cast<size_t>(entries.indices[e])] += entries.values[e];
    for (const Segment& segment : layout.segments)
      for (int64_t i = 0; segment.group == kDenseGroup && i < segment.numel; ++i)
        sums[static_cast<size_t>(segment.offset + i)] += dense[segment.dense_offset + i];
  }
  const float scale = 1.0f / static_cast<float>(world_size);
  for (float& sum : sums) sum *= scale;
  return TypedBuffer(type, sums);
}

void expect_equal(const TypedBuffer& expected, const TypedBuffer& actual) {
  ASSERT_EQ(expected.numel(), actual.numel());
  for (int64_t i = 0; i < expected.numel(); ++i)
    ASSERT_EQ(expected.bits_at(i), actual.bits_at(i))
        << "entry " << i << ": expected " << testing::show_float(expected.at(i)) << ", got " << testing::show_float(actual.at(i));
  ASSERT_TRUE(actual.guards_intact());
}

// Returns whether the result holds something non-finite.
bool decode_into(const Layout& layout, const Bytes& gathered, int64_t world_size, TypedBuffer& bucket, const Cut& cut = all_cuts()[0],
                 int64_t step = 0) {
  EXPECT_EQ(check_payloads(layout, gathered.data(), world_size, {0}, step, cut.parallel_for), "");
  return decode_apply(layout, {gathered.data(), world_size, bucket.data(), bucket.type()}, cut.parallel_for);
}

TypedBuffer decoded(const Layout& layout, const Bytes& gathered, int64_t world_size, GradientType type, const Cut& cut = all_cuts()[0],
                    int64_t misalignment = 0, int64_t step = 0) {
  // What lies in the bucket before, here the own gradient, must not show in the result.
  TypedBuffer bucket(type, std::vector<float>(static_cast<size_t>(layout.numel), 123.0f), misalignment);
  EXPECT_FALSE(decode_into(layout, gathered, world_size, bucket, cut, step));
  return bucket;
}

void append(Bytes& gathered, const Layout& layout, const std::vector<int32_t>& indices, const std::vector<float>& values, int64_t rank) {
  const Bytes payload = testing::payload_of_entries(layout, indices, values, nullptr, rank, 0);
  gathered.insert(gathered.end(), payload.begin(), payload.end());
}

struct NamedLayout {
  const char* name;
  Layout layout;
};

std::vector<NamedLayout> layouts_around_tiles() {
  const int64_t t = kTileNumel;
  return {
      {"one entry", testing::one_group(1, 1)},
      {"less than a tile", testing::one_group(1000, 30)},
      {"exactly a tile", testing::one_group(t, 100)},
      {"a tile and one", testing::one_group(t + 1, 100)},
      {"a tile less one, everything sent", testing::one_group(t - 1, t - 1)},
      {"high bits that fill their words", testing::one_group(64, 64)},
      {"high bits that fill their words, twice", testing::one_group(256, 192)},
      {"high bits that fill their words, and all of a part", testing::one_group(256, 256)},
      {"several tiles", testing::one_group(3 * t + 17, 500)},
      {"dense only", Layout::make(Numbers{t + 5, 0, 2 * t - 10, 3}, Numbers{-1, -1, -1, -1}, {})},
      {"a dense segment across tiles", Layout::make(Numbers{t - 100, 2 * t + 300, 50}, Numbers{0, -1, 1}, Numbers{80, 5})},
      {"a dense segment that ends with its tile", Layout::make(Numbers{t - 7, 7, t, 9}, Numbers{0, -1, 1, -1}, Numbers{20, 30})},
      {"a dense segment that reaches one entry into a tile", Layout::make(Numbers{t - 7, 8, t, 9}, Numbers{0, -1, 1, -1}, Numbers{20, 30})},
      {"a bucket group around dense segments",
       Layout::make(Numbers{5000, 40, 6000, 5000, 9000, 1}, Numbers{0, -1, 0, -1, 0, -1}, Numbers{700})},
      {"tensor groups", Layout::make(Numbers{4000, 100, 12000, 3, 8192, 1}, Numbers{0, 1, 2, -1, 3, 4}, Numbers{40, 100, 1, 82, 1})},
      {"nothing", Layout::make({}, {}, {})},
  };
}

TEST(DecodeApply, EqualsThePlainSumInRankOrderBitForBit) {
  constexpr uint64_t kSeed = 1;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  for (const auto& [name, layout] : layouts_around_tiles())
    for (const int64_t world_size : {1, 2, 3, 8}) {
      SCOPED_TRACE(std::string(name) + ", world_size " + std::to_string(world_size));
      const Bytes gathered = random_gathered(layout, world_size, 4, kSeed);
      for (const GradientType type : testing::kGradientTypes) {
        SCOPED_TRACE(testing::name_of(type));
        expect_equal(reference(layout, gathered, world_size, type), decoded(layout, gathered, world_size, type, all_cuts()[0], 0, 4));
      }
    }
}

TEST(DecodeApply, DoesNotDependOnHowTilesAreCutNorOnTheirOrder) {
  constexpr uint64_t kSeed = 2;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  for (const auto& [name, layout] : layouts_around_tiles()) {
    const Bytes gathered = random_gathered(layout, 3, 0, kSeed);
    for (const Cut& cut : all_cuts()) {
      SCOPED_TRACE(std::string(name) + ", tiles " + cut.name);
      for (const GradientType type : testing::kGradientTypes)
        expect_equal(reference(layout, gathered, 3, type), decoded(layout, gathered, 3, type, cut));
    }
  }
}

TEST(DecodeApply, TheBucketMayBeginAnywhere) {
  constexpr uint64_t kSeed = 3;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  const Layout layout = Layout::make(Numbers{9000, 77, 500}, Numbers{0, -1, 1}, Numbers{90, 5});
  const Bytes gathered = random_gathered(layout, 2, 0, kSeed);
  for (const GradientType type : testing::kGradientTypes)
    for (int64_t misalignment = 0; misalignment < 8; ++misalignment)
      expect_equal(reference(layout, gathered, 2, type), decoded(layout, gathered, 2, type, all_cuts()[0], misalignment));
}

TEST(DecodeApply, BucketsThatAreStoredPastTheCachesAreEqualToo) {
  constexpr uint64_t kSeed = 4;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  for (const int64_t numel : {kStreamNumel - 1, kStreamNumel, kStreamNumel + 5}) {
    // The dense segment crosses many tiles, and its ends lie inside of one.
    const Layout layout = Layout::make(Numbers{1000003, 300001, numel - 1300004}, Numbers{0, -1, 1}, Numbers{1001, 801});
    const Bytes gathered = random_gathered(layout, 3, 0, kSeed);
    const TypedBuffer expected = reference(layout, gathered, 3, GradientType::kFloat32);
    for (const int64_t misalignment : {0, 1, 2, 3}) {
      SCOPED_TRACE("numel " + std::to_string(numel) + ", misalignment " + std::to_string(misalignment));
      const Cut& cut = all_cuts()[static_cast<size_t>(misalignment)];
      expect_equal(expected, decoded(layout, gathered, 3, GradientType::kFloat32, cut, misalignment));
    }
  }
}

template <typename gradient_t>
void expect_every_store_kernel_to_round(uint64_t seed) {
  std::vector<const StoreKernels*> kernels = {&kPortableStore};
#if COMPRESSED_DDP_X86
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&kAvx2Store);
#endif
  constexpr float kInf = std::numeric_limits<float>::infinity();
  // Ties, numbers that round to 0 or to Inf in 16 bits, denormals, NaN with a payload, a signalling one.
  const float specials[] = {0.0f,
                            -0.0f,
                            4e-41f,
                            4 * 65519.0f,
                            4 * 65520.0f,
                            -2e5f,
                            3.4e38f,
                            4.0f * 0x1.004p0f,
                            4.0f * 0x1.01p0f,
                            4.0f * 0x1p-25f,
                            4.0f * 0x1.8p-24f,
                            4.0f * 0x1p-14f,
                            kInf,
                            -kInf,
                            std::bit_cast<float>(0x7fc12345u),
                            std::bit_cast<float>(0xff812345u)};
  constexpr int64_t kBorder = 16; // entries that nothing may touch
  constexpr size_t kLongest = 140;
  gradient_t border;
  from_float(9.0f, border);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  for (const StoreKernels* store : kernels)
    for (const float scale : {0.25f, 1.0f})
      for (const bool stream : {false, true})
        for (size_t numel = 0; numel < kLongest; ++numel)
          for (size_t begin = 0; begin < 16; ++begin) // of the bucket, behind an aligned address
            for (const float special : specials) {
              const size_t at = numel == 0 ? 1 : random() % numel;
              std::vector<float> sums(numel + 1, 7.0f);
              std::vector<gradient_t> expected(numel);
              bool is_finite = true;
              for (size_t i = 0; i < numel; ++i) {
                sums[i] = i == at ? special : normal(random);
                from_float(sums[i] * scale, expected[i]);
                is_finite = is_finite && std::isfinite(to_float(expected[i]));
              }
              alignas(64) gradient_t out[kBorder + 16 + kLongest + kBorder];
              std::fill(std::begin(out), std::end(out), border);
              gradient_t* bucket = out + kBorder + begin;
              const float zero = (*store)(sums.data(), static_cast<int64_t>(numel), scale, bucket, stream);
              ASSERT_EQ(std::memcmp(bucket, expected.data(), numel * sizeof(gradient_t)), 0) << numel << ' ' << begin << ' ' << special;
              ASSERT_EQ(zero == 0, is_finite) << special;
              ASSERT_TRUE(std::all_of(sums.begin(), sums.end() - 1, [](float sum) { return std::bit_cast<uint32_t>(sum) == 0; }));
              ASSERT_EQ(sums.back(), 7.0f);
              for (int64_t i = 1; i <= kBorder; ++i)
                ASSERT_TRUE(to_float(bucket[-i]) == 9.0f && to_float(bucket[static_cast<int64_t>(numel) + i - 1]) == 9.0f);
            }
}

TEST(DecodeApply, EveryStoreKernelGivesTheSameBits) {
  constexpr uint64_t kSeed = 6;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  expect_every_store_kernel_to_round<float>(kSeed);
  expect_every_store_kernel_to_round<Float16>(kSeed);
  expect_every_store_kernel_to_round<BFloat16>(kSeed);
}

TEST(DecodeApply, LargeSixteenBitBucketsAreEqualToo) {
  constexpr uint64_t kSeed = 5;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  const Layout layout = testing::one_group(2 * kStreamNumel + 3, 5000);
  const Bytes gathered = random_gathered(layout, 2, 0, kSeed);
  expect_equal(reference(layout, gathered, 2, GradientType::kBFloat16), decoded(layout, gathered, 2, GradientType::kBFloat16));
}

// Hand-made numbers for which another order of additions, a fused one, or a second rounding gives another result.
TEST(DecodeApply, AddsInRankOrderAndRoundsOnce) {
  const Layout layout = testing::one_group(1, 1);
  const auto average = [&](const std::vector<float>& values, GradientType type) {
    const auto world_size = static_cast<int64_t>(values.size());
    Bytes gathered;
    for (int64_t rank = 0; rank < world_size; ++rank) append(gathered, layout, {0}, {values[static_cast<size_t>(rank)]}, rank);
    return decoded(layout, gathered, world_size, type).at(0);
  };
  EXPECT_EQ(average({1e8f, 1.0f, -1e8f}, GradientType::kFloat32), 0.0f);
  EXPECT_EQ(average({1e8f, -1e8f, 1.0f}, GradientType::kFloat32), 1.0f * (1.0f / 3.0f));
  EXPECT_EQ(average({65504.0f, 65504.0f}, GradientType::kFloat16), 65504.0f) << "summed in fp32, where 131008 fits";
  EXPECT_EQ(testing::bits_of(average({-0.0f}, GradientType::kFloat32)), 0u) << "a sum begins at +0";
  // fp32(1/3) is a little above 1/3, and the factor comes once.
  EXPECT_EQ(average({1.0f, 1.0f, 1.0f}, GradientType::kFloat32), 3.0f * (1.0f / 3.0f));
}

TEST(DecodeApply, EveryRankGetsTheSameBits) {
  // Each rank decodes the same gathered bytes: what differs between ranks is what their buckets held before, and their threads.
  const Layout layout = Layout::make(Numbers{20000, 300}, Numbers{0, -1}, Numbers{200});
  const Bytes gathered = random_gathered(layout, 3, 0, 6);
  TypedBuffer first(GradientType::kFloat16, testing::normal_values(layout.numel, 7));
  TypedBuffer second(GradientType::kFloat16, std::vector<float>(static_cast<size_t>(layout.numel), std::nanf("")), 3);
  decode_into(layout, gathered, 3, first, all_cuts()[0]);
  decode_into(layout, gathered, 3, second, all_cuts()[4]);
  expect_equal(first, second);
}

TEST(DecodeApply, TheFlagOfAnyRankMakesTheWholeBucketNan) {
  const Layout layout = Layout::make(Numbers{9000, 50}, Numbers{0, -1}, Numbers{90});
  for (int64_t flagged = 0; flagged < 3; ++flagged) {
    Bytes gathered = random_gathered(layout, 3, 0, 8);
    EXPECT_FALSE(any_non_finite(layout, gathered.data(), 3));
    encode_header(layout, flagged, 0, true, payload_of(layout, gathered, flagged));
    EXPECT_TRUE(any_non_finite(layout, gathered.data(), 3));
    for (const GradientType type : testing::kGradientTypes) {
      TypedBuffer bucket(type, std::vector<float>(static_cast<size_t>(layout.numel), 1.0f), 1);
      EXPECT_TRUE(decode_into(layout, gathered, 3, bucket));
      for (int64_t i = 0; i < layout.numel; ++i) ASSERT_TRUE(std::isnan(bucket.at(i))) << testing::name_of(type) << ", entry " << i;
      EXPECT_TRUE(bucket.guards_intact());
    }
  }
}

// Finite payloads may add up to more than the bucket's type holds.
TEST(DecodeApply, ANonFiniteResultWithoutAnyFlagIsReportedAndStaysInItsPlace) {
  const Layout layout = testing::one_group(2, 1);
  for (const auto& [type, value] :
       {std::pair{GradientType::kFloat32, 3e38f}, {GradientType::kFloat16, 70000.0f}, {GradientType::kBFloat16, 3e38f}}) {
    SCOPED_TRACE(testing::name_of(type));
    Bytes gathered;
    for (int64_t rank = 0; rank < 2; ++rank) append(gathered, layout, {1}, {value}, rank);
    TypedBuffer bucket(type, 2);
    EXPECT_TRUE(decode_into(layout, gathered, 2, bucket));
    EXPECT_EQ(bucket.at(0), 0.0f);
    EXPECT_EQ(bucket.at(1), HUGE_VALF);
  }
}

TEST(DecodeApply, ANonFiniteResultIsReportedWhereverItLies) {
  for (const GradientType type : testing::kGradientTypes)
    for (const int64_t numel : {int64_t{9}, 2 * kTileNumel + 7, kStreamNumel * 4 / element_bytes(type) + 5}) {
      const Layout layout = testing::one_group(numel, 1);
      TypedBuffer bucket(type, numel, 1);
      // The beginning before an aligned store, each lane of one, the end of a tile, the rest behind the last whole vector.
      std::vector<int64_t> indices = {numel / 2, numel - 3, numel - 2, numel - 1};
      for (int64_t index = 0; index < std::min<int64_t>(numel, 18); ++index) indices.push_back(index);
      for (const int64_t index : indices)
        for (const float value : {1.0f, HUGE_VALF, std::nanf("")}) {
          SCOPED_TRACE(std::string(testing::name_of(type)) + ", numel " + std::to_string(numel) + ", index " + std::to_string(index) +
                       ", value " + testing::show_float(value));
          Bytes gathered;
          append(gathered, layout, {static_cast<int32_t>(index)}, {value}, 0);
          const bool non_finite = decode_into(layout, gathered, 1, bucket, all_cuts()[2]);
          ASSERT_EQ(non_finite, !std::isfinite(value));
          ASSERT_EQ(std::isfinite(bucket.at(index)), std::isfinite(value));
          ASSERT_EQ(bucket.at(index == 0 ? 1 : index - 1), 0.0f);
        }
    }
}

TEST(DecodeApply, EveryValueFormatGivesTheSumOfWhatItDecodesTo) {
  constexpr uint64_t kSeed = 13;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  for (const ValueFormat value_format : testing::kValueFormats) {
    SCOPED_TRACE(name_of(value_format));
    const Layout layout =
        Layout::make(Numbers{4000, 100, 60000, 3, 8192, 1}, Numbers{0, 1, 2, -1, 3, 4}, Numbers{40, 100, 20000, 82, 1}, value_format);
    const Bytes gathered = random_gathered(layout, 3, 0, kSeed);
    for (const Cut& cut : all_cuts())
      expect_equal(reference(layout, gathered, 3, GradientType::kFloat32), decoded(layout, gathered, 3, GradientType::kFloat32, cut));
  }
}

TEST(Decode, NamesTheRankAndTheField) {
  const Layout layout = Layout::make(Numbers{100, 10}, Numbers{0, -1}, Numbers{7});
  const Bytes good = random_gathered(layout, 4, 12, 10);
  EXPECT_EQ(testing::refusal_of(layout, good, 4, 12), "");
  for (int64_t rank = 0; rank < 4; ++rank) {
    Bytes bad = good;
    payload_of(layout, bad, rank)[payload_sections(layout).low + 6] = 100;
    EXPECT_EQ(testing::refusal_of(layout, bad, 4, 12),
              "the payload of rank " + std::to_string(rank) + " is not what this rank expects (the indices of group 0 are not in [0, 99])");
  }
  EXPECT_EQ(testing::refusal_of(layout, good, 4, 13),
            "the payload of rank 0 is not what this rank expects (step: expected 13, got 12 (modulo 65536))");
}

TEST(Decode, PayloadsInAnotherOrderAreRefused) {
  const Layout layout = testing::one_group(100, 7);
  Bytes gathered = random_gathered(layout, 2, 0, 11);
  std::swap_ranges(gathered.begin(), gathered.begin() + payload_bytes(layout), gathered.begin() + payload_bytes(layout));
  EXPECT_EQ(testing::refusal_of(layout, gathered, 2, 0),
            "the payload of rank 0 is not what this rank expects (rank: expected 0, got 1 (modulo 65536))");
}

} // namespace
} // namespace compressed_ddp
