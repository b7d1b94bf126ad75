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
using testing::refusal_of_one;
using testing::TypedBuffer;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;

// Two tensor groups with a dense segment between.
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
  EXPECT_EQ(sizeof(PayloadHeader), 8u);
  EXPECT_EQ(offsetof(PayloadHeader, version), 0u);
  EXPECT_EQ(offsetof(PayloadHeader, flags), 1u);
  EXPECT_EQ(offsetof(PayloadHeader, rank), 2u);
  EXPECT_EQ(offsetof(PayloadHeader, step), 4u);
  EXPECT_EQ(offsetof(PayloadHeader, layout), 6u);
  EXPECT_EQ(kWireVersion, 3);
  EXPECT_EQ(kFlagNonFinite, 1);
}

TEST(WireFormat, EveryValueFormatHasANameAndNoOtherNameIsOne) {
  for (const ValueFormat value_format : testing::kValueFormats) EXPECT_EQ(value_format_of(name_of(value_format)), value_format);
  for (const char* name : {"fp16", "", "BF16", "bf16 ", "an unknown one"}) {
    try {
      value_format_of(name);
      ADD_FAILURE() << name;
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(error.what(), "value_format must be one of ('fp32', 'bf16', 'sign'), got '" + std::string(name) + "'");
    }
  }
}

// docs/wire_format.md, added up another way.
int64_t expected_bytes(int64_t numel, int64_t k, int64_t dense_numel, int64_t num_groups, ValueFormat value_format) {
  const auto up = [](int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; };
  const int64_t value_bits = value_format == ValueFormat::kFloat32 ? 32 * k : value_format == ValueFormat::kBFloat16 ? 16 * k : up(k, 32);
  int64_t bytes = 8 + (k + 255) / 256 * 4 + 4 * dense_numel + value_bits / 8 + k;
  if (k > 0) bytes += up(k + (numel - 1) / 256, 64) / 8;
  if (value_format == ValueFormat::kSign) bytes += 4 * num_groups;
  return up(bytes, 8);
}

TEST(WireFormat, SectionsFollowOneAnotherAlignedToTheirElementsAndTheSizeIsAMultipleOf8) {
  for (const ValueFormat value_format : testing::kValueFormats)
    for (const int64_t numel : {40, 256, 257, 5000})
      for (const int64_t k : {1, 2, 3, 31, 32, 33, 40})
        for (int64_t dense_numel = 0; dense_numel <= 20; ++dense_numel) {
          const Layout layout = Layout::make(Numbers{numel, dense_numel}, Numbers{0, -1}, Numbers{k}, value_format);
          const PayloadSections s = payload_sections(layout);
          ASSERT_EQ(s.high, 8);
          for (const int64_t begin : {s.directory, s.scales, s.dense}) ASSERT_EQ(begin % 4, 0);
          ASSERT_EQ(s.values % (value_format == ValueFormat::kBFloat16 ? 2 : 4), 0);
          ASSERT_LT(payload_bytes(layout) - s.used_bytes, 8);
          ASSERT_EQ(payload_bytes(layout), expected_bytes(numel + dense_numel, k, dense_numel, 1, value_format));
        }
}

TEST(WireFormat, AnEmptyBucketIsAHeader) { EXPECT_EQ(payload_bytes(Layout::make({}, {}, {})), 8); }

TEST(WireFormat, TheLargestBucketDoesNotOverflow) {
  constexpr int64_t kLimit = 2147483647;
  const Layout layout = Layout::make(Numbers{kLimit}, Numbers{0}, Numbers{kLimit});
  EXPECT_EQ(payload_bytes(layout), expected_bytes(kLimit, kLimit, 0, 1, ValueFormat::kFloat32));
}

TEST(WireFormat, EncodesTheGoldenPayloadsByteForByte) {
  for (const ValueFormat value_format : testing::kValueFormats) {
    SCOPED_TRACE(name_of(value_format));
    const Bytes golden = read_hex_file(std::string(COMPRESSED_DDP_TEST_DATA "/payload_v3_") + name_of(value_format) + ".txt");
    const Layout layout = Layout::make(Numbers{300, 2, 298}, Numbers{0, -1, 1}, Numbers{3, 2}, value_format);
    ASSERT_EQ(static_cast<int64_t>(golden.size()), payload_bytes(layout));
    std::vector<float> gradient(600, 99.0f);
    gradient[300] = 3.0f;
    gradient[301] = -0.0f;
    const Bytes payload =
        testing::payload_of_entries(layout, {1, 255, 256, 302, 599}, {1.5f, -2.0f, 1.00390625f, -0.375f, 0.25f}, gradient.data(), 1, 5);
    for (size_t i = 0; i < golden.size(); ++i) EXPECT_EQ(payload[i], golden[i]) << "byte " << i;
    EXPECT_EQ(refusal_of_one(layout, golden, 1, 5), "");
  }
}

TEST(WireFormat, TheFlagIsTheOnlyDifferenceOfANonFinitePayload) {
  const Layout layout = small_layout();
  Bytes finite = random_payload(layout, 0, 0, 1, false);
  const Bytes flagged = random_payload(layout, 0, 0, 1, true);
  EXPECT_EQ(finite[1], 0);
  finite[1] = 1;
  EXPECT_EQ(finite, flagged);
  EXPECT_EQ(read_header(flagged.data()).flags, kFlagNonFinite);
}

// ---- what a receiver refuses

TEST(CheckPayload, AcceptsWhatWasEncoded) {
  for (const Layout& layout : {small_layout(), bucket_layout(), Layout::make(Numbers{5}, Numbers{-1}, {}), Layout::make({}, {}, {})})
    for (const ValueFormat value_format : testing::kValueFormats) {
      Layout formatted = layout;
      formatted.value_format = value_format;
      EXPECT_EQ(refusal_of_one(formatted, random_payload(formatted, 3, 9, 2), 3, 9), "");
    }
}

TEST(CheckPayload, NamesEveryWrongFieldOfTheHeader) {
  struct Field {
    size_t offset;
    std::string words;
  };
  const Layout layout = small_layout();
  const std::vector<Field> fields = {
      {offsetof(PayloadHeader, version), "wire format version: expected 3, got 2; install the same compressed_ddp on every rank"},
      {offsetof(PayloadHeader, rank), "rank: expected 3, got 2 (modulo 65536)"},
      {offsetof(PayloadHeader, step), "step: expected 9, got 8 (modulo 65536)"},
      {offsetof(PayloadHeader, layout), "layout differs: other segments, groups, k or value_format"}};
  for (const Field& field : fields) {
    Bytes payload = random_payload(layout, 3, 9, 3);
    payload[field.offset] ^= 1;
    EXPECT_EQ(refusal_of_one(layout, payload, 3, 9), field.words);
  }
}

TEST(CheckPayload, AnyBitOfTheHeaderButTheNonFiniteFlagMakesADifference) {
  const Layout layout = small_layout();
  const Bytes good = random_payload(layout, 0, 0, 4);
  for (size_t bit = 0; bit < 8 * sizeof(PayloadHeader); ++bit) {
    if (bit == 8 * offsetof(PayloadHeader, flags)) continue; // kFlagNonFinite
    Bytes payload = good;
    payload[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    EXPECT_NE(refusal_of_one(layout, payload, 0, 0), "") << "bit " << bit;
  }
}

TEST(CheckPayload, APayloadOfAnotherLayoutOfTheSameSizeIsRefused) {
  const Layout mine = Layout::make(Numbers{6, 6}, Numbers{0, 1}, Numbers{2, 1});
  const Layout theirs = Layout::make(Numbers{6, 6}, Numbers{0, 1}, Numbers{1, 2});
  ASSERT_EQ(payload_bytes(mine), payload_bytes(theirs));
  EXPECT_EQ(refusal_of_one(mine, random_payload(theirs, 0, 0, 5), 0, 0), "layout differs: other segments, groups, k or value_format");
}

TEST(CheckPayload, RefusesIndicesOutsideTheirGroup) {
  const Layout layout = small_layout(); // group 0: two of 0 .. 5, group 1: one of 8 .. 11
  const auto refusal = [&](const std::vector<int32_t>& indices) {
    return refusal_of_one(layout, testing::payload_of_entries(layout, indices, {1, 2, 3}, nullptr, 0, 0), 0, 0);
  };
  const std::string group0 = "the indices of group 0 are not in [0, 5]", group1 = "the indices of group 1 are not in [8, 11]";
  EXPECT_EQ(refusal({0, 5, 8}), "");
  EXPECT_EQ(refusal({4, 5, 11}), "");
  EXPECT_EQ(refusal({3, 6, 8}), group0) << "in the dense segment behind";
  EXPECT_EQ(refusal({3, 9, 10}), group0) << "in the next group";
  EXPECT_EQ(refusal({0, 5, 7}), group1) << "in the dense segment before";
  EXPECT_EQ(refusal({0, 5, 12}), group1) << "out of the bucket";
  EXPECT_EQ(refusal({0, 5, 255}), group1) << "far out";
}

constexpr const char* kNoIndices = "its index bits are no strictly ascending indices";

TEST(CheckPayload, EveryBitOfTheIndicesMattersAndNoneIsMistakenForAnother) {
  // A changed bit of the high part changes how many there are or moves an index; one of the low part breaks the order or is another index,
  // which is for nobody to know. All sent entries share index >> 8 here, so that an order is broken where one can be.
  const Layout layout = testing::one_group(256, 200);
  std::vector<int32_t> indices(200);
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int32_t>(i);
  const Bytes good = testing::payload_of_entries(layout, indices, std::vector<float>(200, 1.0f), nullptr, 0, 0);
  ASSERT_EQ(refusal_of_one(layout, good, 0, 0), "");
  const PayloadSections s = payload_sections(layout);
  for (int64_t byte = s.high; byte < s.directory + 4 * s.directory_numel; ++byte)
    for (int bit = 0; bit < 8; ++bit) {
      Bytes bad = good;
      bad[static_cast<size_t>(byte)] ^= static_cast<uint8_t>(1 << bit);
      EXPECT_EQ(refusal_of_one(layout, bad, 0, 0), kNoIndices) << "byte " << byte << ", bit " << bit;
    }
  for (size_t e = 0; e + 1 < indices.size(); ++e) {
    Bytes bad = good;
    bad[static_cast<size_t>(s.low) + e] = bad[static_cast<size_t>(s.low) + e + 1];
    EXPECT_EQ(refusal_of_one(layout, bad, 0, 0), kNoIndices) << "equal at " << e;
  }
}

TEST(CheckPayload, ADirectoryOfSeveralPiecesIsChecked) {
  const Layout layout = testing::one_group(3 * kPieceNumel, 2 * kPieceNumel + 300);
  const Bytes good = random_payload(layout, 0, 0, 7);
  ASSERT_EQ(refusal_of_one(layout, good, 0, 0), "");
  const PayloadSections s = payload_sections(layout);
  for (int64_t d = 0; d < s.directory_numel; ++d)
    for (const uint32_t value : {0u, 1u, 77u, 0x7fffffffu, 0xffffffffu}) {
      Bytes bad = good;
      std::memcpy(bad.data() + s.directory + 4 * d, &value, 4);
      if (bad == good) continue;
      EXPECT_EQ(refusal_of_one(layout, bad, 0, 0), kNoIndices) << "directory " << d << ", value " << value;
    }
}

// The indices of a payload by the letter of docs/wire_format.md, bit by bit; empty when they are not in order.
std::vector<int64_t> plain_indices(const Layout& layout, const Bytes& payload) {
  const PayloadSections s = payload_sections(layout);
  std::vector<int64_t> indices;
  for (int64_t bit = 0; bit < 64 * s.high_words(); ++bit) {
    if ((payload[static_cast<size_t>(s.high + bit / 8)] >> (bit % 8) & 1) == 0) continue;
    const auto entry = static_cast<int64_t>(indices.size());
    if (entry == layout.selected_numel) return {};
    const int64_t high = bit - entry;
    uint32_t noted = 0;
    std::memcpy(&noted, payload.data() + s.directory + entry / 256 * 4, 4);
    if (entry % 256 == 0 && noted != high) return {};
    const int64_t index = high << 8 | payload[static_cast<size_t>(s.low + entry)];
    if (index >= layout.numel || (entry > 0 && index <= indices.back())) return {};
    indices.push_back(index);
  }
  return static_cast<int64_t>(indices.size()) == layout.selected_numel ? indices : std::vector<int64_t>{};
}

TEST(CheckPayload, LetsPassWhatAPlainDecoderLetsPassAndNothingElse) {
  constexpr uint64_t kSeed = 8;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  int64_t num_passed = 0, num_refused = 0;
  // One, several and no runs in a word; several strides and pieces; nearly everything sent.
  for (const Layout& layout : {testing::one_group(300, 255), testing::one_group(3 * 8192, 1100), testing::one_group(40000, 17000),
                               testing::one_group(17000, 16900), testing::one_group(1 << 20, 700)}) {
    const PayloadSections s = payload_sections(layout);
    const Bytes good = random_payload(layout, 0, 0, kSeed);
    for (int round = 0; round < 600; ++round) {
      Bytes payload = good;
      const auto byte_at = [&](int64_t byte) -> uint8_t& { return payload[static_cast<size_t>(byte)]; };
      const int64_t entry = random.integer(0, layout.selected_numel);
      switch (round % 4) {
        case 0: // another low byte, often by one
          byte_at(s.low + entry) = static_cast<uint8_t>(byte_at(s.low + entry) + (random.one_in(2) ? 1 : random.integer(0, 256)));
          break;
        case 1: { // a bit changes its place: as many as before
          const int64_t from = random.integer(0, s.high_bits), to = std::min(s.high_bits - 1, from + random.integer(1, 9));
          const auto bit_at = [&](int64_t bit) { return byte_at(s.high + bit / 8) >> (bit % 8) & 1; };
          if (bit_at(from) == bit_at(to)) break;
          byte_at(s.high + from / 8) ^= static_cast<uint8_t>(1 << from % 8);
          byte_at(s.high + to / 8) ^= static_cast<uint8_t>(1 << to % 8);
          break;
        }
        case 2:
          byte_at(random.integer(s.high, s.high + 8 * s.high_words())) ^= static_cast<uint8_t>(1 << random.integer(0, 8));
          break;
        default:
          byte_at(s.low + entry) = byte_at(s.low + std::max<int64_t>(entry - 1, 0)); // equal
      }
      const std::vector<int64_t> expected = plain_indices(layout, payload);
      ASSERT_EQ(refusal_of_one(layout, payload, 0, 0).empty(), !expected.empty()) << "round " << round;
      ++(expected.empty() ? num_refused : num_passed);
      if (expected.empty()) continue;
      const Entries entries = testing::entries_of(layout, payload.data());
      ASSERT_TRUE(std::equal(expected.begin(), expected.end(), entries.indices.begin(), entries.indices.end())) << "round " << round;
    }
  }
  EXPECT_GT(num_passed, 300);
  EXPECT_GT(num_refused, 1000);
}

TEST(CheckPayload, NamesTheFirstGroupThatIsWrongAmongMany) {
  Numbers segments, groups, k;
  for (int64_t g = 0; g < 400; ++g) {
    segments.push_back(1000 + g);
    groups.push_back(g);
    k.push_back(g % 3 == 0 ? 1 : g % 50); // some begin in the middle of a byte, a word, a stride
    if (k.back() == 0) k.back() = 7;
  }
  const Layout layout = Layout::make(segments, groups, k);
  Random random(9);
  const std::vector<int32_t> good = testing::random_indices(layout, random);
  const std::vector<float> values(good.size(), 1.0f);
  for (const size_t g : {size_t{0}, size_t{1}, size_t{2}, size_t{57}, size_t{200}, size_t{398}, size_t{399}}) {
    const Group& group = layout.groups[g];
    const Segment& segment = layout.segments[g];
    const int64_t first = segment.offset, last = segment.offset + segment.numel - 1;
    const std::string words =
        "the indices of group " + std::to_string(g) + " are not in [" + std::to_string(first) + ", " + std::to_string(last) + "]";
    std::vector<int32_t> bad = good;
    const auto at = static_cast<size_t>(group.entry_offset + group.k - 1);
    bad[at] = static_cast<int32_t>(last + 1);
    if (at + 1 == bad.size() || bad[at + 1] > bad[at]) {
      EXPECT_EQ(refusal_of_one(layout, testing::payload_of_entries(layout, bad, values, nullptr, 0, 0), 0, 0), words);
    }
    bad = good;
    const auto front = static_cast<size_t>(group.entry_offset);
    if (g == 0 || bad[front - 1] == first - 1) continue;
    bad[front] = static_cast<int32_t>(first - 1);
    EXPECT_EQ(refusal_of_one(layout, testing::payload_of_entries(layout, bad, values, nullptr, 0, 0), 0, 0), words);
  }
}

// Contract: whatever the bytes, decode reads only the payload, and what it lets pass keeps the decoders inside. The vectors have exact
// sizes, so AddressSanitizer is the judge here.
TEST(CheckPayload, SurvivesRandomBytesAndWhatPassesDecodesInsideTheBucket) {
  constexpr uint64_t kSeed = 7;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  int64_t num_passed = 0, num_refused = 0;
  for (Layout layout :
       {small_layout(), bucket_layout(), testing::one_group(1, 1), testing::one_group(9000, 3), testing::one_group(9000, 700)}) {
    layout.value_format = testing::kValueFormats[static_cast<size_t>(random.integer(0, 3))];
    const Bytes good = random_payload(layout, 0, 0, kSeed);
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
      if (!check_payloads(layout, payload.data(), 1, {0, 1}, 0, testing::in_one_go).empty()) {
        ++num_refused;
        continue;
      }
      ++num_passed;
      for (const GradientType type : testing::kGradientTypes) {
        TypedBuffer bucket(type, layout.numel);
        decode_apply(layout, {payload.data(), 1, bucket.data(), type}, testing::in_one_go);
        ASSERT_TRUE(bucket.guards_intact()) << "round " << round;
      }
      const Entries own = testing::entries_of(layout, payload.data());
      TypedBuffer residual(GradientType::kFloat32, std::vector<float>(static_cast<size_t>(layout.numel)));
      restore(layout, own, testing::segment_pointers(layout, static_cast<float*>(residual.data())).data());
      ASSERT_TRUE(residual.guards_intact()) << "round " << round;
    }
  }
  EXPECT_GT(num_passed, 1000);
  EXPECT_GT(num_refused, 1000);
}

} // namespace
} // namespace compressed_ddp
