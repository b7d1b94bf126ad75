// A bucket dealt out among ranks on CUDA against the CPU engine, bit for bit, and slots that nobody should send.
#include <cmath>

#include "../testing.h"
#include "cpu/shards.h"
#include "cuda/shards.h"
#include "device_memory.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using Bytes = std::vector<uint8_t>;
using Numbers = std::vector<int64_t>;
using Pieces = std::vector<ShardPiece>;

constexpr int64_t kPieceTileBytes = 16 << 10; // shards.cu
constexpr int64_t kMaxBlocks = 512;           // shards.cu
constexpr int64_t kMargin = 16;               // entries around everything that is written
constexpr uint8_t kUntouched = 0x5a;

Bytes random_bytes(int64_t count, uint64_t seed) {
  Random random(seed);
  Bytes bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.bits() >> 40);
  return bytes;
}

int64_t largest_of(const Pieces& pieces) {
  int64_t largest = 0;
  for (const ShardPiece& piece : pieces) largest = std::max(largest, piece.numel);
  return largest;
}
int64_t end_of(const Pieces& pieces, int64_t ShardPiece::* begin) {
  int64_t end = 0;
  for (const ShardPiece& piece : pieces) end = std::max(end, piece.*begin + piece.numel);
  return end;
}

// Pieces of these sizes one after another in the bucket, and in `shards` last first with up to `largest_gap` entries between.
Pieces scattered(const Numbers& numels, int64_t shards_begin, int64_t largest_gap, uint64_t seed) {
  Random random(seed);
  Pieces pieces;
  for (int64_t begin = 0; const int64_t numel : numels) {
    pieces.push_back({begin, 0, numel});
    begin += numel;
  }
  for (size_t i = pieces.size(); i > 0; --i) {
    shards_begin += random.integer(0, largest_gap + 1);
    pieces[i - 1].shards_begin = shards_begin;
    shards_begin += pieces[i - 1].numel;
  }
  return pieces;
}

// Every place of the first entry within 16 bytes, on either side; where both agree, with all sizes up to four vectors and a bit.
Pieces of_all_alignments(GradientType type, int64_t shards_begin) {
  const int64_t per_vector = 16 / element_bytes(type);
  Pieces pieces;
  int64_t bucket = 0, shards = (shards_begin + per_vector - 1) / per_vector * per_vector;
  const auto add = [&](int64_t bucket_at, int64_t shards_at, int64_t numel) {
    pieces.push_back({bucket + bucket_at, shards + shards_at, numel});
    bucket += (bucket_at + numel + per_vector) / per_vector * per_vector; // at least one entry is left out
    shards += (shards_at + numel + per_vector) / per_vector * per_vector;
  };
  for (int64_t at = 0; at < per_vector; ++at) {
    for (int64_t numel = 1; numel <= 2 * per_vector + 2; ++numel) add(at, at, numel);
    for (int64_t other = 0; other < per_vector; ++other) add(at, other, 1 + (7 * other + at) % 17);
  }
  for (const auto& [at, per_word] :
       {std::pair(int64_t{0}, per_vector), std::pair(int64_t{1}, int64_t{1}), std::pair(int64_t{2}, int64_t{2})})
    for (int64_t words = 256; words <= 768; words += 256) add(0, at, (words + 3) * per_word); // what a thread takes at once ends among them
  return pieces;
}

// Sizes that end before, at and behind the end of a tile, empty pieces, and one of many tiles among tiny ones.
Numbers uneven_numels(GradientType type) {
  const int64_t tile = kPieceTileBytes / element_bytes(type);
  return {0, 3, tile - 1, 0, 0, 1, tile, 17, tile + 1, 5, 3 * tile + 9, 2, 0};
}

// ---- pack_shards

struct PackCase {
  Pieces pieces;
  Numbers presence_from;
  Bytes unused;
  int64_t bucket_front = 0, shards_front = 0; // entries that spoil the alignment
};

void expect_pack_is_that_of_the_cpu(const PackCase& c, GradientType type) {
  const int64_t size = element_bytes(type), bucket_numel = end_of(c.pieces, &ShardPiece::bucket_begin);
  int64_t shards_numel = end_of(c.pieces, &ShardPiece::shards_begin);
  for (const int64_t begin : c.presence_from) shards_numel = std::max(shards_numel, begin + static_cast<int64_t>(c.unused.size()));
  const Bytes bucket = random_bytes((c.bucket_front + bucket_numel) * size, 81);
  Bytes expected(static_cast<size_t>((c.shards_front + shards_numel + 2 * kMargin) * size), kUntouched);
  const int64_t first = (c.shards_front + kMargin) * size;

  DeviceMemory<uint8_t> device_bucket{std::span<const uint8_t>(bucket)}, shards{std::span<const uint8_t>(expected)};
  DeviceMemory<uint8_t> unused{std::span<const uint8_t>(c.unused)};
  DeviceMemory<ShardPiece> pieces{std::span<const ShardPiece>(c.pieces)};
  DeviceMemory<int64_t> presence_from{std::span<const int64_t>(c.presence_from)};
  cuda::load_shards(type);
  cuda::pack_shards({pieces.data(), static_cast<int64_t>(c.pieces.size()), largest_of(c.pieces), presence_from.data(),
                     static_cast<int64_t>(c.presence_from.size()), unused.data(), static_cast<int64_t>(c.unused.size()),
                     device_bucket.data() + c.bucket_front * size, type, shards.data() + first},
                    nullptr);
  require(cudaStreamSynchronize(nullptr), "pack_shards");
  pack_shards({c.pieces, c.presence_from, c.unused, bucket.data() + c.bucket_front * size, type, expected.data() + first});
  EXPECT_TRUE(expected == shards.download());
}

TEST(PackShardsCuda, EveryAlignmentAndTailIsCopied) {
  for (const GradientType type : {GradientType::kFloat32, GradientType::kBFloat16}) {
    SCOPED_TRACE(testing::name_of(type));
    expect_pack_is_that_of_the_cpu({of_all_alignments(type, 0), {}, {}}, type);
  }
}

TEST(PackShardsCuda, PiecesOfAllSizesGoWhereTheCpuEnginePutsThem) {
  for (const GradientType type : kGradientTypes)
    for (const int64_t front : {0, 1, 2}) {
      SCOPED_TRACE(std::string(testing::name_of(type)) + ", front " + std::to_string(front));
      PackCase c{scattered(uneven_numels(type), 0, front == 0 ? 0 : 9, 82), {}, Bytes{0, 1, 1, 0, 0}, front, 2 * front};
      for (int64_t begin = end_of(c.pieces, &ShardPiece::shards_begin); c.presence_from.size() < 3; begin += 7)
        c.presence_from.push_back(begin);
      expect_pack_is_that_of_the_cpu(c, type);
    }
}

TEST(PackShardsCuda, OnePieceIsEnough) {
  for (const GradientType type : kGradientTypes) expect_pack_is_that_of_the_cpu({{{3, 2, 20}}, {0}, {1}}, type);
}

TEST(PackShardsCuda, MorePiecesThanBlocksAreAllCopied) {
  Numbers numels(static_cast<size_t>(kMaxBlocks + 40), 2);
  for (size_t i = 0; i < numels.size(); i += 5) numels[i] = static_cast<int64_t>(i % 4);
  numels[300] = 3 * kPieceTileBytes / 4 + 1;
  expect_pack_is_that_of_the_cpu({scattered(numels, 0, 1, 83), {}, {}}, GradientType::kFloat32);
}

TEST(PackShardsCuda, PresenceNeedsNoPieces) {
  for (const GradientType type : kGradientTypes)
    for (const int64_t num_parameters : {300, 600, 1024, 1030}) { // rounds of a block
      Bytes unused = random_bytes(num_parameters, 84);
      for (uint8_t& flag : unused) flag &= 1;
      expect_pack_is_that_of_the_cpu({{}, {1, 1032, 2065}, unused}, type);
      expect_pack_is_that_of_the_cpu({{{0, 0, 0}}, {0}, unused}, type);
    }
}

// ---- mean_of_shards

void expect_mean_is_that_of_the_cpu(const TypedBuffer& shards, int64_t count, int64_t shards_front, int64_t mean_front) {
  const int64_t numel = shards.numel() / count, size = element_bytes(shards.type());
  const auto* begin = static_cast<const uint8_t*>(shards.data());
  DeviceMemory<uint8_t> device(std::span<const uint8_t>(begin, static_cast<size_t>(shards.numel() * size)),
                               static_cast<size_t>(shards_front * size));
  std::vector<float> expected(static_cast<size_t>(mean_front + numel + 2 * kMargin), 0.75f);
  DeviceMemory<float> mean{std::span<const float>(expected)};
  cuda::mean_of_shards(device.data(), shards.type(), count, numel, mean.data() + mean_front + kMargin, nullptr);
  require(cudaStreamSynchronize(nullptr), "mean_of_shards");
  mean_of_shards(shards.data(), shards.type(), count, numel, expected.data() + mean_front + kMargin);
  EXPECT_TRUE(same_bits(expected, mean.download()));
}

// Numbers of very different magnitude, so that the order of additions shows, and all that is not finite or not normal.
TypedBuffer adversarial_shards(GradientType type, int64_t numel, uint64_t seed) {
  Random random(seed);
  TypedBuffer shards(type, numel);
  const float smallest = type == GradientType::kFloat16 ? 0x1p-24f : type == GradientType::kBFloat16 ? 0x1p-133f : 0x1p-149f;
  for (int64_t i = 0; i < numel; ++i) {
    float value = std::ldexp(random.normal(), static_cast<int>(random.integer(-8, 8)));
    if (random.one_in(9))
      value = std::array{HUGE_VALF, -HUGE_VALF, float_of(0xffc12345u), float_of(0x7fc00000u), -0.0f, smallest, -3 * smallest, 65504.0f}
          [static_cast<size_t>(random.integer(0, 8))];
    shards.set(i, value);
  }
  return shards;
}

TEST(MeanOfShardsCuda, EqualsTheCpuEngineBitForBit) {
  for (const GradientType type : kGradientTypes)
    for (const int64_t count : {1, 2, 3, 4, 8}) {
      const int64_t tile = 256 * 16 / element_bytes(type); // shards.cu
      Numbers numels = {0, tile - 1, tile, tile + 8, 2 * tile + 5};
      for (int64_t numel = 1; numel <= 17; ++numel) numels.push_back(numel);
      for (int64_t numel = 256; numel < tile; numel += 256) numels.push_back(numel + 3);
      for (const int64_t numel : numels) {
        SCOPED_TRACE(std::string(testing::name_of(type)) + ", count " + std::to_string(count) + ", numel " + std::to_string(numel));
        expect_mean_is_that_of_the_cpu(adversarial_shards(type, count * numel, 85 + static_cast<uint64_t>(numel)), count, 0, 0);
      }
    }
}

TEST(MeanOfShardsCuda, UnalignedBuffersGiveTheSameBits) {
  for (const GradientType type : kGradientTypes)
    for (const auto& [shards_front, mean_front] : {std::pair(1, 0), std::pair(0, 1), std::pair(3, 2)}) {
      SCOPED_TRACE(std::string(testing::name_of(type)) + ", front " + std::to_string(shards_front) + ", " + std::to_string(mean_front));
      for (const int64_t count : {3, 4})
        expect_mean_is_that_of_the_cpu(adversarial_shards(type, count * 1040, 86), count, shards_front, mean_front);
    }
}

TEST(MeanOfShardsCuda, EveryNumberOfSixteenBitsIsThatOfTheCpuEngine) {
  for (const GradientType type : {GradientType::kFloat16, GradientType::kBFloat16}) {
    TypedBuffer all(type, 1 << 16);
    for (int i = 0; i < 1 << 16; ++i) static_cast<uint16_t*>(all.data())[i] = static_cast<uint16_t>(i);
    expect_mean_is_that_of_the_cpu(all, 1, 0, 0);
    expect_mean_is_that_of_the_cpu(all, 1, 1, 0);
  }
}

// ---- mark_unused

TEST(MarkUnusedCuda, SegmentsOfParametersThatNobodyHasUsedAreMarked) {
  const std::vector<float> presence = {0, 1, 0.5f, 0.125f, -0.0f};
  constexpr size_t kSegments = 600;
  Random random(87);
  std::vector<int32_t> parameter_of_segment(kSegments);
  Bytes expected(kSegments + 2 * kMargin, kUntouched);
  for (size_t s = 0; s < kSegments; ++s) {
    parameter_of_segment[s] = static_cast<int32_t>(random.integer(-2, 5));
    expected[kMargin + s] = parameter_of_segment[s] == 0 || parameter_of_segment[s] == 4 ? 1 : 0;
  }
  DeviceMemory<float> device_presence{std::span<const float>(presence)};
  DeviceMemory<int32_t> parameters{std::span<const int32_t>(parameter_of_segment)};
  DeviceMemory<uint8_t> unused{std::span<const uint8_t>(Bytes(expected.size(), kUntouched))};
  cuda::mark_unused(device_presence.data(), parameters.data(), 0, unused.data() + kMargin, nullptr);
  cuda::mark_unused(device_presence.data(), parameters.data(), kSegments, unused.data() + kMargin, nullptr);
  require(cudaStreamSynchronize(nullptr), "mark_unused");
  EXPECT_EQ(unused.download(), expected);
}

// ---- seal_slot, unpack_shards

constexpr PayloadHeader kExpected{kWireVersion, 0, 4, 7, 0x1234};

TEST(SealSlotCuda, ABadStepIsFlaggedAndNothingButTheHeaderIsWritten) {
  for (const uint8_t flags : {uint8_t{0}, kFlagRefused})
    for (const uint32_t step_is_bad : {0u, 1u}) {
      PayloadHeader header = kExpected;
      header.flags = flags;
      const std::vector<cuda::DecodeStatus> before = {{0, 3, step_is_bad}};
      DeviceMemory<cuda::DecodeStatus> status{std::span<const cuda::DecodeStatus>(before)};
      Bytes expected(3 * sizeof header, kUntouched);
      DeviceMemory<uint8_t> slot{std::span<const uint8_t>(expected)};
      cuda::seal_slot(slot.data() + sizeof header, header, status.data(), nullptr);
      require(cudaStreamSynchronize(nullptr), "seal_slot");
      header.flags = static_cast<uint8_t>(flags | (step_is_bad != 0 ? kFlagNonFinite : 0));
      std::memcpy(expected.data() + sizeof header, &header, sizeof header);
      EXPECT_EQ(slot.download(), expected);
    }
}

// Slots of ranks 4, 5, .., which are what they should be.
struct Slots {
  Slots(GradientType type, int64_t count, int64_t slot_bytes, uint64_t seed)
      : type(type), count(count), slot_bytes(slot_bytes), bytes(random_bytes(count * slot_bytes, seed)) {
    for (int64_t s = 0; s < count; ++s)
      change(s, [&](PayloadHeader& header) { header = kExpected, header.rank = static_cast<uint16_t>(header.rank + s); });
  }
  template <typename Change>
  void change(int64_t slot, Change&& change) {
    PayloadHeader header = read_header(bytes.data() + slot * slot_bytes);
    change(header);
    std::memcpy(bytes.data() + slot * slot_bytes, &header, sizeof header);
  }
  int64_t first_entry(int64_t slot) const { return (slot * slot_bytes + kSlotAlignment) / element_bytes(type); }

  GradientType type;
  int64_t count, slot_bytes;
  Bytes bytes;
};

struct Unpacked {
  Bytes bucket; // with margins
  cuda::DecodeStatus status;
};

Unpacked unpack_on_cuda(const Slots& slots, const Pieces& pieces, int64_t front = 0, cuda::DecodeStatus before = {0, 77, 0}) {
  const int64_t size = element_bytes(slots.type), numel = end_of(pieces, &ShardPiece::bucket_begin);
  DeviceMemory<uint8_t> device_slots{std::span<const uint8_t>(slots.bytes)};
  DeviceMemory<ShardPiece> device_pieces{std::span<const ShardPiece>(pieces)};
  const Bytes untouched(static_cast<size_t>((front + numel + 2 * kMargin) * size), kUntouched);
  DeviceMemory<uint8_t> bucket{std::span<const uint8_t>(untouched)};
  DeviceMemory<cuda::DecodeStatus> status{std::span<const cuda::DecodeStatus>(&before, 1)};
  cuda::unpack_shards({device_pieces.data(), static_cast<int64_t>(pieces.size()), largest_of(pieces), device_slots.data(), slots.slot_bytes,
                       slots.count, kExpected, bucket.data() + (front + kMargin) * size, slots.type, status.data()},
                      nullptr);
  require(cudaStreamSynchronize(nullptr), "unpack_shards");
  return {bucket.download(), status.download()[0]};
}

// nan: whatever the slots hold.
Bytes unpack_on_cpu(const Slots& slots, const Pieces& pieces, int64_t front = 0, bool nan = false) {
  const int64_t size = element_bytes(slots.type), numel = end_of(pieces, &ShardPiece::bucket_begin);
  Bytes bucket(static_cast<size_t>((front + numel + 2 * kMargin) * size), kUntouched), bytes = slots.bytes;
  if (nan) bytes[offsetof(PayloadHeader, flags)] = kFlagNonFinite;
  const UnpackArguments arguments{pieces, bytes.data(), slots.slot_bytes, slots.count, kExpected, bucket.data() + (front + kMargin) * size,
                                  numel,  slots.type};
  EXPECT_EQ(unpack_shards(arguments), nan);
  return bucket;
}

void expect_status(const cuda::DecodeStatus& status, uint32_t bad_rank, uint32_t step_is_bad) {
  EXPECT_EQ(status.bad_rank, bad_rank);
  EXPECT_EQ(status.step_is_bad, step_is_bad);
  EXPECT_EQ(status.generation, 77u);
}

TEST(UnpackShardsCuda, EveryAlignmentAndTailIsCopied) {
  for (const GradientType type : {GradientType::kFloat32, GradientType::kFloat16}) {
    SCOPED_TRACE(testing::name_of(type));
    const Pieces pieces = of_all_alignments(type, 64 / element_bytes(type));
    const Slots slots(type, 1, (end_of(pieces, &ShardPiece::shards_begin) * element_bytes(type) + 127) / 64 * 64, 91);
    const Unpacked unpacked = unpack_on_cuda(slots, pieces);
    EXPECT_TRUE(unpack_on_cpu(slots, pieces) == unpacked.bucket);
    expect_status(unpacked.status, 0, 0);
  }
}

// Shards of `numels` each, in every slot.
Pieces pieces_of_slots(const Slots& slots, const Numbers& numels, int64_t largest_gap) {
  Pieces all;
  for (int64_t s = 0; s < slots.count; ++s) {
    const int64_t bucket_begin = end_of(all, &ShardPiece::bucket_begin);
    for (ShardPiece piece : scattered(numels, slots.first_entry(s), largest_gap, 92 + static_cast<uint64_t>(s))) {
      piece.bucket_begin += bucket_begin;
      all.push_back(piece);
    }
  }
  return all;
}

TEST(UnpackShardsCuda, EqualsTheCpuEngineBitForBit) {
  for (const GradientType type : kGradientTypes)
    for (const int64_t count : {1, 2, 3, 8}) {
      SCOPED_TRACE(std::string(testing::name_of(type)) + ", count " + std::to_string(count));
      const Numbers numels = count == 2 ? uneven_numels(type) : Numbers{17, 0, 40, 1, 300};
      const Slots slots(type, count, count == 2 ? 8 * kPieceTileBytes : 2048, 93);
      const Pieces pieces = pieces_of_slots(slots, numels, count == 1 ? 0 : 5);
      const Unpacked unpacked = unpack_on_cuda(slots, pieces, count % 2);
      EXPECT_TRUE(unpack_on_cpu(slots, pieces, count % 2) == unpacked.bucket);
      expect_status(unpacked.status, 0, 0);
    }
}

TEST(UnpackShardsCuda, AFlaggedSlotMakesTheBucketNanAndItsStepBad) {
  for (const GradientType type : kGradientTypes)
    for (const int64_t flagged : {0, 2}) {
      SCOPED_TRACE(std::string(testing::name_of(type)) + ", slot " + std::to_string(flagged));
      Slots slots(type, 3, 20480, 94);
      slots.change(flagged, [](PayloadHeader& header) { header.flags = kFlagNonFinite; });
      const Pieces pieces = pieces_of_slots(slots, {17, 0, 40, 1, 300, 600, 1024, 1100}, 5); // rounds of a block
      const Unpacked unpacked = unpack_on_cuda(slots, pieces, 1);
      EXPECT_TRUE(unpack_on_cpu(slots, pieces, 1, true) == unpacked.bucket);
      expect_status(unpacked.status, 0, 1);
    }
}

TEST(UnpackShardsCuda, ASlotThatIsRefusedOrAnotherNamesItsRankAndMakesTheBucketNan) {
  void (*const changes[])(PayloadHeader&) = {[](PayloadHeader& h) { h.version = 1; },
                                             [](PayloadHeader& h) { h.flags = kFlagRefused; },
                                             [](PayloadHeader& h) { h.flags = kFlagRefused | kFlagNonFinite; },
                                             [](PayloadHeader& h) { h.flags = 128; },
                                             [](PayloadHeader& h) { h.rank ^= 1 << 15; },
                                             [](PayloadHeader& h) { h.step ^= 1 << 15; },
                                             [](PayloadHeader& h) { h.layout ^= 1 << 15; }};
  int which = 0;
  for (const auto& change : changes) {
    SCOPED_TRACE("change " + std::to_string(which));
    const GradientType type = kGradientTypes[static_cast<size_t>(which % 3)];
    const int64_t wrong = which++ % 2;
    Slots slots(type, 2, 1024, 95);
    slots.change(wrong, change);
    const Pieces pieces = pieces_of_slots(slots, {40, 3}, 5);
    const Unpacked unpacked = unpack_on_cuda(slots, pieces);
    EXPECT_TRUE(unpack_on_cpu(slots, pieces, 0, true) == unpacked.bucket);
    expect_status(unpacked.status, static_cast<uint32_t>(1 + 4 + wrong), 1);
  }
}

TEST(UnpackShardsCuda, TheLowestBadRankStaysInTheStatus) {
  const auto bad_rank_of = [](const Numbers& wrong, uint32_t before) {
    Slots slots(GradientType::kFloat32, 8, 128, 96);
    for (const int64_t s : wrong) slots.change(s, [](PayloadHeader& header) { header.step = 6; });
    return unpack_on_cuda(slots, pieces_of_slots(slots, {3}, 0), 0, {before, 77, 0}).status.bad_rank;
  };
  EXPECT_EQ(bad_rank_of({2, 7}, 0), 7u); // 1 + the rank: slot 2 is of rank 6
  EXPECT_EQ(bad_rank_of({7, 5, 1}, 0), 6u);
  EXPECT_EQ(bad_rank_of({2, 7}, 3), 3u);
  EXPECT_EQ(bad_rank_of({2, 7}, 9), 7u);
}

TEST(UnpackShardsCuda, EveryOneOfManySlotsIsLookedAtEvenForNoPieceOrOne) {
  for (const GradientType type : kGradientTypes)
    for (const int64_t wrong : {0, 255, 256, 299}) {
      Slots slots(type, 300, 128, 97);
      const Pieces none, one = {{0, slots.first_entry(299), 64 / element_bytes(type)}}; // up to the end of the memory
      EXPECT_TRUE(unpack_on_cpu(slots, one) == unpack_on_cuda(slots, one).bucket);
      expect_status(unpack_on_cuda(slots, none).status, 0, 0);
      slots.change(wrong, [](PayloadHeader& header) { header.step = 8; });
      EXPECT_TRUE(unpack_on_cpu(slots, one, 0, true) == unpack_on_cuda(slots, one).bucket);
      expect_status(unpack_on_cuda(slots, none).status, static_cast<uint32_t>(1 + 4 + wrong), 1);
    }
}

} // namespace
} // namespace compressed_ddp
