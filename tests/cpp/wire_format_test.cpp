#include "wire_format.h"

#include <fstream>
#include <sstream>

#include "cpu/decode_apply.h"
#include "cpu/restore.h"
#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::Random;
using testing::random_payload;
using testing::TypedBuffer;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;

// Two tensor groups with a dense segment between: the layout of data/payload_v1.txt.
Layout small_layout() { return Layout::make(Numbers{6, 2, 4}, Numbers{0, -1, 1}, Numbers{2, 1}); }

// One bucket group around a dense segment, then another group.
Layout bucket_layout() { return Layout::make(Numbers{300, 50, 200, 77}, Numbers{0, -1, 0, 1}, Numbers{20, 9}); }

// Hexadecimal bytes; a line that begins with # is a comment.
Bytes read_hex_file(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file.is_open()) << path;
  Bytes bytes;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with('#')) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;) bytes.push_back(static_cast<uint8_t>(std::stoi(word, nullptr, 16)));
  }
  return bytes;
}

// ---- the numbers that never change

TEST(WireFormat, HeaderFieldsLieWhereTheDocumentSays) {
  EXPECT_EQ(sizeof(PayloadHeader), 64u);
  EXPECT_EQ(offsetof(PayloadHeader, magic), 0u);
  EXPECT_EQ(offsetof(PayloadHeader, version), 4u);
  EXPECT_EQ(offsetof(PayloadHeader, flags), 6u);
  EXPECT_EQ(offsetof(PayloadHeader, rank), 8u);
  EXPECT_EQ(offsetof(PayloadHeader, world_size), 12u);
  EXPECT_EQ(offsetof(PayloadHeader, layout_hash), 16u);
  EXPECT_EQ(offsetof(PayloadHeader, step), 24u);
  EXPECT_EQ(offsetof(PayloadHeader, numel), 32u);
  EXPECT_EQ(offsetof(PayloadHeader, selected_numel), 40u);
  EXPECT_EQ(offsetof(PayloadHeader, dense_numel), 48u);
  EXPECT_EQ(offsetof(PayloadHeader, payload_bytes), 56u);
  EXPECT_EQ(kWireVersion, 1);
  EXPECT_EQ(kFlagNonFinite, 1);
}

TEST(WireFormat, SectionsFollowOneAnotherAndTheSizeIsAMultipleOf64) {
  const Layout layout = small_layout();
  EXPECT_EQ(indices_offset_bytes(), 64);
  EXPECT_EQ(values_offset_bytes(layout), 64 + 4 * 3);
  EXPECT_EQ(dense_offset_bytes(layout), 64 + 8 * 3);
  EXPECT_EQ(payload_bytes(layout), 128);

  for (int64_t k = 1; k <= 40; ++k)
    for (int64_t dense_numel = 0; dense_numel <= 20; ++dense_numel) {
      const Layout other = Layout::make(Numbers{40, dense_numel}, Numbers{0, -1}, Numbers{k});
      const int64_t used_bytes = 64 + 8 * k + 4 * dense_numel;
      ASSERT_EQ(payload_bytes(other) % 64, 0);
      ASSERT_GE(payload_bytes(other), used_bytes);
      ASSERT_LT(payload_bytes(other), used_bytes + 64);
    }
}

TEST(WireFormat, AnEmptyBucketIsAHeader) { EXPECT_EQ(payload_bytes(Layout::make({}, {}, {})), 64); }

TEST(WireFormat, TheLargestBucketDoesNotOverflow) {
  constexpr int64_t kLimit = 2147483647;
  const Layout layout = Layout::make(Numbers{kLimit}, Numbers{0}, Numbers{kLimit});
  EXPECT_EQ(payload_bytes(layout), (64 + 8 * kLimit + 63) / 64 * 64);
}

TEST(WireFormat, EncodesTheGoldenPayloadByteForByte) {
  const Bytes golden = read_hex_file(COMPRESSED_DDP_TEST_DATA "/payload_v1.txt");
  const Layout layout = small_layout();
  ASSERT_EQ(static_cast<int64_t>(golden.size()), payload_bytes(layout));

  const std::vector<int32_t> indices{1, 4, 10};
  const std::vector<float> values{1.5f, -2.0f, 0.25f};
  std::vector<float> gradient(12, 99.0f);
  gradient[6] = 3.0f;
  gradient[7] = -0.0f;
  Bytes payload(golden.size(), 0xff);
  encode_dense(layout, gradient.data(), GradientType::kFloat32, nullptr, payload.data());
  encode_selected(layout, values.data(), indices.data(), payload.data());
  encode_header(layout, 1, 2, 5, false, payload.data());
  for (size_t i = 0; i < golden.size(); ++i) EXPECT_EQ(payload[i], golden[i]) << "byte " << i;

  EXPECT_EQ(check_payload(layout, golden.data(), 1, 2, 5), "");
}

TEST(WireFormat, TheFlagIsTheOnlyDifferenceOfANonFinitePayload) {
  const Layout layout = small_layout();
  Bytes finite = random_payload(layout, 0, 1, 0, 1, false);
  const Bytes flagged = random_payload(layout, 0, 1, 0, 1, true);
  EXPECT_EQ(finite[6], 0);
  finite[6] = 1;
  EXPECT_EQ(finite, flagged);
  EXPECT_EQ(read_header(flagged.data()).flags, kFlagNonFinite);
}

// ---- what a receiver refuses

TEST(CheckPayload, AcceptsWhatWasEncoded) {
  for (const Layout& layout : {small_layout(), bucket_layout(), Layout::make(Numbers{5}, Numbers{-1}, {}), Layout::make({}, {}, {})})
    EXPECT_EQ(check_payload(layout, random_payload(layout, 3, 4, 9, 2).data(), 3, 4, 9), "");
}

TEST(CheckPayload, NamesEveryWrongFieldOfTheHeader) {
  struct Field {
    size_t offset;
    std::string words;
  };
  const Layout layout = small_layout();
  const std::vector<Field> fields = {
      {offsetof(PayloadHeader, magic), "magic: expected 1346651203, got 1346651202"},
      {offsetof(PayloadHeader, version), "wire format version: expected 1, got 0; install the same compressed_ddp on every rank"},
      {offsetof(PayloadHeader, rank), "rank: expected 3, got 2"},
      {offsetof(PayloadHeader, world_size), "world_size: expected 5, got 4"},
      {offsetof(PayloadHeader, layout_hash), "layout_hash differs: other segments, groups or k"},
      {offsetof(PayloadHeader, step), "step: expected 9, got 8"},
      {offsetof(PayloadHeader, numel), "numel: expected 12, got 13"},
      {offsetof(PayloadHeader, selected_numel), "selected entries: expected 3, got 2"},
      {offsetof(PayloadHeader, dense_numel), "dense entries: expected 2, got 3"},
      {offsetof(PayloadHeader, payload_bytes), "payload_bytes: expected 128, got 129"}};
  for (const Field& field : fields) {
    Bytes payload = random_payload(layout, 3, 5, 9, 3);
    payload[field.offset] ^= 1;
    EXPECT_EQ(check_payload(layout, payload.data(), 3, 5, 9), field.words);
  }
}

TEST(CheckPayload, AnyBitOfTheHeaderButTheNonFiniteFlagMakesADifference) {
  const Layout layout = small_layout();
  const Bytes good = random_payload(layout, 0, 2, 0, 4);
  for (size_t bit = 0; bit < 8 * sizeof(PayloadHeader); ++bit) {
    if (bit == 8 * offsetof(PayloadHeader, flags)) continue; // kFlagNonFinite
    Bytes payload = good;
    payload[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    EXPECT_NE(check_payload(layout, payload.data(), 0, 2, 0), "") << "bit " << bit;
  }
}

TEST(CheckPayload, APayloadOfAnotherLayoutOfTheSameSizeIsRefused) {
  const Layout mine = Layout::make(Numbers{6, 6}, Numbers{0, 1}, Numbers{2, 1});
  const Layout theirs = Layout::make(Numbers{6, 6}, Numbers{0, 1}, Numbers{1, 2});
  ASSERT_EQ(payload_bytes(mine), payload_bytes(theirs));
  EXPECT_EQ(check_payload(mine, random_payload(theirs, 0, 1, 0, 5).data(), 0, 1, 0), "layout_hash differs: other segments, groups or k");
}

// Payloads whose indices are replaced by the given ones.
std::string check_with_indices(const Layout& layout, const std::vector<int32_t>& indices) {
  Bytes payload = random_payload(layout, 0, 1, 0, 6);
  EXPECT_EQ(static_cast<int64_t>(indices.size()), layout.selected_numel);
  std::memcpy(payload.data() + indices_offset_bytes(), indices.data(), indices.size() * 4);
  return check_payload(layout, payload.data(), 0, 1, 0);
}

TEST(CheckPayload, RefusesIndicesThatDoNotAscendInsideTheirGroup) {
  const Layout layout = small_layout(); // group 0: two of 0 .. 5, group 1: one of 8 .. 11
  const std::string group0 = "the indices of group 0 are not strictly ascending in [0, 5]";
  const std::string group1 = "the indices of group 1 are not strictly ascending in [8, 11]";
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min(), kMax = std::numeric_limits<int32_t>::max();
  EXPECT_EQ(check_with_indices(layout, {0, 5, 8}), "");
  EXPECT_EQ(check_with_indices(layout, {4, 5, 11}), "");
  EXPECT_EQ(check_with_indices(layout, {4, 1, 8}), group0) << "descending";
  EXPECT_EQ(check_with_indices(layout, {3, 3, 8}), group0) << "duplicate";
  EXPECT_EQ(check_with_indices(layout, {-1, 3, 8}), group0) << "negative";
  EXPECT_EQ(check_with_indices(layout, {kMin, 3, 8}), group0) << "very negative";
  EXPECT_EQ(check_with_indices(layout, {3, 6, 8}), group0) << "in the dense segment behind";
  EXPECT_EQ(check_with_indices(layout, {3, kMax, 8}), group0) << "far out of range";
  EXPECT_EQ(check_with_indices(layout, {0, 5, 7}), group1) << "in the dense segment before";
  EXPECT_EQ(check_with_indices(layout, {0, 5, 12}), group1) << "out of the bucket";
  EXPECT_EQ(check_with_indices(layout, {0, 5, -8}), group1) << "negative in a later group";
}

TEST(CheckPayload, ADisorderAnywhereAmongManyIndicesIsFound) {
  const Layout layout = testing::one_group(400, 200);
  std::vector<int32_t> indices(200);
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int32_t>(2 * i);
  ASSERT_EQ(check_with_indices(layout, indices), "");
  for (size_t i = 1; i < indices.size(); ++i) {
    std::vector<int32_t> wrong = indices;
    wrong[i] = wrong[i - 1];
    EXPECT_NE(check_with_indices(layout, wrong), "") << "duplicate at " << i;
    wrong = indices;
    wrong[i] = -5;
    EXPECT_NE(check_with_indices(layout, wrong), "") << "negative at " << i;
  }
}

// Contract: whatever the bytes, check_payload reads only the payload, and what it lets pass keeps the decoders inside. The vectors
// have exact sizes, so AddressSanitizer is the judge here.
TEST(CheckPayload, SurvivesRandomBytesAndWhatPassesDecodesInsideTheBucket) {
  constexpr uint64_t kSeed = 7;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  int64_t num_passed = 0, num_refused = 0;
  for (const Layout& layout : {small_layout(), bucket_layout(), testing::one_group(1, 1), testing::one_group(9000, 3)}) {
    const Bytes good = random_payload(layout, 0, 1, 0, kSeed);
    const auto num_bytes = static_cast<int64_t>(good.size());
    for (int round = 0; round < 3000; ++round) {
      Bytes payload = good;
      // Half of the rounds leave the header alone, so that the index check is reached.
      const int64_t first_byte = round % 2 == 0 ? 0 : static_cast<int64_t>(sizeof(PayloadHeader));
      const int64_t num_changes = random.integer(1, 4);
      for (int64_t c = 0; c < num_changes; ++c) {
        uint8_t& byte = payload[static_cast<size_t>(random.integer(first_byte, num_bytes))];
        byte = random.one_in(2) ? static_cast<uint8_t>(random.bits()) : static_cast<uint8_t>(byte ^ 1 << random.integer(0, 8));
      }
      if (round % 100 == 0) // nothing but noise, now and then
        for (uint8_t& byte : payload) byte = static_cast<uint8_t>(random.bits());
      if (!check_payload(layout, payload.data(), 0, 1, 0).empty()) {
        ++num_refused;
        continue;
      }
      ++num_passed;
      for (const GradientType type : testing::kGradientTypes) {
        TypedBuffer bucket(type, layout.numel);
        decode_apply(layout, {payload.data(), 1, bucket.data(), type}, testing::all_cuts()[0].parallel_for);
        ASSERT_TRUE(bucket.guards_intact()) << "round " << round;
      }
      TypedBuffer residual(GradientType::kFloat32, std::vector<float>(static_cast<size_t>(layout.numel)));
      restore(layout, payload.data(), nullptr, testing::segment_pointers(layout, static_cast<float*>(residual.data())).data());
      ASSERT_TRUE(residual.guards_intact()) << "round " << round;
    }
  }
  EXPECT_GT(num_passed, 1000);
  EXPECT_GT(num_refused, 1000);
}

} // namespace
} // namespace compressed_ddp
