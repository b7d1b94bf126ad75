// Stage 3, exchange: how the payloads of one bucket travel, and what each collective is followed by. One interface for all of them, on
// the CPU and on devices; docs/exchanges.md has the picture, the volumes and when to take which.
//
//   allgather      one payload of the whole bucket to every rank                             exchange_allgather.cpp
//   split          a payload per owner of a range; owners average and select again;          exchange_split.cpp
//                  one payload of the range's average to every rank
//   dense          an all-reduce: no payload, no Exchange object (engine.cpp)
#pragma once

#include <memory>
#include <string_view>

#include "collectives.h"
#include "stages.h"

namespace compressed_ddp {

enum class ExchangeKind : int64_t { kAllGather = 0, kSplit = 1, kDense = 2 };
inline constexpr ExchangeKind kExchangeKinds[] = {ExchangeKind::kAllGather, ExchangeKind::kSplit, ExchangeKind::kDense};
const char* name_of(ExchangeKind kind); // "allgather", "split", "dense"

// What a state does that names no exchange. A function of the world size alone, so that runs repeat.
inline constexpr int64_t kAllGatherRanks = 16;
inline ExchangeKind default_exchange(int64_t world_size) {
  return world_size <= kAllGatherRanks ? ExchangeKind::kAllGather : ExchangeKind::kSplit;
}

struct SentBytes { // of one step of one bucket, by this rank; what it keeps for itself is not counted
  double all_gather = 0, all_to_all = 0, all_reduce = 0;
  double sum() const { return all_gather + all_to_all + all_reduce; }
  SentBytes& operator+=(const SentBytes& other) {
    all_gather += other.all_gather;
    all_to_all += other.all_to_all;
    all_reduce += other.all_reduce;
    return *this;
  }
};

// Of one bucket. A step is begin, then start(0), finish(0), start(1), finish(1), ..; each finish when its collective is done. On the CPU
// the finishes run on threads of the process group; on a device all of it is enqueued at once.
class Exchange {
 public:
  virtual ~Exchange() = default;

  virtual int num_collectives() const = 0;
  // Stages 1 and 2. gradient: the bucket, flat. unused: per entry.
  virtual StageSums begin(const at::Tensor& gradient, const std::vector<uint8_t>& unused, int64_t step) = 0;
  virtual WorkPtr start(int collective, ProcessGroup& process_group) = 0;
  // The last one writes the averages into `gradient`. Returns whether the result, the same on every rank, is non-finite somewhere (on a
  // device the report knows). Throws, `gradient` untouched, when a payload is not what it should be.
  virtual bool finish(int collective, at::Tensor& gradient) = 0;
  // What this rank sent comes back: after a failure, a bad step, rollback(). condition: as in Stages::restore.
  virtual void restore(const uint32_t* condition) = 0;
  virtual void forget_sent() = 0;

  virtual int64_t payload_bytes() const = 0; // that begin writes
  virtual SentBytes sent_bytes() const = 0;
  virtual const std::vector<std::unique_ptr<Stages>>& stages() const = 0; // that begin runs: of these the statistics are
  double returned_sq() const { return returned_sq_; }                     // CPU: of the last step, what return_dropped gave back

 protected:
  double returned_sq_ = 0;
};

struct RankOf {
  int64_t rank, world_size;
  bool operator==(const RankOf&) const = default;
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
};

// `range`: of the whole bucket.
std::unique_ptr<Exchange> make_all_gather_exchange(BucketRange range, RankOf ranks, GradientType type, const StageMaker& maker);
// `ranges`: that of every rank, one after another; empty ones come last.
std::unique_ptr<Exchange> make_split_exchange(std::vector<BucketRange> ranges, RankOf ranks, GradientType type, const StageMaker& maker);

// Uninitialised bytes on a device.
at::Tensor bytes_on(c10::Device device, int64_t bytes);

} // namespace compressed_ddp
