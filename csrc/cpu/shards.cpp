#include "shards.h"

#include <algorithm>
#include <bit>

#include "decode_apply.h"
#include "keep_denormals.h"

namespace compressed_ddp {
namespace {

constexpr int64_t kTileNumel = 4096; // 16 KiB of sums: half of the first-level data cache, the other half for what is added

template <typename gradient_t>
void mean_typed(const gradient_t* shards, int64_t count, int64_t numel, float* mean) {
  const float scale = 1.0f / static_cast<float>(count);
  float sums[kTileNumel]; // nothing else points here: the loops below are vectorised without a check for that
  for (int64_t begin = 0; begin < numel; begin += kTileNumel) {
    const int64_t tile_numel = std::min(kTileNumel, numel - begin);
    std::fill_n(sums, tile_numel, 0.0f);
    for (int64_t s = 0; s < count; ++s) { // rank order
      const gradient_t* shard = shards + s * numel + begin;
      for (int64_t i = 0; i < tile_numel; ++i) sums[i] += to_float(shard[i]);
    }
    for (int64_t i = 0; i < tile_numel; ++i) {
      const auto bits = std::bit_cast<uint32_t>(sums[i] * scale);
      mean[begin + i] = std::bit_cast<float>((bits & 0x7fffffffu) > kInfinityKey ? kCanonicalNanBits : bits);
    }
  }
}

} // namespace

void pack_shards(const PackArguments& arguments) {
  const int64_t size = element_bytes(arguments.type);
  const auto* bucket = static_cast<const uint8_t*>(arguments.bucket);
  auto* shards = static_cast<uint8_t*>(arguments.shards);
  for (const ShardPiece& piece : arguments.pieces)
    std::copy_n(bucket + piece.bucket_begin * size, piece.numel * size, shards + piece.shards_begin * size);
  with_gradient_type(arguments.type, [&](auto one) {
    using gradient_t = decltype(one);
    gradient_t zero{};
    from_float(1.0f, one);
    for (const int64_t begin : arguments.presence_from) {
      auto* presence = static_cast<gradient_t*>(arguments.shards) + begin;
      for (const uint8_t unused : arguments.unused) *presence++ = unused != 0 ? zero : one;
    }
  });
}

void mean_of_shards(const void* shards, GradientType type, int64_t count, int64_t numel, float* mean) {
  [[maybe_unused]] const KeepDenormals keep_denormals;
  with_gradient_type(type, [&](auto gradient) { mean_typed(static_cast<const decltype(gradient)*>(shards), count, numel, mean); });
}

std::string check_slots(const UnpackArguments& arguments) {
  PayloadHeader expected = arguments.expected;
  for (int64_t s = 0; s < arguments.count; ++s, ++expected.rank) {
    const std::string why = check_header(expected, arguments.slots + s * arguments.slot_bytes);
    if (!why.empty()) return "the shard of rank " + std::to_string(expected.rank) + " is not what this rank expects (" + why + ")";
  }
  return {};
}

bool unpack_shards(const UnpackArguments& arguments) {
  for (int64_t s = 0; s < arguments.count; ++s) {
    if ((read_header(arguments.slots + s * arguments.slot_bytes).flags & kFlagNonFinite) == 0) continue;
    fill_nan(arguments.numel, arguments.bucket, arguments.type);
    return true;
  }
  const int64_t size = element_bytes(arguments.type);
  auto* bucket = static_cast<uint8_t*>(arguments.bucket);
  for (const ShardPiece& piece : arguments.pieces)
    std::copy_n(arguments.slots + piece.shards_begin * size, piece.numel * size, bucket + piece.bucket_begin * size);
  return false;
}

} // namespace compressed_ddp
