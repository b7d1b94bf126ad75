// Stage 3, exchange: how the payloads of one bucket travel, and what each collective is followed by. One interface for all of them, on
// the CPU and on devices; docs/exchanges.md has the picture, the volumes and when to take which.
//
//   allgather      one payload of the whole bucket to every rank                             exchange_allgather.cpp
//   split          a payload per owner of a range; owners average and select again;          exchange_split.cpp
//                  one payload of the range's average to every rank
//   hierarchical   whole gradients inside a node, to the owner of a shard; one of the two    exchange_hierarchical.cpp
//                  above between the owners of a shard; its average inside the node
//   dense          an all-reduce: no payload, no Exchange object (engine.cpp)
#pragma once

#include <memory>
#include <string_view>

#include "collectives.h"
#include "exchange_kind.h"
#include "shard_stages.h"
#include "stages.h"

namespace compressed_ddp {

struct SentBytes { // of one step of one bucket, by this rank; what it keeps for itself is not counted
  double all_gather = 0, all_to_all = 0, all_reduce = 0;
  double in_node_all_to_all = 0, in_node_all_gather = 0; // by hierarchical, to ranks of the same node; the others are between nodes then
  double sum() const { return all_gather + all_to_all + all_reduce; } // on the network
  double in_node() const { return in_node_all_to_all + in_node_all_gather; }
  SentBytes& operator+=(const SentBytes& other) {
    all_gather += other.all_gather;
    all_to_all += other.all_to_all;
    all_reduce += other.all_reduce;
    in_node_all_to_all += other.in_node_all_to_all;
    in_node_all_gather += other.in_node_all_gather;
    return *this;
  }
};

// Of one bucket. A step is begin, then start(0), finish(0), start(1), finish(1), ..; each finish when its collective is done. On the CPU
// the finishes run on threads of the process group; on a device all of it is enqueued at once.
class Exchange {
 public:
  virtual ~Exchange() = default;

  virtual int num_collectives() const = 0;
  // gradient: the bucket, flat.
  virtual void begin(const at::Tensor& gradient, const Unused& unused, int64_t step) = 0;
  // Each collective has a process group of its own on the CPU, where those of several buckets begin in no fixed order. nullptr: this rank
  // has nothing to exchange with the ranks of that group, nor they with it.
  virtual WorkPtr start(int collective, ProcessGroup& process_group) = 0;
  // The last one writes the averages into `gradient`. Returns whether the result, the same on every rank, is non-finite somewhere (on a
  // device the report knows). Throws, `gradient` untouched, when a payload is not what it should be.
  virtual bool finish(int collective, at::Tensor& gradient) = 0;
  // A collective has failed on this rank, or could not begin (not arrived), or its finish has thrown (arrived). Where ranks that know
  // nothing of it would wait for this one in a later collective, its number: they get a refusal there, and its finish throws. Else
  // num_collectives(). CPU only: on a device nothing is known in time.
  virtual int refuse(int /*collective*/, bool /*arrived*/) { return num_collectives(); }
  // What this rank sent comes back: after a failure, a bad step, rollback(). condition: as in Stages::restore.
  virtual void restore(const uint32_t* condition) = 0;
  virtual void forget_sent() = 0;

  virtual int64_t payload_bytes() const = 0; // that are encoded of this rank's gradient, or of its node's
  virtual SentBytes sent_bytes() const = 0;
  virtual const std::vector<std::unique_ptr<Stages>>& stages() const = 0; // that select from the gradient: of these the statistics are
  virtual const StageSums& sums() const { return sums_; }                 // CPU: of the last step, as far as it has come
  // Whether begin with this `unused` (per entry) is enqueued without a wait.
  virtual bool knows_unused(const std::vector<uint8_t>& unused) const {
    for (const auto& part : stages())
      if (part != nullptr && !part->knows_unused(unused)) return false;
    return true;
  }

 protected:
  StageSums sums_;
};

// Who takes part in an exchange of payloads, and as which ranks of the job.
struct Members {
  int64_t index, count; // this process among them
  Senders senders;      // all of them
  Sender self(int64_t step) const { return {senders.rank_of(index), step}; }
};
// All ranks of the job.
inline Members all_ranks(int64_t rank, int64_t world_size) { return {rank, world_size, {0}}; }

// What a selection reads, and what the averages are rounded to. One type, but for what a node has summed: that is fp32.
struct ExchangeTypes {
  GradientType gradient, result;
};

// Makes `bucket` NaN everywhere if one of the `count` payloads, which begin every `stride` bytes, is flagged as non-finite. Returns whether
// that is so (on a device: false, the report knows).
using NanIfFlagged =
    std::function<bool(const uint8_t* payloads, int64_t stride, int64_t count, void* bucket, int64_t numel, GradientType type)>;

// What makes the parts of an exchange on one device.
struct StageMaker {
  c10::Device device;
  bool on_device;        // stages are enqueued: results and refusals are known later
  MakeStages make;       // for the hook's thread
  MakeStages make_owner; // for threads of the process group, beside the hook
  NanIfFlagged nan_if_flagged;
  std::function<std::unique_ptr<ShardStages>(const Dealt&, const Node&, GradientType)> deal;
};

// `range`: of the whole bucket.
std::unique_ptr<Exchange> make_all_gather_exchange(BucketRange range, const Members& members, ExchangeTypes types, const StageMaker& maker);
// `ranges`: that of every member, one after another; empty ones come last.
std::unique_ptr<Exchange> make_split_exchange(std::vector<BucketRange> ranges, const Members& members, ExchangeTypes types,
                                              const StageMaker& maker);

// between: the exchange of this rank's shard with the ranks of other nodes that own the same, of `between_collectives` collectives; nullptr
// when the shard is empty, on all of them. Its gradient is fp32, its result of `type`.
std::unique_ptr<Exchange> make_hierarchical_exchange(const Dealt& dealt, const Node& node, std::unique_ptr<Exchange> between,
                                                     int between_collectives, int64_t node_payload_bytes, GradientType type,
                                                     const StageMaker& maker);

// Uninitialised bytes on a device.
at::Tensor bytes_on(c10::Device device, int64_t bytes);

} // namespace compressed_ddp
