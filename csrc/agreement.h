// Agreement before bytes: unequal sizes abort a Gloo process, so every rank shows what it is about to send before the first
// payload of a bucket, and all compare. Torch-free; engine.cpp moves the records.
//
// A record has a fixed size, so ranks that disagree about everything else can still exchange it.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "layout.h"

namespace compressed_ddp {

struct AgreementRecord {
  uint32_t record_version = 4;
  uint32_t wire_version = 0;
  int64_t rank = 0;
  int64_t world_size = 0;
  int64_t step = 0;
  double density = 0;
  int64_t density_is_callable = 0;
  int64_t scope = 0; // 0 = tensor, 1 = bucket, 2 = chunk
  int64_t value_format = 0;
  int64_t exchange = 0;       // an ExchangeKind
  int64_t ranks_per_node = 0; // of exchange="hierarchical"; 0 = to be found out
  int64_t error_feedback = 0;
  int64_t dense_steps = 0;
  int64_t min_compress_numel = 0;
  int64_t gradient_type = 0;
  int64_t numel = 0;
  int64_t num_segments = 0;
  int64_t selected_numel = 0;   // sum of k
  int64_t model_parameters = 0; // of all buckets; 0 = this rank has not bound its model; compared only where all have
  uint64_t structure_hash = 0;
  uint64_t exempt_hash = 0;
  uint64_t names_hash = 0; // 0 = this rank has no names; compared only where both have
  uint64_t costs_hash = 0; // of exchange="auto"; 0 = still to be measured
  char bucket[48] = {};    // for the message: the name of the bucket's first parameter, cut off
};
static_assert(sizeof(AgreementRecord) == 224 && std::is_trivially_copyable_v<AgreementRecord>);

// Empty when all records agree with each other; otherwise one message, the same on every rank, which lists each differing field
// with its value on every rank that differs from rank 0, and the remedy. records[r] must be what rank r sent.
std::string describe_disagreement(std::span<const AgreementRecord> records);

} // namespace compressed_ddp
