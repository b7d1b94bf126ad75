// exchange="auto": whether a bucket travels sparse or dense, by what either would cost. A model, not a promise: docs/exchanges.md has it in
// words. Torch-free.
//
// A choice is a function of the costs, the layout and the number of ranks, and those are the same on every rank: rank 0 measures, all take
// what it has measured (ExchangeGroups.measure_costs of python/compressed_ddp/groups.py).
#pragma once

#include <cstdint>
#include <string>

#include "exchange_kind.h"

namespace compressed_ddp {

// Of this process group and these devices; times in seconds. All positive.
struct ExchangeCosts {
  double latency_s;         // of one collective
  double byte_s;            // of a byte that a rank sends, in a large one
  double select_entry_s;    // compensate_select_ and encode, per entry of the bucket
  double decode_entry_s;    // decode_apply_, per entry of the bucket
  double decode_selected_s; // and per selected entry of every payload
};

struct BucketSize {
  int64_t numel;
  int64_t selected_numel;
  int64_t payload_bytes;
  int64_t dense_bytes; // as the dense exchange sends it
};

struct Prediction {
  double sparse_s, dense_s;
  bool is_dense() const { return sparse_s > kWorthwhile * dense_s; }
  // Sparse has to be this much faster: the model knows nothing of what it hides behind the backward pass, which favours dense.
  static constexpr double kWorthwhile = 0.8;
};

// sparse: kAllGather or kSplit.
inline Prediction predict(const ExchangeCosts& costs, ExchangeKind sparse, int64_t world_size, const BucketSize& bucket) {
  const auto ranks = static_cast<double>(world_size), n = static_cast<double>(bucket.numel), k = static_cast<double>(bucket.selected_numel);
  const auto payload = static_cast<double>(bucket.payload_bytes), dense = static_cast<double>(bucket.dense_bytes);
  const double ring = 2 * (ranks - 1) / ranks; // of a ring all-reduce: as much as a reduce-scatter and an all-gather
  const auto decode = [&](double entries, double selected) { return entries * costs.decode_entry_s + selected * costs.decode_selected_s; };
  const double latency_s = world_size == 1 ? 0 : costs.latency_s; // of one rank nothing is sent
  Prediction prediction{};
  prediction.dense_s = 2 * latency_s + ring * dense * costs.byte_s;
  if (sparse == ExchangeKind::kSplit)
    prediction.sparse_s = 2 * latency_s + ring * payload * costs.byte_s + n * costs.select_entry_s + decode(n / ranks, k) +
                          n / ranks * costs.select_entry_s + decode(n, k);
  else
    prediction.sparse_s = latency_s + (ranks - 1) * payload * costs.byte_s + n * costs.select_entry_s + decode(n, ranks * k);
  return prediction;
}

// What was decided of a bucket, for people and for checkpoints.
struct ExchangeChoice {
  std::string bucket; // the name of its first parameter
  int64_t numel;
  ExchangeKind kind;
  Prediction prediction;
};

} // namespace compressed_ddp
