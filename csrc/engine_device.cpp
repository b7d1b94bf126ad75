// The engine on CUDA: every stage of a bucket enqueued on one stream of its own, in the order of the one data path. docs/streams.md
// has the picture of streams and events; device_stream.h is how they meet torch's.
//
// In the steady state the host waits for nothing (with NCCL; Gloo reads device memory through the host and waits for itself). What
// the host would want to know, the device reports later: a damaged payload at the next call, a bad step as a flag in device memory
// that decides there, at the beginning of the next step, whether what was sent comes back.
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "collectives.h"
#include "cuda/launch.h"
#include "engine.h"
#include "shard_stages_device.h"

namespace compressed_ddp {

DeviceStream& Engine::device_stream(c10::Device device) {
  if (device_stream_ == nullptr) {
    device_stream_ = std::make_unique<DeviceStream>(device);
    device_ = device;
  }
  TORCH_CHECK_VALUE(device == device_, "compressed_ddp: expected all buckets of one state on ", device_, ", got one on ", device,
                    "; a model on several devices needs a TopKEFState for each");
  return *device_stream_;
}

// Whatever a replay could not repeat is refused here, before the call touches the device or begins a step.
void Engine::check_capture(Request& request, c10d::ProcessGroup& process_group) {
  if (!is_capturing(request.buffer.device())) return;
  const bool begins_step = repeats(request);
  const int64_t step = step_ + (begins_step ? 1 : 0);
  TORCH_CHECK(step >= options_.dense_steps, "compressed_ddp: a CUDA graph cannot hold a dense step (step ", step,
              " of dense_steps=", options_.dense_steps,
              "), because later steps are not like it; run the dense steps and one compressed step, then capture");
  TORCH_CHECK(!options_.density_of_step,
              "compressed_ddp: a CUDA graph cannot follow a callable density, because a replay repeats the captured k; use a number");
  const std::shared_ptr<Bucket> bucket = find_bucket(request);
  const auto choice = bucket == nullptr ? choices_.end() : choices_.find(bucket->identity_hash());
  TORCH_CHECK(!is_ever_dense() && (choice == choices_.end() || !is_dense(choice->second.kind)),
              "compressed_ddp: a CUDA graph cannot hold a bucket that travels dense (exchange='dense', or a choice of 'auto'), because "
              "its buffers are made anew in every step; use exchange='allgather', 'split' or 'hierarchical', or no hook at all");
  TORCH_CHECK(
      bucket != nullptr && agreed_.contains(bucket->identity_hash()) && bucket->is_prepared(plan_of(process_group, options_.density)),
      "compressed_ddp: a CUDA graph cannot hold a bucket's first compressed step, which allocates and compares the ranks' "
      "layouts; run one compressed step before the capture");
  TORCH_CHECK(bucket->knows_unused(request.unused),
              "compressed_ddp: a CUDA graph cannot hold a step with other unused parameters than the step before it, because they are "
              "copied to the device then; run one step that uses the same parameters before the capture");
  if (begins_step) {
    const std::lock_guard lock(progress_->mutex);
    for (const auto& last : step_buckets_)
      TORCH_CHECK(!gives_back(*last) && !last->has_taken(),
                  "compressed_ddp: a CUDA graph cannot begin behind a failed step, nor behind one in which a dense bucket sent its "
                  "residuals, because a replay would repeat that what was sent comes back or is spent; run one good step before the "
                  "capture");
  }
  bucket->captured = true;
}

void Engine::check_not_captured(const char* what) const {
  for (const auto& [first, bucket] : buckets_)
    TORCH_CHECK(!bucket->captured, "TopKEFState.", what, ": a CUDA graph holds the buffers of the bucket that begins with '",
                bucket->name(), "', which this call would free; use a new TopKEFState, and capture again");
}

void Engine::reduce_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request,
                              const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  DeviceStream& stream = device_stream(request.buffer.device());
  if (!is_capturing(request.buffer.device())) stream.hold(request.buffer);
  const bool dense = travels_dense(bucket, request, process_group);
  const DeviceStream::Scope scope(stream);
  if (dense)
    dense_on_device(bucket, request, *process_group);
  else
    sparse_on_device(bucket, request, process_group);
  stream.complete(*request.future, request.result, request.buffer);
}

void Engine::sparse_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request,
                              const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  DeviceStream& stream = *device_stream_;
  const int64_t world_size = process_group->getSize();
  const int rank = process_group->getRank();
  agree(bucket, *process_group, request.buffer.device());
  Unsent unsent(order_is_lost_, world_size);
  const Groups& of_collective = groups(process_group, *bucket, request.buffer.device().type());
  const Bucket::Plan plan = plan_of(*process_group, density_of_current_step());
  TORCH_CHECK(!bucket->captured || bucket->is_prepared(plan),
              "compressed_ddp: a CUDA graph holds the buffers of the bucket that begins with '", bucket->name(),
              "', but they would have to change for another world size; use a new TopKEFState, and capture again");
  give_report(*bucket, request.buffer.device());
  if (!bucket->is_prepared(plan))
    bucket->prepare(plan, residuals_, stages_on_device(request.buffer.device(), bucket->key().type, bucket->report));
  note_sparse(bucket, request, world_size);
  or_mark_failed(*bucket, [&] { bucket->begin(request.buffer, request.unused, step_); });
  at::Tensor buffer = request.buffer;
  Exchange& exchange = bucket->exchange();
  const auto begun = std::make_shared<int>(0);
  const auto fail = [&] {
    if (*begun == exchange.num_collectives()) unsent.all_begun();
    mark_failed(*bucket);
  };
  for (int collective = 0; collective < exchange.num_collectives(); ++collective) {
    try {
      // NCCL: only the stream waits.
      // By value: the tests without a GPU run it again in every replay of a graph.
      stream.run([&exchange, collective, begun, of = of_collective[static_cast<size_t>(collective)]] {
        const c10::intrusive_ptr<c10d::ProcessGroup> group = of.lock();
        TORCH_CHECK(group, "the process group is gone");
        const WorkPtr work = exchange.start(collective, *group);
        *begun = collective + 1;
        if (work) work->wait();
      });
    } catch (const std::exception& error) {
      fail();
      std::rethrow_exception(failed_exchange({bucket, step_, rank, static_cast<int>(world_size)}, error));
    }
    try {
      exchange.finish(collective, buffer);
    } catch (...) {
      fail();
      throw;
    }
  }
}

StageMaker Engine::stages_on_device(c10::Device device, GradientType type, const std::shared_ptr<DeviceReport>& report) {
  const cudaStream_t stream = device_stream_->handle();
  const auto make = [=](std::vector<GradientType> types) {
    return [=](BucketRange range, bool may_drop) {
      return std::make_unique<StagesDevice>(std::move(range), may_drop, types, device, stream, report);
    };
  };
  const auto nan_if_flagged = [=](const uint8_t* payloads, int64_t stride, int64_t count, void* bucket, int64_t numel, GradientType of) {
    nan_if_flagged_on_device(payloads, stride, count, bucket, numel, of, *report, stream);
    return false;
  };
  const auto deal = [=](const Dealt& dealt, const Node& node, GradientType of) {
    return std::make_unique<ShardStagesDevice>(dealt, node, of, device, stream, report);
  };
  return {device, true, make({type, GradientType::kFloat32}), make({GradientType::kFloat32}), nan_if_flagged, deal};
}

void Engine::dense_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request, c10d::ProcessGroup& process_group) {
  agree(bucket, process_group, request.buffer.device());
  Unsent unsent(order_is_lost_, process_group.getSize());
  at::Tensor buffer = request.buffer;
  TORCH_CHECK(!bucket->captured, "compressed_ddp: a CUDA graph holds the buffers of the bucket that begins with '", bucket->name(),
              "', but it would have to travel dense in another process group; use a new TopKEFState, and capture again");
  const bool looks = may_come_back();
  if (looks) give_report(*bucket, buffer.device());
  try {
    device_stream_->run([&] {
      note_dense(bucket, request, process_group.getSize());
      or_mark_failed(*bucket, [&] {
        at::Tensor sent = begin_dense(*bucket, request, process_group.getSize());
        const WorkPtr work = start_all_reduce(process_group, sent);
        unsent.all_begun();
        work->wait();
        if (!sent.is_same(buffer)) buffer.copy_(sent);
        if (!looks) return;
        const at::Tensor bad = is_non_finite(buffer).to(at::kInt).reshape({1});
        auto* flag = const_cast<uint32_t*>(bucket->report->step_is_bad());
        at::from_blob(flag, {1}, bad.options()).bitwise_or_(bad);
      });
    });
  } catch (const std::exception& error) {
    std::rethrow_exception(failed_exchange({bucket, step_, process_group.getRank(), process_group.getSize()}, error));
  }
}

// ---- what the device has found out

void Engine::give_report(Bucket& bucket, c10::Device device) {
  if (bucket.report != nullptr) return;
  if (!bucket.is_independent() && device_report_ == nullptr) device_report_ = new_report(device);
  bucket.report = bucket.is_independent() ? new_report(device) : device_report_;
}

std::shared_ptr<DeviceReport> Engine::new_report(c10::Device device) {
  for (const auto& report : reports_) {
    if (report.use_count() > 1) continue;
    report->clear(device_stream_->handle());
    return report;
  }
  reports_.push_back(std::make_shared<DeviceReport>(device, device_stream_->handle()));
  return reports_.back();
}

// A payload that was not what it should be: its bucket became NaN, its step is bad, and this is when the host hears of it. In words, of
// one rank; empty = of none.
std::string Engine::take_reports() {
  if (device_stream_ == nullptr) return {};
  const c10::DeviceGuard guard(device_);
  uint32_t bad_rank = 0;
  for (const auto& report : reports_) {
    const uint32_t found = report->take_bad_rank(device_stream_->handle());
    if (found != 0 && (bad_rank == 0 || found < bad_rank)) bad_rank = found;
  }
  if (bad_rank == 0) return {};
  return "compressed_ddp: an earlier payload of rank " + std::to_string(bad_rank - 1) +
         " was not what this rank expected; its bucket became NaN on every rank. That rank loaded another checkpoint, was reset or "
         "rolled forward alone, or runs another version. Nothing is lost here: state.state_dict() can still be saved; then restart "
         "from the last checkpoint";
}

// The steps that they are about are no part of this state any more.
void Engine::clear_reports() {
  if (device_stream_ == nullptr) return;
  const c10::DeviceGuard guard(device_);
  for (const auto& report : reports_) report->clear(device_stream_->handle());
}

// What the last step sent is spent, or comes back; the device decides unless the host already knows (`all`: rollback, which leaves the
// flags as they are: buckets of the same step may still come).
void Engine::settle_device(bool all) {
  if (device_stream_ == nullptr || step_buckets_.empty()) return;
  DeviceStream::Scope scope(*device_stream_);
  std::set<std::shared_ptr<DeviceReport>> reports;
  for (const auto& bucket : step_buckets_) {
    if (!bucket->key().on_device || bucket->report == nullptr) continue;
    // Whether a taken residual is put back or freed is the host's doing: the step behind waits for the flag, once.
    const bool comes_back =
        all || gives_back(*bucket) || (bucket->has_taken() && bucket->report->read_step_is_bad(device_stream_->handle()));
    bucket->restore(comes_back ? nullptr : bucket->report->step_is_bad());
    bucket->forget_sent();
    reports.insert(bucket->report);
  }
  if (all) return scope.join(); // a replay that comes next runs on the caller's stream
  for (const auto& report : reports) report->clear_step(device_stream_->handle());
}

// For state_dict(): as settle_device, but a good step stays open for rollback(). Waits for the device. Keeps nothing of what it hears
// on the host: replays of a CUDA graph would not forget it.
void Engine::settle_device_now() {
  if (device_stream_ == nullptr) return;
  const DeviceStream::Scope scope(*device_stream_);
  std::map<std::shared_ptr<DeviceReport>, bool> is_bad;
  for (const auto& bucket : step_buckets_)
    if (bucket->report != nullptr && !is_bad.contains(bucket->report))
      is_bad[bucket->report] = bucket->report->read_step_is_bad(device_stream_->handle());
  for (const auto& bucket : step_buckets_)
    if (bucket->key().on_device && bucket->report != nullptr && (is_bad[bucket->report] || gives_back(*bucket))) {
      bucket->restore();
      bucket->forget_sent();
    }
  device_stream_->synchronize();
}

// One wait for all buckets. Replays of a CUDA graph run on the caller's stream; else what that holds is not waited for.
void Engine::read_device_statistics() {
  if (device_stream_ == nullptr || step_buckets_.empty()) return;
  const c10::DeviceGuard guard(device_);
  std::optional<DeviceStream::Scope> behind_replays;
  if (std::any_of(step_buckets_.begin(), step_buckets_.end(), [](const auto& bucket) { return bucket->captured; }))
    behind_replays.emplace(*device_stream_);
  const cudaStream_t stream = device_stream_->handle();
  int64_t count = 0; // at least one place for each bucket
  for (const auto& bucket : step_buckets_) count += std::max<int64_t>(1, bucket->num_statistics());
  const size_t bytes = static_cast<size_t>(count) * sizeof(cuda::SelectStatistics);
  if (statistics_ == nullptr || statistics_->size() < bytes) statistics_ = std::make_unique<PinnedBytes>(device_, 2 * bytes);
  auto* to = statistics_->at<cuda::SelectStatistics>();
  for (const auto& bucket : step_buckets_) {
    if (bucket->last.dense && bucket->dense_norm.defined())
      cuda::check(cudaMemcpyAsync(to, bucket->dense_norm.const_data_ptr(), sizeof(float), cudaMemcpyDeviceToHost, stream),
                  "reading a norm");
    else if (bucket->key().on_device && !bucket->last.dense)
      bucket->copy_statistics(to);
    to += std::max<int64_t>(1, bucket->num_statistics());
  }
  device_stream_->synchronize();
  to = statistics_->at<cuda::SelectStatistics>();
  for (const auto& bucket : step_buckets_) {
    if (bucket->last.dense && bucket->dense_norm.defined()) {
      float norm = 0;
      std::memcpy(&norm, to, sizeof norm);
      bucket->last.gradient_sq = bucket->last.sent_sq = double{norm} * norm;
    } else if (bucket->key().on_device && !bucket->last.dense) {
      bucket->take_statistics(to);
    }
    to += std::max<int64_t>(1, bucket->num_statistics());
  }
}

} // namespace compressed_ddp
