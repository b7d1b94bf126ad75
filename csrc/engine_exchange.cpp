// The engine on the CPU: one bucket through its exchange, begun by the hook and finished on threads of the process group.
// engine_device.cpp is the same on a device, where all of it is enqueued at once.
#include <ATen/ops/aminmax.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "cpu/decode_apply.h"
#include "engine.h"
#include "gradient_type.h"
#include "shard_stages.h"
#include "stages_cpu.h"

namespace compressed_ddp {

using Future = c10::ivalue::Future;

namespace {

// Is NaN, whatever rank says so.
bool nan_if_flagged_on_cpu(const uint8_t* payloads, int64_t stride, int64_t count, void* bucket, int64_t numel, GradientType type) {
  for (int64_t p = 0; p < count; ++p) {
    if ((read_header(payloads + p * stride).flags & kFlagNonFinite) == 0) continue;
    fill_nan(numel, bucket, type);
    return true;
  }
  return false;
}

} // namespace

// A bucket between its collectives. Owned by the callbacks of the collective that is under way; holds no process group, which must not die
// on a thread of its own.
struct Engine::Run {
  std::shared_ptr<Progress> progress;
  Place place;
  int num_collectives;
  std::function<WorkPtr(int)> start;
  std::function<bool(int)> finish;      // returns whether the result is bad
  std::function<int(int, bool)> refuse; // Exchange::refuse; empty: nobody waits for it
  std::exception_ptr failure;           // the first one
  c10::IValue result;
  c10::intrusive_ptr<Future> future;
  LaunchOrders orders; // of the collectives behind the first
  std::array<int64_t, kMaxLaterCollectives> tickets{};

  // Before the future completes: whoever waits for it may ask the engine at once.
  void settle(bool bad) const {
    const std::lock_guard lock(progress->mutex);
    Bucket& bucket = *place.bucket;
    bucket.failed = bucket.failed || bad;
    progress->step_is_bad = progress->step_is_bad || (bad && !bucket.is_independent());
    --progress->in_flight;
    progress->idle.notify_all();
  }
  void lose(int from, int to) const { // these collectives are never going to begin on this rank
    for (int collective = std::max(1, from); collective < to; ++collective) orders[static_cast<size_t>(collective - 1)]->lose();
  }
  void complete(bool bad) {
    settle(bad);
    future->markCompleted(std::move(result));
  }

  c10::intrusive_ptr<Future> begin(int collective) const {
    WorkPtr work = start(collective);
    if (work == nullptr) { // nothing to exchange
      auto done = c10::make_intrusive<Future>(c10::NoneType::get());
      done->markCompleted();
      return done;
    }
    place.bucket->works.push_back(std::move(work));
    c10::intrusive_ptr<Future> done = place.bucket->works.back()->getFuture();
    TORCH_CHECK(done, "the process group's backend gives no future for its work");
    return done;
  }

  // What follows a collective: on a thread of the process group, or right here when it is done already. No GIL, no engine.
  static void then(const std::shared_ptr<Run>& run, int collective, const c10::intrusive_ptr<Future>& done) {
    done->addCallback([run, collective](Future& collected) {
      bool bad = false, arrived = false;
      std::exception_ptr failure;
      try {
        if (collected.hasError()) std::rethrow_exception(collected.exception_ptr());
        arrived = true;
        bad = run->finish(collective);
      } catch (const std::exception& error) {
        failure = failed_exchange(run->place, error, arrived);
      } catch (...) {
        failure = std::current_exception();
      }
      if (failure != nullptr) return give_up(run, collective, failure, arrived);
      if (collective + 1 == run->num_collectives) return run->complete(bad);
      launch(run, collective + 1);
    });
  }

  // A collective behind the first, when it is its turn.
  static void launch(const std::shared_ptr<Run>& run, int collective) {
    const auto lane = static_cast<size_t>(collective - 1);
    run->orders[lane]->launch(run->tickets[lane], [run, collective](bool is_lost) -> LaunchOrder::Begun {
      try {
        if (is_lost) throw std::runtime_error(kLostOrderWords);
        return {true, [run, collective, done = run->begin(collective)] { then(run, collective, done); }};
      } catch (const std::exception& error) {
        return {false, [run, collective, failure = failed_exchange(run->place, error)] { give_up(run, collective, failure, false); }};
      } catch (...) {
        return {false, [run, collective, failure = std::current_exception()] { give_up(run, collective, failure, false); }};
      }
    });
  }

  static void give_up(const std::shared_ptr<Run>& run, int collective, const std::exception_ptr& failure, bool arrived) {
    if (run->failure == nullptr) run->failure = failure;
    const int next = run->refuse ? run->refuse(collective, arrived) : run->num_collectives;
    if (next == run->num_collectives) {
      run->settle(true);
      run->future->setError(run->failure);
    }
    run->lose(collective + 1, next);
    if (next < run->num_collectives) launch(run, next);
  }
};

void Engine::start(std::shared_ptr<Run> run, const Request& request) {
  run->progress = progress_;
  run->result = request.result;
  run->future = request.future;
  Bucket& bucket = *run->place.bucket;
  bucket.result = request.result.isPyObject() ? request.result : c10::IValue();
  bucket.works.clear();
  {
    const std::lock_guard lock(progress_->mutex);
    ++progress_->in_flight;
  }
  run->orders = launch_orders_;
  c10::intrusive_ptr<Future> done;
  try {
    done = run->begin(0);
  } catch (const std::exception& error) {
    run->settle(true);
    run->lose(1, run->num_collectives);
    std::rethrow_exception(failed_exchange(run->place, error));
  }
  for (int later = 0; later + 1 < run->num_collectives; ++later)
    run->tickets[static_cast<size_t>(later)] = run->orders[static_cast<size_t>(later)]->take_ticket();
  Run::then(run, 0, done);
}

// ---- process groups

const Engine::Groups& Engine::groups(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group, const Bucket& bucket,
                                     c10::DeviceType device_type) {
  const bool on_device = bucket.key().on_device;
  const auto found = groups_.find(on_device);
  if (found != groups_.end()) return found->second;
  return groups_.emplace(on_device, make_groups(process_group, !on_device, device_type)).first->second;
}

// On the CPU, collectives behind the first begin when another one is done: their order among other buckets' first ones differs from rank
// to rank, which a process group does not allow. So each collective has its own. On a device all are enqueued in the order of the hook.
Engine::Groups Engine::make_groups(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group, bool one_for_each,
                                   c10::DeviceType device_type) {
  const int64_t world_size = process_group->getSize(), rank = process_group->getRank();
  Groups groups;
  const auto add = [&](const c10::intrusive_ptr<c10d::ProcessGroup>& group) { groups.emplace_back(group); };
  const auto make = [&](const std::vector<int64_t>& ranks) {
    TORCH_CHECK(options_.make_group, "compressed_ddp: this exchange needs process groups of its own");
    return options_.make_group(process_group, ranks, device_type);
  };
  const ExchangeKind kind = exchange_kind(world_size);
  if (kind != ExchangeKind::kHierarchical) {
    add(process_group);
    if (num_collectives(kind) < 2) return groups;
    std::vector<int64_t> all;
    for (int64_t r = 0; r < world_size; ++r) all.push_back(r);
    add(one_for_each ? make(all) : process_group);
    return groups;
  }
  if (ranks_per_node_ == 0) {
    TORCH_CHECK(options_.ranks_per_node > 0 || options_.find_ranks_per_node, "compressed_ddp: the number of ranks per node is not known");
    const int64_t count = options_.ranks_per_node > 0 ? options_.ranks_per_node : options_.find_ranks_per_node(process_group);
    check_ranks_per_node(count, world_size);
    residuals_.set_shard({rank % count, count});
    ranks_per_node_ = count;
  }
  const int64_t count = ranks_per_node_, nodes = world_size / count;
  std::vector<int64_t> node, owners;
  for (int64_t l = 0; l < count; ++l) node.push_back(rank - rank % count + l);
  for (int64_t n = 0; n < nodes; ++n) owners.push_back(n * count + rank % count);
  const c10::intrusive_ptr<c10d::ProcessGroup> in_node = make(node), between = make(owners);
  add(in_node);
  add(between);
  for (int later = 1; later < num_collectives(default_exchange(nodes)); ++later) add(one_for_each ? make(owners) : between);
  add(one_for_each ? make(node) : in_node);
  return groups;
}

Bucket::Plan Engine::plan_of(c10d::ProcessGroup& process_group, double density) const {
  const int64_t world_size = process_group.getSize();
  return {exchange_kind(world_size), process_group.getRank(), world_size, ranks_per_node_, density, options_.error_feedback};
}

StageMaker Engine::stages_on_cpu(ExchangeKind kind) {
  const auto make = [](SelectScratch* scratch) {
    return [scratch](BucketRange range, bool may_drop) { return std::make_unique<StagesCpu>(std::move(range), may_drop, scratch); };
  };
  const auto deal = [](const Dealt& dealt, const Node& node, GradientType type) {
    return std::make_unique<ShardStagesCpu>(dealt, node, type);
  };
  // hierarchical selects behind a collective, when the hook may be busy with the next bucket.
  SelectScratch* scratch = kind == ExchangeKind::kHierarchical ? nullptr : &scratch_;
  return {at::kCPU, false, make(scratch), make(nullptr), nan_if_flagged_on_cpu, deal};
}

void Engine::reduce_sparse(const std::shared_ptr<Bucket>& bucket, const Request& request,
                           const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  const int64_t world_size = process_group->getSize(), rank = process_group->getRank();
  agree(bucket, *process_group, at::kCPU);
  const Unsent unsent(order_is_lost_, world_size);
  const Groups of_collective = groups(process_group, *bucket, at::kCPU);
  const Bucket::Plan how = plan_of(*process_group, density_of_current_step());
  if (!bucket->is_prepared(how)) bucket->prepare(how, residuals_, stages_on_cpu(how.kind));
  note_sparse(bucket, request, world_size);
  or_mark_failed(*bucket, [&] {
    bucket->begin(request.buffer, request.unused, step_);
    auto run = std::make_shared<Run>();
    run->place = {bucket, step_, static_cast<int>(rank), static_cast<int>(world_size)};
    run->num_collectives = bucket->exchange().num_collectives();
    run->start = [bucket, of_collective](int collective) {
      const c10::intrusive_ptr<c10d::ProcessGroup> group = of_collective[static_cast<size_t>(collective)].lock();
      TORCH_CHECK(group, "the process group is gone");
      return bucket->exchange().start(collective, *group);
    };
    run->finish = [bucket, buffer = request.buffer](int collective) mutable {
      const bool bad = bucket->exchange().finish(collective, buffer);
      bucket->note_sums();
      return bad;
    };
    run->refuse = [bucket](int collective, bool arrived) { return bucket->exchange().refuse(collective, arrived); };
    start(std::move(run), request);
  });
}

void Engine::reduce_dense(const std::shared_ptr<Bucket>& bucket, const Request& request,
                          const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  const int64_t world_size = process_group->getSize();
  agree(bucket, *process_group, at::kCPU);
  const Unsent unsent(order_is_lost_, world_size);
  note_dense(bucket, request, world_size);
  or_mark_failed(*bucket, [&] {
    at::Tensor sent = begin_dense(*bucket, request, world_size);
    auto run = std::make_shared<Run>();
    run->place = {bucket, step_, process_group->getRank(), static_cast<int>(world_size)};
    run->num_collectives = 1;
    run->start = [group = c10::weak_intrusive_ptr<c10d::ProcessGroup>(process_group), sent](int) mutable {
      return start_all_reduce(*group.lock(), sent);
    };
    run->finish = [buffer = request.buffer, sent, looks = may_come_back()](int) mutable {
      if (!sent.is_same(buffer)) buffer.copy_(sent);
      return looks && is_non_finite(buffer).item<bool>();
    };
    start(std::move(run), request);
  });
}

at::Tensor is_non_finite(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return at::zeros({}, tensor.options().dtype(at::kBool));
  const auto [least, largest] = at::aminmax(tensor);
  return (at::isfinite(least) & at::isfinite(largest)).logical_not();
}

at::Tensor Engine::begin_dense(Bucket& bucket, const Request& request, int64_t world_size) {
  std::vector<Bucket::Compensated> compensated;
  // Behind the dense steps: of parameters that were in a sparse bucket, or that were loaded.
  if (options_.error_feedback && step_ >= options_.dense_steps)
    compensated = bucket.take_residuals(request.buffer, request.unused, residuals_);
  at::Tensor buffer = request.buffer;
  // Divided before the sum, so that fp16 does not overflow. Often the buffer itself.
  at::Tensor sent = buffer.div_(world_size).to(dense_type(bucket.key().type));
  for (auto& [begin, sum] : compensated) sent.narrow(0, begin, sum.numel()).copy_(sum.div_(world_size));
  return sent;
}

// If not, whether the result is finite is of no importance here. A dense bucket is skipped by the optimizer together with sparse ones.
bool Engine::may_come_back() const {
  if (!is_dense_step()) return true;
  return options_.error_feedback && step_ >= options_.dense_steps &&
         (residuals_.has_residuals() ||
          std::any_of(step_buckets_.begin(), step_buckets_.end(), [](const auto& bucket) { return bucket->has_taken(); }));
}

at::ScalarType Engine::dense_type(GradientType type) const {
  switch (step_ < options_.dense_steps ? ExchangeKind::kDense : dense_kind()) {
    case ExchangeKind::kDenseFloat32:
      return at::kFloat;
    case ExchangeKind::kDenseBFloat16:
      return at::kBFloat16;
    case ExchangeKind::kDenseFloat16:
      return at::kHalf;
    default:
      return scalar_type(type);
  }
}

// Devices without an engine of their own: through host memory, and done when the hook returns.
void Engine::reduce_through_host(const Request& request, const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  Request host = request;
  {
    const Unsent unsent(order_is_lost_, process_group->getSize());
    host.buffer = request.buffer.to(at::kCPU);
  }
  host.result = c10::IValue(host.buffer);
  host.future = c10::make_intrusive<Future>(c10::TensorType::get());
  const std::shared_ptr<Bucket> bucket = bucket_of(host);
  if (travels_dense(bucket, host, process_group))
    reduce_dense(bucket, host, process_group);
  else
    reduce_sparse(bucket, host, process_group);
  host.future->waitAndThrow();
  at::Tensor buffer = request.buffer;
  or_mark_failed(*bucket, [&] { buffer.copy_(host.buffer); });
  request.future->markCompleted(request.result, std::vector{buffer.storage().getWeakStorageImpl()});
}

// Piece by piece: of 16-bit entries torch makes an fp32 copy, and that stays in the caches.
static double squares_on_cpu(const at::Tensor& flat) {
  constexpr int64_t kPieceNumel = 1 << 18;
  double sum = 0;
  for (const at::Tensor& piece : flat.split(kPieceNumel)) {
    const double norm = at::linalg_vector_norm(piece.to(at::kFloat), 2).item<double>();
    sum += norm * norm;
  }
  return sum;
}

// ---- what the metrics say of a bucket, as far as the host knows it without looking at entries

void Engine::note_sparse(const std::shared_ptr<Bucket>& bucket, const Request& request, int64_t world_size) {
  has_compressed_ = past_dense_steps_ = true;
  const auto gradient_bytes = static_cast<int64_t>(request.buffer.nbytes());
  bucket->last.step = step_;
  bucket->last.dense = false;
  bucket->last.gradient_bytes = static_cast<double>(gradient_bytes);
  bucket->last.payload_bytes = static_cast<double>(bucket->exchange().payload_bytes());
  bucket->last.dense_bytes = ring_all_reduce_sent_bytes(world_size, gradient_bytes);
  bucket->last.bytes_sent = bucket->exchange().sent_bytes();
  step_buckets_.push_back(bucket);
}

void Engine::note_dense(const std::shared_ptr<Bucket>& bucket, const Request& request, int64_t world_size) {
  past_dense_steps_ = past_dense_steps_ || !is_dense_step();
  const auto gradient_bytes = static_cast<int64_t>(request.buffer.nbytes());
  bucket->last = {};
  bucket->last.step = step_;
  bucket->last.dense = true;
  const int64_t sent_bytes = request.buffer.numel() * static_cast<int64_t>(c10::elementSize(dense_type(bucket->key().type)));
  bucket->last.gradient_bytes = static_cast<double>(gradient_bytes);
  bucket->last.payload_bytes = static_cast<double>(sent_bytes);
  bucket->last.dense_bytes = ring_all_reduce_sent_bytes(world_size, gradient_bytes);
  bucket->last.bytes_sent.all_reduce = ring_all_reduce_sent_bytes(world_size, sent_bytes);
  double gradient_sq = 0;
#if COMPRESSED_DDP_CUDA
  if (bucket->key().on_device) // metrics() reads it, and only then waits
    bucket->dense_norm = at::linalg_vector_norm(request.buffer, 2, std::nullopt, false, at::kFloat);
  else
#endif
    gradient_sq = squares_on_cpu(request.buffer);
  bucket->last.gradient_sq = bucket->last.sent_sq = gradient_sq;
  step_buckets_.push_back(bucket);
}

} // namespace compressed_ddp
