// What the CUDA stages move, counted in simulation: a bound that a change of the kernels cannot pass unnoticed, without a clock.
#include "counted_bytes.h"
#include "cuda/shards.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using cuda::Method;

constexpr int64_t kNumel = (25 << 20) / 4; // DDP's bucket: what is paid per bucket and group is small in it
const Layout kLayout = Layout::make(std::vector<int64_t>{kNumel}, std::vector<int64_t>{0}, std::vector<int64_t>{selection_k(0.01, kNumel)},
                                    ValueFormat::kBFloat16);
const double kPayload = static_cast<double>(payload_bytes(kLayout)) / static_cast<double>(kNumel);

TEST(CountedBytes, OnePassStaysNearItsFloor) { // floor: read gradient and residual, write the residual, write the payload
  const Counted counted = count_select(kLayout, GradientType::kFloat32, Method::kOnePass);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 12 + kPayload);
  EXPECT_LE(counted.bytes_per_element, 12.8);
  EXPECT_LE(counted.launches, 6u);
}

TEST(CountedBytes, TwoPassesReadTheResidualOnceMore) {
  const Counted counted = count_select(kLayout, GradientType::kFloat32, Method::kTwoPasses);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 16 + kPayload);
  EXPECT_LE(counted.bytes_per_element, 16.8);
  EXPECT_LE(counted.launches, 6u);
}

TEST(CountedBytes, SixLaunchesFinishThePayloadOfAnyBucket) {
  const std::vector<int64_t> numels{300, 3 * cuda::kTileNumel + 5, 900, 2000};
  for (const ValueFormat value_format : kValueFormats)
    for (const Method method : {Method::kOnePass, Method::kTwoPasses}) {
      SCOPED_TRACE(std::string(name_of(value_format)) + (method == Method::kOnePass ? ", one pass" : ", two passes"));
      const uint64_t lost = value_format == ValueFormat::kSign ? 1 : 0; // then the payload is finished, and the residual is not
      const Layout mixed = Layout::make(numels, std::vector<int64_t>{0, 1, -1, 2}, std::vector<int64_t>{3, 130, 20}, value_format);
      EXPECT_LE(count_select(mixed, GradientType::kFloat32, method, 1).launches, 6 + lost);
      const Layout small = Layout::make(std::vector<int64_t>{300, 900}, std::vector<int64_t>{0, -1}, std::vector<int64_t>{3}, value_format);
      EXPECT_LE(count_select(small, GradientType::kFloat32, method, 1).launches, 6 + lost);
    }
}

TEST(CountedBytes, DecodingEightPayloadsStaysNearItsFloor) { // floor: write the bucket, read 8 payloads
  const Counted counted = count_decode(kLayout, 8, GradientType::kFloat32);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 4 + 8 * kPayload);
  EXPECT_LE(counted.bytes_per_element, 4.4);
}

// Of aligned buffers; a sector that is moved twice would show as well.
TEST(CountedBytes, DealingABucketOutMovesEveryEntryOnce) {
  constexpr int64_t kShard = 1 << 17, kCount = 8;
  for (const GradientType type : kGradientTypes) {
    SCOPED_TRACE(testing::name_of(type));
    const int64_t size = element_bytes(type), slot_bytes = 64 + kShard * size;
    std::vector<ShardPiece> packed, unpacked;
    for (int64_t s = 0; s < kCount; ++s) {
      packed.push_back({s * kShard, s * kShard, kShard});
      unpacked.push_back({s * kShard, (s * slot_bytes + 64) / size, kShard});
    }
    DeviceMemory<ShardPiece> packed_pieces{std::span<const ShardPiece>(packed)}, unpacked_pieces{std::span<const ShardPiece>(unpacked)};
    DeviceMemory<uint8_t> bucket(static_cast<size_t>(kCount * kShard * size)), shards(bucket.size());
    DeviceMemory<float> mean(kShard);
    PayloadHeader header = make_header(kLayout, 0, kStep, false);
    std::vector<uint8_t> slot_bytes_of_all(static_cast<size_t>(kCount * slot_bytes));
    for (; header.rank < kCount; ++header.rank) std::memcpy(slot_bytes_of_all.data() + header.rank * slot_bytes, &header, sizeof header);
    DeviceMemory<uint8_t> slots{std::span<const uint8_t>(slot_bytes_of_all)};
    DeviceMemory<cuda::DecodeStatus> status(1);
    for (const DeviceMemory<uint8_t>* memory : {&bucket, &shards}) require(cudaMemset(memory->data(), 0, memory->size()), "cudaMemset");
    status.fill_bytes(0);
    require(cudaDeviceSynchronize(), "preparing");
    const auto expect = [&](double bytes_per_element, double written_in_halves = 0) {
      require(cudaStreamSynchronize(nullptr), "dealing out");
      const Counted counted = counted_since_reset(kCount * kShard);
      EXPECT_GE(counted.bytes_per_element, bytes_per_element);
      EXPECT_LE(counted.bytes_per_element, 1.03 * bytes_per_element); // every block reads the pieces and headers, for one tile here
      EXPECT_LE(counted.sectors_per_element, 1.08 * bytes_per_element + written_in_halves);
      EXPECT_EQ(counted.launches, 1u);
      simt::reset_counters();
    };
    simt::reset_counters();
    cuda::pack_shards({packed_pieces.data(), kCount, kShard, nullptr, 0, nullptr, 0, bucket.data(), type, shards.data()}, nullptr);
    expect(2.0 * static_cast<double>(size));
    cuda::mean_of_shards(shards.data(), type, kCount, kShard, mean.data(), nullptr);
    expect(static_cast<double>(size) + 4.0 / kCount, size == 2 ? 4.0 / kCount : 0); // eight means of a thread are two stores
    cuda::unpack_shards({unpacked_pieces.data(), kCount, kShard, slots.data(), slot_bytes, kCount, make_header(kLayout, 0, kStep, false),
                         bucket.data(), type, status.data()},
                        nullptr);
    expect(2.0 * static_cast<double>(size));
    EXPECT_EQ(status.download()[0].bad_rank, 0u);
  }
}

} // namespace
} // namespace compressed_ddp
