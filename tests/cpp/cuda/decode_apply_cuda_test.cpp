// decode_apply_ and restore_ on CUDA against the CPU engine, bit for bit, and against payloads that nobody should send.
#include "../testing.h"
#include "cpu/decode_apply.h"
#include "cpu/restore.h"
#include "cuda/decode_apply.h"
#include "cuda/restore.h"
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
                       uint32_t bad_rank = 0) {
  CudaPlan plan(layout);
  DeviceMemory<uint8_t> payloads{std::span<const uint8_t>(gathered)};
  const auto size = static_cast<size_t>(element_bytes(type));
  DeviceMemory<uint8_t> bucket(static_cast<size_t>(layout.numel) * size, front * size);
  bucket.fill_bytes(0x11);
  const std::vector<cuda::DecodeStatus> before = {{bad_rank, 0, 0}};
  DeviceMemory<cuda::DecodeStatus> status{std::span<const cuda::DecodeStatus>(before)};
  cuda::decode_apply(plan.device(),
                     {payloads.data(), world_size, bucket.data(), type,
                      make_header(layout, 0, static_cast<uint32_t>(world_size), kStep, false), status.data()},
                     nullptr);
  require(cudaStreamSynchronize(nullptr), "decode_apply");
  return {bucket.download(), status.download()[0]};
}

Bytes decode_on_cpu(const Layout& layout, const Bytes& gathered, int64_t world_size, GradientType type) {
  TypedBuffer bucket(type, layout.numel);
  decode_apply(layout, {gathered.data(), world_size, bucket.data(), type}, all_cuts()[0].parallel_for);
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

TEST(DecodeApplyCuda, EqualsTheCpuEngineBitForBit) {
  for (const Layout& layout : layouts())
    for (const int32_t world_size : {1, 2, 3, 8}) {
      SCOPED_TRACE("numel " + std::to_string(layout.numel) + ", world_size " + std::to_string(world_size) + ", seed 51");
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
  const Layout layout = Layout::make(Numbers{kDecodeTile + 3, 20, 300}, Numbers{0, -1, 1}, Numbers{60, 4});
  for (const int32_t world_size : {127, 128, 129, 300}) {
    SCOPED_TRACE("world_size " + std::to_string(world_size) + ", seed 52");
    const Bytes gathered = random_gathered(layout, world_size, kStep, 52);
    const Decoded decoded = decode_on_cuda(layout, gathered, world_size, GradientType::kFloat32, 1);
    ASSERT_EQ(decode_on_cpu(layout, gathered, world_size, GradientType::kFloat32), decoded.bucket);
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
    const Decoded decoded = decode_on_cuda(layout, gathered, 3, type, 0, 2);
    EXPECT_NE(decode_on_cpu(layout, gathered, 3, type), decoded.bucket);
    EXPECT_EQ(decoded.status.bad_rank, 2u);
    EXPECT_EQ(decoded.status.step_is_bad, 1u);
  }
}

TEST(DecodeApplyCuda, DamagedBytesNameTheirRankAndMakeTheBucketNan) {
  const Layout layout = Layout::make(Numbers{9000, 30, 9000}, Numbers{0, -1, 1}, Numbers{100, 200});
  const int64_t stride = payload_bytes(layout);
  const auto word = [&](Bytes& bytes, int64_t rank, int64_t offset, uint32_t value) {
    std::memcpy(bytes.data() + rank * stride + offset, &value, sizeof value);
  };
  struct Damage {
    const char* name;
    std::function<void(Bytes&, int64_t rank)> apply;
  };
  const std::vector<Damage> damages = {
      {"magic", [&](Bytes& b, int64_t r) { word(b, r, 0, 1); }},
      {"version and flags", [&](Bytes& b, int64_t r) { word(b, r, 4, 0xffffffff); }},
      {"rank", [&](Bytes& b, int64_t r) { word(b, r, 8, 77); }},
      {"world_size", [&](Bytes& b, int64_t r) { word(b, r, 12, 77); }},
      {"layout_hash", [&](Bytes& b, int64_t r) { word(b, r, 16, 77); }},
      {"step", [&](Bytes& b, int64_t r) { word(b, r, 24, 77); }},
      {"payload_bytes", [&](Bytes& b, int64_t r) { word(b, r, 56, 77); }},
      {"first index negative", [&](Bytes& b, int64_t r) { word(b, r, 64, 0x80000000u); }},
      {"an index too large", [&](Bytes& b, int64_t r) { word(b, r, 64 + 4 * 299, 0x7fffffff); }},
      {"an index beyond the bucket", [&](Bytes& b, int64_t r) { word(b, r, 64 + 4 * 299, 18030); }},
      {"two equal indices",
       [&](Bytes& b, int64_t r) { std::memcpy(b.data() + r * stride + 64 + 4 * 51, b.data() + r * stride + 64 + 4 * 50, 4); }},
      {"indices out of order", [&](Bytes& b, int64_t r) { word(b, r, 64 + 4 * 150, 5); }},
      {"all indices equal",
       [&](Bytes& b, int64_t r) {
         for (int e = 0; e < 300; ++e) word(b, r, 64 + 4 * e, 1234);
       }},
      {"all indices descending",
       [&](Bytes& b, int64_t r) {
         for (int e = 0; e < 300; ++e) word(b, r, 64 + 4 * e, static_cast<uint32_t>(9000 - e));
       }},
      {"an index of the next group", [&](Bytes& b, int64_t r) { word(b, r, 64 + 4 * 99, 9031); }},
  };
  for (const Damage& damage : damages)
    for (const int64_t rank : {0, 2}) {
      SCOPED_TRACE(std::string(damage.name) + ", rank " + std::to_string(rank) + ", seed 54");
      Bytes gathered = random_gathered(layout, 3, kStep, 54);
      damage.apply(gathered, rank);
      ASSERT_NE(check_gathered(layout, gathered.data(), 3, kStep), "") << "the damage is none";
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

TEST(DecodeApplyCuda, AnyBytesStayInsideTheBuffers) {
  const Layout layout = Layout::make(Numbers{9000, 30, 9000}, Numbers{0, -1, 1}, Numbers{100, 200});
  for (uint64_t seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    Bytes gathered = random_gathered(layout, 3, kStep, seed);
    for (int n = 0; n < (seed < 6 ? 3 : 20000); ++n)
      gathered[static_cast<size_t>(random.integer(0, static_cast<int64_t>(gathered.size())))] = static_cast<uint8_t>(random.bits());
    const bool bad = !check_gathered(layout, gathered.data(), 3, kStep).empty();
    const Decoded decoded = decode_on_cuda(layout, gathered, 3, GradientType::kFloat32);
    EXPECT_EQ(decoded.status.bad_rank != 0, bad);
  }
}

TEST(RestoreCuda, EqualsTheCpuEngineBitForBit) {
  const Layout layout = Layout::make(Numbers{5000, 40, 6000, 0, 3, 9000}, Numbers{0, -1, 1, -1, 2, 3}, Numbers{50, 60, 1, 700});
  Bytes payload = random_gathered(layout, 1, kStep, 55);
  auto* values = reinterpret_cast<float*>(payload.data() + values_offset_bytes(layout));
  values[3] = HUGE_VALF;
  values[70] = float_of(kCanonicalNanBits);
  const std::vector<uint8_t> unused = {0, 0, 1, 0, 0, 0};
  for (const bool with_unused : {false, true})
    for (const int condition : {-1, 0, 1}) { // none, pointing to 0, pointing to 1
      SCOPED_TRACE("unused " + std::to_string(with_unused) + ", condition " + std::to_string(condition));
      std::vector<float> expected = normal_values(layout.numel, 56);
      const std::vector<float> before = expected;
      if (condition != 0)
        restore(layout, payload.data(), with_unused ? unused.data() : nullptr, segment_pointers(layout, expected.data()).data());

      CudaPlan plan(layout);
      DeviceMemory<uint8_t> device_payload{std::span<const uint8_t>(payload)}, device_unused{std::span<const uint8_t>(unused)};
      DeviceMemory<float> residual{std::span<const float>(before)};
      std::vector<float*> pointers = segment_pointers(layout, residual.data());
      for (size_t s = 0; s < pointers.size(); ++s)
        if (layout.segments[s].group == kDenseGroup) pointers[s] = nullptr;
      DeviceMemory<float*> table{std::span<float* const>(pointers)};
      const std::vector<uint32_t> flag = {static_cast<uint32_t>(condition)};
      DeviceMemory<uint32_t> device_flag{std::span<const uint32_t>(flag)};
      const std::vector<uint32_t> both = {0, 1};
      DeviceMemory<uint32_t> sent{std::span<const uint32_t>(both)};
      for (const uint32_t* is_sent : {sent.data(), sent.data() + 1}) // not, and then it is
        cuda::restore(plan.device(),
                      {device_payload.data(), with_unused ? device_unused.data() : nullptr, table.data(),
                       condition < 0 ? nullptr : device_flag.data(), is_sent},
                      nullptr);
      require(cudaStreamSynchronize(nullptr), "restore");
      EXPECT_TRUE(same_bits(expected, residual.download()));
    }
}

} // namespace
} // namespace compressed_ddp
