// A bucket dealt out among the ranks of a node: what exchange="hierarchical" does to whole gradients (exchange_hierarchical.cpp).
// Torch-free. csrc/cuda/shards.h is the same on CUDA, bit for bit.
//
// Shard l of a bucket is the l-th part of each of its parameters, one after another, so that a rank owns the same entries of a parameter
// whatever bucket that lies in. A shard travels in the gradient's own type, twice:
//
//   to its owner     [shard 0, presence][shard 1, presence] ..  an all-to-all; presence: 1 or 0 per parameter, whether this rank used it
//   from its owner   [slot 0][slot 1] ..                        an all-gather; a slot is a PayloadHeader and the shard, both padded
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "../wire_format.h"
#include "float_types.h"

namespace compressed_ddp {

// Of a slot and of the shard in it, so that copies of whole shards are aligned: inside a node, bytes are cheap.
inline constexpr int64_t kSlotAlignment = 64;

// Entries that lie together in the bucket and in a buffer of shards; positions in entries of the gradient's type.
struct ShardPiece {
  int64_t bucket_begin;
  int64_t shards_begin;
  int64_t numel;
};

struct PackArguments {
  std::span<const ShardPiece> pieces;     // shards_begin: in `shards`
  std::span<const int64_t> presence_from; // per shard: where in `shards` its presence begins
  std::span<const uint8_t> unused;        // per parameter: 1 = not used by this rank in this step
  const void* bucket;                     // [numel] of `type`
  GradientType type;
  void* shards; // written: pieces and presence
};
// shards[piece] = bucket[piece]; a parameter's presence is 1 where it is used and 0 where not.
void pack_shards(const PackArguments& arguments);

// mean[i] = (((0 + shards[0][i]) + shards[1][i]) + ..) * fp32(1 / count), in fp32; every NaN as kCanonicalNanBits, since processors do not
// agree on the bits of one. shards: [count, numel] of `type`.
void mean_of_shards(const void* shards, GradientType type, int64_t count, int64_t numel, float* mean);

struct UnpackArguments {
  std::span<const ShardPiece> pieces; // shards_begin: in `slots`, headers counted
  const uint8_t* slots;               // [count, slot_bytes]
  int64_t slot_bytes;                 // a multiple of kSlotAlignment
  int64_t count;
  PayloadHeader expected; // of slot 0; the others are of the ranks behind it. Flags are not compared
  void* bucket;           // [numel] of `type`, written: the pieces cover it
  int64_t numel;
  GradientType type;
};
// Empty, or one line about the first slot whose header is not the expected one, or says that its rank has nothing to send (kFlagRefused).
std::string check_slots(const UnpackArguments& arguments);
// The slots have let check_slots pass. NaN everywhere if one is flagged as non-finite; returns whether that is so.
bool unpack_shards(const UnpackArguments& arguments);

} // namespace compressed_ddp
