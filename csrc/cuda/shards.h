// A bucket dealt out among the ranks of a node, on CUDA. The contract is that of cpu/shards.h, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include "../cpu/float_types.h"
#include "../cpu/shards.h"
#include "../wire_format.h"
#include "decode_apply.h"

namespace compressed_ddp::cuda {

void load_shards(GradientType type); // as load_decode_apply; of all below

struct PackShardsArguments { // all pointers in device memory
  const ShardPiece* pieces;
  int64_t num_pieces;
  int64_t largest_piece_numel;
  const int64_t* presence_from; // [num_shards]
  int64_t num_shards;
  const uint8_t* unused; // [num_parameters]
  int64_t num_parameters;
  const void* bucket;
  GradientType type;
  void* shards;
};
void pack_shards(const PackShardsArguments& arguments, cudaStream_t stream); // one launch

void mean_of_shards(const void* shards, GradientType type, int64_t count, int64_t numel, float* mean, cudaStream_t stream); // one launch

// unused[s] = 1 where presence[parameter_of_segment[s]] is 0: no rank of the node has used it; a negative parameter is always used.
void mark_unused(const float* presence, const int32_t* parameter_of_segment, int64_t num_segments, uint8_t* unused, cudaStream_t stream);

// slot = header, flagged as non-finite if status->step_is_bad.
void seal_slot(uint8_t* slot, const PayloadHeader& header, const DecodeStatus* status, cudaStream_t stream);

struct UnpackShardsArguments { // all pointers in device memory
  const ShardPiece* pieces;
  int64_t num_pieces;
  int64_t largest_piece_numel;
  const uint8_t* slots; // 64-byte aligned, as is what seal_slot writes
  int64_t slot_bytes;
  int64_t count;
  PayloadHeader expected;
  void* bucket;
  GradientType type;
  DecodeStatus* status; // bad_rank and step_is_bad are set as decode_apply sets them
};
// One launch. NaN everywhere if a slot is flagged as non-finite or refused, or is not what this rank expects.
void unpack_shards(const UnpackShardsArguments& arguments, cudaStream_t stream);

} // namespace compressed_ddp::cuda
