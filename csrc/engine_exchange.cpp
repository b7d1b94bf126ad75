// The engine on the CPU: one bucket through its exchange, begun by the hook and finished on threads of the process group.
// engine_device.cpp is the same on a device, where all of it is enqueued at once.
#include <ATen/ops/linalg_vector_norm.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "cpu/decode_apply.h"
#include "engine.h"
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
  std::function<bool(int)> finish; // returns whether the result is bad
  c10::IValue result;
  c10::intrusive_ptr<Future> future;
  std::shared_ptr<LaunchOrder> order; // of the collectives behind the first
  int64_t ticket = -1;

  // Before the future completes: whoever waits for it may ask the engine at once.
  void settle(bool bad) const {
    const std::lock_guard lock(progress->mutex);
    Bucket& bucket = *place.bucket;
    bucket.failed = bucket.failed || bad;
    progress->step_is_bad = progress->step_is_bad || (bad && !bucket.is_independent());
    --progress->in_flight;
    progress->idle.notify_all();
  }
  void fail(std::exception_ptr failure, int not_begun) const { // a collective, if there is one of this number
    settle(true);
    future->setError(std::move(failure));
    if (not_begun < num_collectives) order->lose();
  }
  void complete(bool bad) {
    settle(bad);
    future->markCompleted(std::move(result));
  }

  c10::intrusive_ptr<Future> begin(int collective) const {
    place.bucket->works.push_back(start(collective));
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
      if (failure != nullptr) return run->fail(failure, collective + 1);
      if (collective + 1 == run->num_collectives) return run->complete(bad);
      run->order->launch(run->ticket, [run, collective](bool is_lost) -> LaunchOrder::Begun {
        try {
          if (is_lost) throw std::runtime_error("an earlier exchange has failed on this rank, and the ranks' collectives no longer match");
          return {true, [run, next = collective + 1, done = run->begin(collective + 1)] { then(run, next, done); }};
        } catch (const std::exception& error) {
          return {false, [run, collective, failure = failed_exchange(run->place, error)] { run->fail(failure, collective + 1); }};
        }
      });
    });
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
  c10::intrusive_ptr<Future> done;
  try {
    done = run->begin(0);
  } catch (const std::exception& error) {
    run->settle(true);
    if (run->num_collectives > 1) launch_order_->lose();
    std::rethrow_exception(failed_exchange(run->place, error));
  }
  if (run->num_collectives > 1) {
    run->order = launch_order_;
    run->ticket = launch_order_->take_ticket();
  }
  Run::then(run, 0, done);
}

// The process group of the collectives behind the first. Their order among those of other buckets' first ones differs from rank to rank,
// which a process group does not allow.
c10::intrusive_ptr<c10d::ProcessGroup> Engine::second_group(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  if (c10::intrusive_ptr<c10d::ProcessGroup> group = second_group_.lock()) return group;
  TORCH_CHECK(options_.make_second_group, "compressed_ddp: this exchange needs a second process group");
  c10::intrusive_ptr<c10d::ProcessGroup> group = options_.make_second_group(process_group);
  second_group_ = c10::weak_intrusive_ptr<c10d::ProcessGroup>(group);
  return group;
}

Bucket::Plan Engine::plan_of(c10d::ProcessGroup& process_group, double density) const {
  const int64_t world_size = process_group.getSize();
  return {exchange_kind(world_size), {process_group.getRank(), world_size}, density, options_.error_feedback};
}

StageMaker Engine::stages_on_cpu() {
  const auto make = [](SelectScratch* scratch) {
    return [scratch](BucketRange range, bool may_drop) { return std::make_unique<StagesCpu>(std::move(range), may_drop, scratch); };
  };
  return {at::kCPU, false, make(&scratch_), make(nullptr), nan_if_flagged_on_cpu};
}

void Engine::reduce_sparse(const std::shared_ptr<Bucket>& bucket, const Request& request,
                           const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  const int64_t world_size = process_group->getSize(), rank = process_group->getRank();
  agree(bucket, *process_group, at::kCPU);
  const ExchangeKind kind = exchange_kind(world_size);
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> first(process_group);
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> second(kind == ExchangeKind::kSplit ? second_group(process_group) : process_group);

  const Bucket::Plan how = plan_of(*process_group, density_of_current_step());
  if (!bucket->is_prepared(how)) bucket->prepare(how, residuals_, stages_on_cpu());
  bucket->begin(request.buffer, request.unused, step_);
  note_sparse(bucket, request, world_size);

  auto run = std::make_shared<Run>();
  run->place = {bucket, step_, static_cast<int>(rank), static_cast<int>(world_size)};
  run->num_collectives = bucket->exchange().num_collectives();
  run->start = [bucket, first, second](int collective) {
    const c10::intrusive_ptr<c10d::ProcessGroup> group = (collective == 0 ? first : second).lock();
    TORCH_CHECK(group, "the process group is gone");
    return bucket->exchange().start(collective, *group);
  };
  run->finish = [bucket, buffer = request.buffer](int collective) mutable {
    const bool bad = bucket->exchange().finish(collective, buffer);
    bucket->note_returned();
    return bad;
  };
  start(std::move(run), request);
}

void Engine::reduce_dense(const std::shared_ptr<Bucket>& bucket, const Request& request,
                          const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  const int64_t world_size = process_group->getSize();
  agree(bucket, *process_group, at::kCPU);
  note_dense(bucket, request, world_size);
  at::Tensor buffer = request.buffer;
  buffer.div_(world_size); // before the sum, so that fp16 does not overflow
  auto run = std::make_shared<Run>();
  run->place = {bucket, step_, process_group->getRank(), static_cast<int>(world_size)};
  run->num_collectives = 1;
  run->start = [group = c10::weak_intrusive_ptr<c10d::ProcessGroup>(process_group), buffer](int) mutable {
    return start_all_reduce(*group.lock(), buffer);
  };
  run->finish = [](int) { return false; };
  start(std::move(run), request);
}

// Devices without an engine of their own: through host memory, and done when the hook returns.
void Engine::reduce_through_host(const Request& request, const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  Request host = request;
  host.buffer = request.buffer.to(at::kCPU);
  host.result = c10::IValue(host.buffer);
  host.future = c10::make_intrusive<Future>(c10::TensorType::get());
  const std::shared_ptr<Bucket> bucket = bucket_of(host);
  if (is_dense_step())
    reduce_dense(bucket, host, process_group);
  else
    reduce_sparse(bucket, host, process_group);
  host.future->waitAndThrow();
  at::Tensor buffer = request.buffer;
  buffer.copy_(host.buffer);
  request.future->markCompleted(request.result, std::vector{buffer.storage().getWeakStorageImpl()});
}

// ---- what the metrics say of a bucket, as far as the host knows it without looking at entries

void Engine::note_sparse(const std::shared_ptr<Bucket>& bucket, const Request& request, int64_t world_size) {
  has_compressed_ = true;
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
  const auto gradient_bytes = static_cast<int64_t>(request.buffer.nbytes());
  bucket->last = {};
  bucket->last.step = step_;
  bucket->last.dense = true;
  bucket->last.gradient_bytes = bucket->last.payload_bytes = static_cast<double>(gradient_bytes);
  bucket->last.dense_bytes = bucket->last.bytes_sent.all_reduce = ring_all_reduce_sent_bytes(world_size, gradient_bytes);
  const at::Tensor norm = at::linalg_vector_norm(request.buffer, 2, std::nullopt, false, at::kFloat);
#if COMPRESSED_DDP_CUDA
  if (bucket->key().on_device) bucket->dense_norm = norm; // metrics() reads it, and only then waits
#endif
  const double on_host = bucket->key().on_device ? 0 : norm.item<double>();
  bucket->last.gradient_sq = bucket->last.sent_sq = on_host * on_host;
  step_buckets_.push_back(bucket);
}

} // namespace compressed_ddp
