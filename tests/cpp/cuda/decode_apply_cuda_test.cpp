// decode_apply_, restore_ and return_dropped on CUDA against the CPU engine, bit for bit, and against payloads that nobody should send.
#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>

#include "../fuzz/payload_input.h"
#include "../testing.h"
#include "cpu/decode_apply.h"
#include "cpu/restore.h"
#include "cpu/return_dropped.h"
#include "cuda/decode_apply.h"
#include "cuda/restore.h"
#include "cuda/return_dropped.h"
#include "cuda_cases.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;

constexpr int64_t kDecodeTile = 8192; // decode_apply.cu

struct Decoded {
  Bytes bucket;
  cuda::DecodeStatus status;
};

Decoded decode_on_cuda(const Layout& layout, const Bytes& gathered, int32_t world_size, GradientType type, size_t front = 0,
                       int64_t step = kStep, uint32_t bad_rank = 0) {
  CudaPlan plan(layout);
  DeviceMemory<uint8_t> payloads{std::span<const uint8_t>(gathered)};
  const auto size = static_cast<size_t>(element_bytes(type));
  DeviceMemory<uint8_t> bucket(static_cast<size_t>(layout.numel) * size, front * size);
  bucket.fill_bytes(0x11);
  const std::vector<cuda::DecodeStatus> before = {{bad_rank, 0, 0}};
  DeviceMemory<cuda::DecodeStatus> status{std::span<const cuda::DecodeStatus>(before)};
  cuda::decode_apply(plan.device(), {payloads.data(), world_size, bucket.data(), type, make_header(layout, 0, step, false), status.data()},
                     nullptr);
  require(cudaStreamSynchronize(nullptr), "decode_apply");
  return {bucket.download(), status.download()[0]};
}

Bytes decode_on_cpu(const Layout& layout, const Bytes& gathered, int64_t world_size, GradientType type) {
  TypedBuffer bucket(type, layout.numel);
  EXPECT_EQ(check_payloads(layout, gathered.data(), world_size, {0}, kStep, in_one_go), "");
  decode_apply(layout, {gathered.data(), world_size, bucket.data(), type}, in_one_go);
  const auto* bytes = static_cast<const uint8_t*>(bucket.data());
  return {bytes, bytes + layout.numel * element_bytes(type)};
}

std::vector<Layout> layouts() {
  const int64_t t = kDecodeTile;
  return {one_group(1, 1),
          one_group(t, 100),
          one_group(t + 1, 100),
          one_group(3 * t + 17, 500),
          one_group(t - 1, t - 1),
          Layout::make(Numbers{t + 5, 0, 2 * t - 10, 3}, Numbers{-1, -1, -1, -1}, Numbers{}),
          Layout::make(Numbers{t - 100, 2 * t + 300, 50}, Numbers{0, -1, 1}, Numbers{80, 5}),
          Layout::make(Numbers{5000, 40, 6000, 5000, 9000, 1}, Numbers{0, -1, 0, -1, 0, -1}, Numbers{700}),
          Layout::make(Numbers{4000, 100, 12000, 3, 8192, 1}, Numbers{0, 1, 2, -1, 3, 4}, Numbers{40, 100, 1, 82, 1}),
          Layout::make(Numbers{}, Numbers{}, Numbers{})};
}

Layout with(Layout layout, ValueFormat value_format) {
  std::vector<int64_t> numels, groups, k;
  for (const Segment& segment : layout.segments) numels.push_back(segment.numel), groups.push_back(segment.group);
  for (const Group& group : layout.groups) k.push_back(group.k);
  return Layout::make(numels, groups, k, value_format);
}

TEST(DecodeApplyCuda, EqualsTheCpuEngineBitForBit) {
  for (const Layout& of_fp32 : layouts())
    for (const int32_t world_size : {1, 2, 3, 8}) {
      const Layout layout = with(of_fp32, kValueFormats[static_cast<size_t>(world_size % 3)]); // every one with every layout
      SCOPED_TRACE("numel " + std::to_string(layout.numel) + ", world_size " + std::to_string(world_size) + ", " +
                   name_of(layout.value_format) + ", seed 51");
      const Bytes gathered = random_gathered(layout, world_size, kStep, 51);
      for (const GradientType type : kGradientTypes) {
        const Decoded decoded = decode_on_cuda(layout, gathered, world_size, type);
        ASSERT_EQ(decode_on_cpu(layout, gathered, world_size, type), decoded.bucket) << testing::name_of(type);
        ASSERT_EQ(decoded.status.bad_rank, 0u);
        ASSERT_EQ(decoded.status.step_is_bad, 0u);
      }
    }
}

TEST(DecodeApplyCuda, ManyRanksAndUnalignedBucketsGiveTheSameBits) {
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout = Layout::make(Numbers{kDecodeTile + 3, 20, 100}, Numbers{0, -1, 1}, Numbers{60, 4}, value_format);
    for (const int32_t world_size : {1, 255, 256, 257, 600}) {
      SCOPED_TRACE(std::string(name_of(value_format)) + ", world_size " + std::to_string(world_size) + ", seed 52");
      const Bytes gathered = random_gathered(layout, world_size, kStep, 52);
      const Decoded decoded = decode_on_cuda(layout, gathered, world_size, GradientType::kFloat32, 1);
      ASSERT_EQ(decode_on_cpu(layout, gathered, world_size, GradientType::kFloat32), decoded.bucket);
      ASSERT_EQ(decoded.status.bad_rank, 0u);
      ASSERT_EQ(decoded.status.step_is_bad, 0u);
    }
  }
}

// Wherever in a tile, and with 16-byte accesses or without.
TEST(DecodeApplyCuda, ASumThatOverflowsMakesItsStepBad) {
  for (const ValueFormat value_format : kValueFormats)
    for (const GradientType type : kGradientTypes)
      for (const int32_t index : {0, 3, 4000, 8191, 8192, 9000, 9001, 9002})
        for (const size_t front : {0, 1}) {
          SCOPED_TRACE(std::string(name_of(value_format)) + ", " + testing::name_of(type) + ", entry " + std::to_string(index) +
                       (front > 0 ? ", unaligned" : ""));
          const Layout layout = Layout::make(Numbers{9003}, Numbers{0}, Numbers{1}, value_format);
          const float largest = 0x1.fep127f; // of all value formats
          Bytes gathered;
          for (int64_t rank = 0; rank < 2; ++rank) {
            const Bytes payload = payload_of_entries(layout, {index}, {largest}, nullptr, rank, kStep);
            gathered.insert(gathered.end(), payload.begin(), payload.end());
          }
          const Decoded decoded = decode_on_cuda(layout, gathered, 2, type, front);
          ASSERT_EQ(decode_on_cpu(layout, gathered, 2, type), decoded.bucket);
          ASSERT_EQ(decoded.status.bad_rank, 0u);
          ASSERT_EQ(decoded.status.step_is_bad, 1u);
        }
}

// Where tiles, groups and strides of the directory begin and end beside each other.
TEST(DecodeApplyCuda, EdgesThatMeetGiveTheSameBits) {
  const int64_t t = kDecodeTile;
  for (const ValueFormat value_format : kValueFormats) {
    SCOPED_TRACE(name_of(value_format));
    const auto expect_equal = [&](const Layout& layout, const std::vector<int32_t>& indices, const std::vector<float>& values) {
      const Bytes payload = payload_of_entries(layout, indices, values, nullptr, 0, kStep);
      const Decoded decoded = decode_on_cuda(layout, payload, 1, GradientType::kFloat32);
      EXPECT_EQ(decode_on_cpu(layout, payload, 1, GradientType::kFloat32), decoded.bucket);
      EXPECT_EQ(decoded.status.bad_rank, 0u);
    };
    // A group ends with the first entry of a tile, the next one with the last of it.
    expect_equal(Layout::make(Numbers{t + 1, t - 1, 50}, Numbers{0, 1, 2}, Numbers{3, 2, 1}, value_format),
                 {0, 5, static_cast<int32_t>(t), static_cast<int32_t>(t + 1), static_cast<int32_t>(2 * t - 1), static_cast<int32_t>(2 * t)},
                 {1, -1, 1, 5, -5, 25});
    // The words of high bits end before the last tile does, and what follows them is not zero.
    expect_equal(Layout::make(Numbers{9000}, Numbers{0}, Numbers{3}, value_format), {5000, 6000, 8999}, {1, 2, 3});
    // A stride begins among entries that all share the index >> 8 with which a tile begins.
    std::vector<int32_t> indices;
    for (int32_t e = 0; e < 270; ++e) indices.push_back(e < 250 ? e : static_cast<int32_t>(t) + 10 * (e - 250));
    expect_equal(Layout::make(Numbers{3 * t}, Numbers{0}, Numbers{270}, value_format), indices, normal_values(270, 64));
    // Nothing but zeros behind the directory: who reads too far believes that it descends.
    for (const int64_t k : {300, 65600}) { // the directory has 2 entries and one more than a block has threads
      indices.clear();
      for (int32_t e = 0; e < k; ++e) indices.push_back(e);
      expect_equal(Layout::make(Numbers{k + 100}, Numbers{0}, Numbers{k}, value_format), indices,
                   std::vector<float>(static_cast<size_t>(k)));
    }
  }
}

TEST(DecodeApplyCuda, AFlaggedPayloadMakesTheBucketNanOfTheCpuEngine) {
  const Layout layout = Layout::make(Numbers{9000, 30}, Numbers{0, -1}, Numbers{100});
  Bytes gathered = random_gathered(layout, 3, kStep, 53);
  PayloadHeader header = read_header(gathered.data() + payload_bytes(layout));
  header.flags |= kFlagNonFinite;
  std::memcpy(gathered.data() + payload_bytes(layout), &header, sizeof header);
  for (const GradientType type : kGradientTypes) {
    const Decoded decoded = decode_on_cuda(layout, gathered, 3, type);
    EXPECT_EQ(decode_on_cpu(layout, gathered, 3, type), decoded.bucket);
    EXPECT_EQ(decoded.status.bad_rank, 0u);
    EXPECT_EQ(decoded.status.step_is_bad, 1u);
  }
}

TEST(DecodeApplyCuda, ABadRankThatNobodyHasTakenYetMakesLaterBucketsNanAndTheirStepsBad) {
  const Layout layout = Layout::make(Numbers{9000, 30}, Numbers{0, -1}, Numbers{100});
  const Bytes gathered = random_gathered(layout, 3, kStep, 54);
  for (const GradientType type : kGradientTypes) {
    const Decoded decoded = decode_on_cuda(layout, gathered, 3, type, 0, kStep, 2);
    EXPECT_NE(decode_on_cpu(layout, gathered, 3, type), decoded.bucket);
    EXPECT_EQ(decoded.status.bad_rank, 2u);
    EXPECT_EQ(decoded.status.step_is_bad, 1u);
  }
}

class DamagedPayload : public ::testing::TestWithParam<ValueFormat> {};
INSTANTIATE_TEST_SUITE_P(DecodeApplyCuda, DamagedPayload, ::testing::ValuesIn(kValueFormats),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST_P(DamagedPayload, NamesItsRankAndMakesTheBucketNan) {
  const Layout layout = Layout::make(Numbers{9000, 30, 9000}, Numbers{0, -1, 1}, Numbers{100, 200}, GetParam());
  const int64_t stride = payload_bytes(layout);
  const PayloadSections s = payload_sections(layout);
  const auto word = [&](Bytes& bytes, int64_t rank, int64_t offset, uint32_t value) {
    std::memcpy(bytes.data() + rank * stride + offset, &value, sizeof value);
  };
  const auto low = [&](Bytes& bytes, int64_t rank, int64_t entry) -> uint8_t& {
    return bytes[static_cast<size_t>(rank * stride + s.low + entry)];
  };
  const auto high = [&](Bytes& bytes, int64_t rank, int64_t bit) -> uint8_t& {
    return bytes[static_cast<size_t>(rank * stride + s.high + bit / 8)];
  };
  // Entry 199 lies at the end of a payload whose entries of group 1 are the last of the bucket.
  const auto replace = [&](Bytes& bytes, int64_t rank, const std::vector<int32_t>& indices) {
    const Bytes payload = payload_of_entries(layout, indices, std::vector<float>(300, 1.0f), nullptr, rank, kStep);
    std::copy(payload.begin(), payload.end(), bytes.begin() + rank * stride);
  };
  std::vector<int32_t> spread(300);
  for (int e = 0; e < 300; ++e) spread[static_cast<size_t>(e)] = e < 100 ? 80 * e : 9030 + 40 * (e - 100);
  struct Damage {
    const char* name;
    std::function<void(Bytes&, int64_t rank)> apply;
  };
  const std::vector<Damage> damages = {
      {"version", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride)] ^= 1; }},
      {"flags", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride + 1)] = 0x80; }},
      {"a refusal", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride + 1)] = kFlagRefused; }},
      {"rank", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride + 3)] ^= 1; }},
      {"step", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride + 5)] ^= 1; }},
      {"layout", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride + 7)] ^= 1; }},
      {"no index at all", [&](Bytes& b, int64_t r) { std::fill_n(b.begin() + r * stride + s.high, 8 * s.high_words(), uint8_t{0}); }},
      {"indices everywhere", [&](Bytes& b, int64_t r) { std::fill_n(b.begin() + r * stride + s.high, 8 * s.high_words(), uint8_t{0xff}); }},
      {"one index fewer",
       [&](Bytes& b, int64_t r) {
         replace(b, r, spread);
         high(b, r, 0) &= 0xfe;
       }},
      {"one index more",
       [&](Bytes& b, int64_t r) {
         for (int64_t bit = 8;; bit += 8)
           if (high(b, r, bit) != 0xff) {
             high(b, r, bit) = 0xff;
             break;
           }
       }},
      {"a bit behind the last", [&](Bytes& b, int64_t r) { b[static_cast<size_t>(r * stride + s.high + 8 * s.high_words() - 1)] |= 0x80; }},
      {"two equal indices",
       [&](Bytes& b, int64_t r) {
         for (int e = 0; e < 100; ++e) spread[static_cast<size_t>(e)] = e;
         replace(b, r, spread);
         low(b, r, 51) = low(b, r, 50);
       }},
      {"indices out of order",
       [&](Bytes& b, int64_t r) {
         for (int e = 0; e < 100; ++e) spread[static_cast<size_t>(e)] = e;
         replace(b, r, spread);
         low(b, r, 51) = 255;
       }},
      {"a directory that is too small", [&](Bytes& b, int64_t r) { word(b, r, s.directory + 4, 0); }},
      {"a directory that is too large", [&](Bytes& b, int64_t r) { word(b, r, s.directory + 4, 60); }},
      {"a directory far out", [&](Bytes& b, int64_t r) { word(b, r, s.directory + 4, 0xffffffff); }},
      {"a directory that begins late", [&](Bytes& b, int64_t r) { word(b, r, s.directory, 40); }},
      {"an index of the next group",
       [&](Bytes& b, int64_t r) {
         spread[99] = 9030, spread[100] = 9031;
         replace(b, r, spread);
       }},
      {"an index in the dense segment",
       [&](Bytes& b, int64_t r) {
         spread[99] = 9010;
         replace(b, r, spread);
       }},
      {"an index beyond the bucket",
       [&](Bytes& b, int64_t r) {
         spread[299] = 18175;
         replace(b, r, spread);
       }},
  };
  for (const Damage& damage : damages)
    for (const int64_t rank : {0, 2}) {
      SCOPED_TRACE(std::string(damage.name) + ", rank " + std::to_string(rank) + ", seed 54");
      Bytes gathered = random_gathered(layout, 3, kStep, 54);
      damage.apply(gathered, rank);
      ASSERT_NE(refusal_of(layout, gathered, 3, kStep), "") << "the damage is none";
      const Decoded decoded = decode_on_cuda(layout, gathered, 3, GradientType::kFloat32);
      EXPECT_EQ(decoded.status.bad_rank, static_cast<uint32_t>(rank) + 1);
      EXPECT_EQ(decoded.status.step_is_bad, 1u);
      for (size_t i = 0; i < decoded.bucket.size(); i += 4) {
        uint32_t bits;
        std::memcpy(&bits, decoded.bucket.data() + i, 4);
        ASSERT_EQ(bits, kCanonicalNanBits) << "entry " << i / 4;
      }
    }
}

// By the entry to the left in the same word, in the word before, and in the last word of the round before.
TEST_P(DamagedPayload, WithAnIndexTwiceIsRefused) {
  const Layout layout = Layout::make(Numbers{9000}, Numbers{0}, Numbers{700}, GetParam());
  std::vector<int32_t> indices(700);
  std::iota(indices.begin(), indices.end(), 0);
  for (const size_t entry : {11, 32, 511}) { // whose high bits are number 11, 32 and 512
    SCOPED_TRACE("entry " + std::to_string(entry));
    Bytes payload = payload_of_entries(layout, indices, std::vector<float>(700, 1.0f), nullptr, 0, kStep);
    uint8_t* low = payload.data() + payload_sections(layout).low;
    low[entry] = low[entry - 1];
    ASSERT_NE(refusal_of(layout, payload, 1, kStep), "");
    EXPECT_EQ(decode_on_cuda(layout, payload, 1, GradientType::kFloat32).status.bad_rank, 1u);
  }
}

TEST(DecodeApplyCuda, AnyBytesStayInsideTheBuffers) {
  const Layout of_fp32 = Layout::make(Numbers{9000, 30, 9000}, Numbers{0, -1, 1}, Numbers{100, 200});
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const Layout layout = with(of_fp32, kValueFormats[seed % 3]);
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    Bytes gathered = random_gathered(layout, 3, kStep, seed);
    for (int n = 0; n < (seed < 6 ? 3 : 20000); ++n)
      gathered[static_cast<size_t>(random.integer(0, static_cast<int64_t>(gathered.size())))] = static_cast<uint8_t>(random.bits());
    const bool bad = !refusal_of(layout, gathered, 3, kStep).empty();
    const Decoded decoded = decode_on_cuda(layout, gathered, 3, GradientType::kFloat32);
    EXPECT_EQ(decoded.status.bad_rank != 0, bad);
  }
}

// What the fuzzer of the CPU decoder has kept: both decoders let the same payloads pass, and stay inside their buffers on all of them.
TEST(DecodeApplyCuda, JudgesTheFuzzersCorpusAsTheCpuEngineDoes) {
  int passed = 0, refused = 0;
  for (const auto& file : std::filesystem::directory_iterator(COMPRESSED_DDP_FUZZ_CORPUS)) {
    SCOPED_TRACE(file.path().filename().string());
    std::ifstream stream(file.path(), std::ios::binary);
    const Bytes bytes{std::istreambuf_iterator<char>(stream), {}};
    const fuzz::PayloadInput input = fuzz::payload_input(bytes);
    const bool bad = !refusal_of(input.layout, input.payload, fuzz::kWorldSize, fuzz::kStep).empty();
    const Decoded decoded = decode_on_cuda(input.layout, input.payload, fuzz::kWorldSize, GradientType::kFloat32, 0, fuzz::kStep);
    EXPECT_EQ(decoded.status.bad_rank, bad ? 1u : 0u);
    ++(bad ? refused : passed);
  }
  EXPECT_GE(passed, 24);
  EXPECT_GE(refused, 50);
}

TEST(DecodeApplyCuda, AnEntryInADenseSegmentOfItsGroupIsAddedInOrder) { // which nobody refuses, and which only harm can send
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout = Layout::make(Numbers{40, 300, 40}, Numbers{0, -1, 0}, Numbers{3}, value_format);
    const std::vector<float> gradient = normal_values(layout.numel, 57);
    Bytes gathered;
    for (uint32_t rank = 0; rank < 3; ++rank) {
      const Bytes payload = payload_of_entries(layout, {1, 41, 339}, {1.0f, 1e8f, 3.0f}, gradient.data(), rank, kStep);
      gathered.insert(gathered.end(), payload.begin(), payload.end());
    }
    const Decoded decoded = decode_on_cuda(layout, gathered, 3, GradientType::kFloat32);
    EXPECT_EQ(decode_on_cpu(layout, gathered, 3, GradientType::kFloat32), decoded.bucket);
    EXPECT_EQ(decoded.status.bad_rank, 0u);
  }
}

// Directories that lie so that each tile by itself finds nothing wrong: two strides of entries belong to no tile.
TEST(DecodeApplyCuda, ADirectoryThatDoesNotAscendIsRefused) {
  const Layout layout = one_group(3 * kDecodeTile, 1100);
  std::vector<int32_t> indices;
  for (int e = 0; e < 200; ++e) indices.push_back(40 * e);
  for (int e = 200; e < 513; ++e) indices.push_back(8192 + e);
  for (int e = 513; e < 1100; ++e) indices.push_back(8192 + 14 * e);
  Bytes payload = payload_of_entries(layout, indices, std::vector<float>(1100, 1.0f), nullptr, 0, kStep);
  ASSERT_EQ(refusal_of(layout, payload, 1, kStep), "");
  const PayloadSections s = payload_sections(layout);
  auto* directory = reinterpret_cast<uint32_t*>(payload.data() + s.directory);
  auto* high = reinterpret_cast<uint64_t*>(payload.data() + s.high);
  for (int64_t bit = 32 + 200; bit < directory[2] + 513; ++bit) high[bit / 64] &= ~(uint64_t{1} << bit % 64);
  directory[1] = 40;
  directory[2] = 31;
  high[(31 + 512) / 64] |= uint64_t{1} << (31 + 512) % 64;
  ASSERT_NE(refusal_of(layout, payload, 1, kStep), "");
  EXPECT_EQ(decode_on_cuda(layout, payload, 1, GradientType::kFloat32).status.bad_rank, 1u);
}

// 256 ranks are looked up at once; the last of them is passed over here, before its first barrier.
TEST(DecodeApplyCuda, ADamagedPayloadAtTheEndOfARoundOfRanksIsNamed) {
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout = Layout::make(Numbers{kDecodeTile + 300}, Numbers{0}, Numbers{60}, value_format);
    Bytes gathered = random_gathered(layout, 512, kStep, 58);
    const int64_t payload = 255 * payload_bytes(layout);
    std::fill_n(gathered.begin() + payload + payload_sections(layout).high, 8, uint8_t{0});
    const Decoded decoded = decode_on_cuda(layout, gathered, 512, GradientType::kFloat32);
    EXPECT_EQ(decoded.status.bad_rank, 256u);
  }
}

// Searches among many, two and one; groups that are sent whole, so that the first entry of a segment is.
std::vector<Layout> layouts_of_residuals(ValueFormat value_format) {
  return {Layout::make(Numbers{5000, 40, 6000, 0, 3, 9000}, Numbers{0, -1, 1, -1, 2, 3}, Numbers{50, 60, 3, 700}, value_format),
          Layout::make(Numbers{300, 40}, Numbers{0, 1}, Numbers{30, 40}, value_format),
          Layout::make(Numbers{5000}, Numbers{0}, Numbers{70}, value_format)};
}

// The residuals of a layout in device memory, each segment's in a place of its own; dense segments have none.
class DeviceResiduals {
 public:
  DeviceResiduals(const Layout& layout, const std::vector<float>& before)
      : layout_(layout), before_(before), pointers_(layout.segments.size()) {
    std::vector<float*> table;
    for (const Segment& segment : layout.segments) {
      memory_.emplace_back(std::span(before).subspan(static_cast<size_t>(segment.offset), static_cast<size_t>(segment.numel)));
      table.push_back(segment.group == kDenseGroup ? nullptr : memory_.back().data());
    }
    pointers_.upload(table);
  }
  float* const* pointers() const { return pointers_.data(); }
  std::vector<float> download() const { // dense segments as they were
    std::vector<float> all = before_;
    for (size_t s = 0; s < memory_.size(); ++s) {
      const std::vector<float> part = memory_[s].download();
      std::copy(part.begin(), part.end(), all.begin() + layout_.segments[s].offset);
    }
    return all;
  }

 private:
  Layout layout_;
  std::vector<float> before_;
  std::vector<DeviceMemory<float>> memory_;
  DeviceMemory<float*> pointers_;
};

DeviceMemory<uint32_t> flag_of(uint32_t value) {
  const std::vector<uint32_t> one = {value};
  return DeviceMemory<uint32_t>{std::span<const uint32_t>(one)};
}

TEST(RestoreCuda, EqualsTheCpuEngineBitForBit) {
  for (const ValueFormat value_format : kValueFormats)
    for (const Layout& layout : layouts_of_residuals(value_format)) {
      SCOPED_TRACE(std::string(name_of(value_format)) + ", numel " + std::to_string(layout.numel) + ", seed 55");
      Random random(55);
      const std::vector<int32_t> indices = random_indices(layout, random);
      std::vector<float> values = normal_values(layout.selected_numel, 55);
      if (value_format != ValueFormat::kSign)
        values[3] = HUGE_VALF, values[16] = float_of(kCanonicalNanBits), values[20] = 0, values[21] = std::numeric_limits<float>::max();
      const Bytes payload = payload_of_entries(layout, indices, values, nullptr, 0, kStep);
      std::vector<float> expected = normal_values(layout.numel, 56);

      CudaPlan plan(layout);
      DeviceMemory<uint8_t> device_payload{std::span<const uint8_t>(payload)};
      const DeviceResiduals residuals(layout, expected);
      const DeviceMemory<uint32_t> no = flag_of(0), yes = flag_of(1);
      const auto run = [&](const uint32_t* condition, const uint32_t* sent) {
        cuda::restore(plan.device(), {device_payload.data(), residuals.pointers(), condition, sent}, nullptr);
        require(cudaStreamSynchronize(nullptr), "restore");
      };
      for (const auto& [condition, sent] : {std::pair{&no, &yes}, {&yes, &no}, {&no, &no}}) run(condition->data(), sent->data());
      EXPECT_TRUE(same_bits(expected, residuals.download())) << "(nothing is to be restored)";
      uint32_t* const none = nullptr;
      for (const auto& [condition, sent] : {std::pair{yes.data(), yes.data()}, {none, yes.data()}, {yes.data(), none}}) {
        run(condition, sent);
        restore(layout, entries_of(layout, payload.data()), segment_pointers(layout, expected.data()).data());
        EXPECT_TRUE(same_bits(expected, residuals.download()));
      }
    }
}

// One payload of rank 5 of 9, as the ranges of a split exchange are decoded.
TEST(DecodeApplyCuda, OnePayloadOfARankInTheMiddleIsDecodedAndNamed) {
  for (const ValueFormat value_format : kValueFormats) {
    const Layout layout = Layout::make(Numbers{kDecodeTile + 300, 20}, Numbers{0, -1}, Numbers{60}, value_format);
    Bytes payload = random_payload(layout, 5, kStep, 59);
    CudaPlan plan(layout);
    const auto decode_as = [&](uint32_t rank) {
      DeviceMemory<uint8_t> payloads{std::span<const uint8_t>(payload)};
      DeviceMemory<float> bucket(static_cast<size_t>(layout.numel));
      const std::vector<cuda::DecodeStatus> before(1);
      DeviceMemory<cuda::DecodeStatus> status{std::span<const cuda::DecodeStatus>(before)};
      cuda::decode_apply(
          plan.device(),
          {payloads.data(), 1, bucket.data(), GradientType::kFloat32, make_header(layout, rank, kStep, false), status.data()}, nullptr);
      require(cudaStreamSynchronize(nullptr), "decode_apply");
      return std::pair(bucket.download(), status.download()[0]);
    };
    const auto [bucket, status] = decode_as(5);
    EXPECT_EQ(status.bad_rank, 0u);
    TypedBuffer expected(GradientType::kFloat32, layout.numel);
    ASSERT_EQ(check_payloads(layout, payload.data(), 1, {5, 9}, kStep, in_one_go), "");
    decode_apply(layout, {payload.data(), 1, expected.data(), GradientType::kFloat32}, in_one_go);
    EXPECT_EQ(std::memcmp(bucket.data(), expected.data(), bucket.size() * sizeof(float)), 0);
    EXPECT_EQ(decode_as(4).second.bad_rank, 5u); // 1 + the rank that it should have been of
  }
}

// Of few and of many payloads, whose headers alone are read; of buckets that take one round, four rounds of stores, and a part of one.
TEST(NanIfFlaggedCuda, OneFlaggedPayloadMakesTheWholeBucketNan) {
  const Layout layout = Layout::make(Numbers{100}, Numbers{0}, Numbers{3});
  constexpr int64_t kStride = 64;
  struct Case {
    int count, flagged;
    int64_t numel;
  };
  for (const auto& [count, flagged, numel] : {Case{3, -1, 3000},
                                              {3, 0, 3000},
                                              {3, 2, 2048},
                                              {1, 0, 1},
                                              {1024, -1, 257},
                                              {1024, 0, 257},
                                              {1024, 511, 257},
                                              {1024, 512, 2047},
                                              {1024, 1023, 257}})
    for (const GradientType type : kGradientTypes) {
      SCOPED_TRACE(std::to_string(flagged) + " of " + std::to_string(count) + ", numel " + std::to_string(numel));
      Bytes payloads(static_cast<size_t>(count * kStride));
      for (int p = 0; p < count; ++p) {
        const PayloadHeader header = make_header(layout, p, kStep, p == flagged);
        std::memcpy(payloads.data() + p * kStride, &header, sizeof header);
      }
      DeviceMemory<uint8_t> device{std::span<const uint8_t>(payloads)};
      TypedBuffer expected(type, std::vector<float>(static_cast<size_t>(numel), 0.5f));
      const auto bytes = static_cast<size_t>(numel * element_bytes(type));
      const auto* begin = static_cast<const uint8_t*>(expected.data());
      DeviceMemory<uint8_t> bucket{std::span<const uint8_t>(begin, bytes)};
      const std::vector<cuda::DecodeStatus> before(1);
      DeviceMemory<cuda::DecodeStatus> status{std::span<const cuda::DecodeStatus>(before)};
      cuda::nan_if_flagged({device.data(), kStride, count, bucket.data(), numel, type, status.data()}, nullptr);
      require(cudaStreamSynchronize(nullptr), "nan_if_flagged");
      if (flagged >= 0) fill_nan(numel, expected.data(), type);
      const Bytes after = bucket.download();
      EXPECT_EQ(std::memcmp(after.data(), expected.data(), bytes), 0);
      EXPECT_EQ(status.download()[0].step_is_bad, flagged >= 0 ? 1u : 0u);
    }
}

// What a split exchange leaves out: given back, and undone, as on the CPU.
TEST(ReturnDroppedCuda, EqualsTheCpuEngineBitForBit) {
  for (const ValueFormat value_format : kValueFormats)
    for (const GradientType type : kGradientTypes)
      for (const Layout& layout : layouts_of_residuals(value_format)) {
        SCOPED_TRACE(std::string(name_of(value_format)) + ", " + testing::name_of(type) + ", numel " + std::to_string(layout.numel) +
                     ", seed 61");
        Random random(61);
        const std::vector<int32_t> indices = random_indices(layout, random);
        std::vector<float> values = normal_values(layout.selected_numel, 61);
        const float largest_zero = float_of(largest_zero_key(type));
        if (value_format == ValueFormat::kSign && layout.groups.size() > 2) // then its scale is 0
          std::fill_n(values.begin() + layout.groups[2].entry_offset, layout.groups[2].k, 0.0f);
        values[5] = 0, values[6] = largest_zero, values[7] = -largest_zero, values[8] = 1.5f * largest_zero + 0x1p-130f;
        const Bytes payload = payload_of_entries(layout, indices, values, nullptr, 0, kStep);
        const Entries entries = entries_of(layout, payload.data());
        std::vector<float> result_values(static_cast<size_t>(layout.numel)), lost = normal_values(layout.numel, 62);
        for (size_t e = 0; e < entries.indices.size(); e += 3) result_values[static_cast<size_t>(entries.indices[e])] = 0.25f;
        const TypedBuffer result(type, result_values);
        const auto words = static_cast<size_t>(layout.selected_numel + 31) / 32;

        CudaPlan plan(layout);
        DeviceMemory<uint8_t> device_payload{std::span<const uint8_t>(payload)};
        DeviceMemory<uint8_t> device_result{
            std::span<const uint8_t>(static_cast<const uint8_t*>(result.data()), static_cast<size_t>(layout.numel * element_bytes(type)))};
        std::vector<float> expected = normal_values(layout.numel, 63);
        const DeviceResiduals device_residuals(layout, expected);
        DeviceMemory<float> device_lost{std::span<const float>(lost)};
        std::vector<uint32_t> expected_returned(words);
        DeviceMemory<uint32_t> returned{std::span<const uint32_t>(expected_returned)};
        const DeviceMemory<uint32_t> no = flag_of(0), yes = flag_of(1);
        float* const* table = device_residuals.pointers();
        const auto expect_equal = [&](const char* what) {
          require(cudaStreamSynchronize(nullptr), what);
          EXPECT_TRUE(same_bits(expected, device_residuals.download())) << what;
          EXPECT_EQ(returned.download(), expected_returned) << what;
        };
        const std::vector<float*> residuals = segment_pointers(layout, expected.data());

        const auto run = [&](const DeviceMemory<uint32_t>& sent) {
          cuda::return_dropped(plan.device(), {device_payload.data(), device_result.data(), type, table, sent.data(), returned.data()},
                               nullptr);
        };
        run(no);
        expect_equal("nothing was sent");
        run(yes);
        return_dropped(layout, entries, result.data(), type, residuals.data(), expected_returned.data());
        expect_equal("return_dropped");

        const auto add = [&](const uint32_t* condition, const DeviceMemory<uint32_t>& sent) {
          cuda::add_lost(plan.device(), {device_payload.data(), device_lost.data(), 3, type, table, condition, sent.data()}, nullptr);
        };
        add(no.data(), yes), add(yes.data(), no), add(no.data(), no);
        expect_equal("nothing was lost");
        uint32_t* const none = nullptr;
        for (const uint32_t* condition : {yes.data(), none}) {
          add(condition, yes);
          add_lost(layout, entries, lost.data(), 3, type, residuals.data());
          expect_equal("add_lost");
        }

        cuda::restore(plan.device(), {device_payload.data(), table, nullptr, yes.data(), returned.data()}, nullptr);
        restore(layout, entries, residuals.data(), expected_returned.data());
        expect_equal("restore");
      }
}

} // namespace
} // namespace compressed_ddp
