// The engine on CUDA: every stage of a bucket enqueued on one stream of its own, in the order of the one data path. docs/streams.md
// has the picture of streams and events; device_stream.h is how they meet torch's.
//
// In the steady state the host waits for nothing (with NCCL; Gloo reads device memory through the host and waits for itself). What
// the host would want to know, the device reports later: a damaged payload at the next call, a bad step as a flag in device memory
// that decides there, at the beginning of the next step, whether what was sent comes back.
#include <c10/util/Exception.h>

#include "engine.h"
#include "exchange.h"

namespace compressed_ddp {

DeviceStream& Engine::device_stream(c10::Device device) {
  if (device_stream_ == nullptr) {
    device_stream_ = std::make_unique<DeviceStream>(device);
    device_ = device;
    device_report_ = std::make_shared<DeviceReport>(device, device_stream_->handle());
  }
  TORCH_CHECK_VALUE(device == device_, "compressed_ddp: expected all buckets of one state on ", device_, ", got one on ", device,
                    "; a model on several devices needs a TopKEFState for each");
  return *device_stream_;
}

void Engine::reduce_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request,
                              const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  DeviceStream& stream = device_stream(request.buffer.device());
  raise_reports();
  const DeviceStream::Scope scope(stream);
  if (stream.is_capturing()) {
    TORCH_CHECK(!is_dense_step(), "compressed_ddp: a CUDA graph cannot hold a dense step (step ", step_,
                " of dense_steps=", options_.dense_steps,
                "), because later steps are not like it; run the dense steps and one compressed step, then capture");
    TORCH_CHECK(!options_.density_of_step,
                "compressed_ddp: a CUDA graph cannot follow a callable density, because a replay repeats the captured k; use a number");
    TORCH_CHECK(
        agreed_.contains(bucket->identity_hash()) && bucket->is_prepared_on_device(options_.density, process_group->getSize(), &residuals_),
        "compressed_ddp: a CUDA graph cannot hold a bucket's first compressed step, which allocates and compares the ranks' "
        "layouts; run one compressed step before the capture");
  }
  if (is_dense_step())
    dense_on_device(bucket, request, *process_group);
  else
    sparse_on_device(bucket, request, *process_group);
  stream.complete(*request.future, request.result, request.buffer);
}

void Engine::sparse_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request, c10d::ProcessGroup& process_group) {
  DeviceStream& stream = *device_stream_;
  const int64_t world_size = process_group.getSize();
  const int rank = process_group.getRank();
  agree(bucket, process_group, request.buffer.device());
  bucket->prepare_on_device(density_of_current_step(), world_size, options_.error_feedback ? &residuals_ : nullptr, request.buffer.device(),
                            stream.handle());
  if (bucket->report == nullptr)
    bucket->report = bucket->is_independent() ? std::make_shared<DeviceReport>(request.buffer.device(), stream.handle()) : device_report_;

  bucket->compensate_select_and_encode_on_device(request.buffer, request.unused, static_cast<uint32_t>(rank), step_, stream.handle());
  DeviceBucket& device = *bucket->on_device();
  note_sparse(bucket, request, world_size, device.payload().numel());
  try {
    stream.before_collective();
    start_all_gather(process_group, device.payload(), device.gathered())->wait(); // NCCL: only the stream waits
  } catch (const std::exception& error) {
    const std::lock_guard lock(progress_->mutex);
    bucket->failed = true;
    progress_->step_is_bad = progress_->step_is_bad || !bucket->is_independent();
    std::rethrow_exception(failed_exchange({bucket, step_, rank, static_cast<int>(world_size)}, error));
  }
  device.decode_apply(request.buffer, step_, *bucket->report, stream.handle());
}

void Engine::dense_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request, c10d::ProcessGroup& process_group) {
  agree(bucket, process_group, request.buffer.device());
  note_dense(bucket, request, process_group.getSize());
  at::Tensor buffer = request.buffer;
  buffer.div_(process_group.getSize()); // before the sum, so that fp16 does not overflow
  try {
    device_stream_->before_collective();
    start_all_reduce(process_group, buffer)->wait();
  } catch (const std::exception& error) {
    std::rethrow_exception(failed_exchange({bucket, step_, process_group.getRank(), process_group.getSize()}, error));
  }
}

// ---- what the device has found out

// A payload that was not what it should be: its bucket became NaN, the step is bad, and this is when the host hears of it.
void Engine::raise_reports() {
  if (device_stream_ == nullptr) return;
  std::set<std::shared_ptr<DeviceReport>> reports{device_report_};
  for (const auto& bucket : step_buckets_)
    if (bucket->report != nullptr) reports.insert(bucket->report);
  for (const auto& report : reports) {
    const uint32_t bad_rank = report->take_bad_rank(device_stream_->handle());
    TORCH_CHECK(bad_rank == 0, "compressed_ddp: an earlier payload of rank ", bad_rank - 1,
                " was not what this rank expected; its bucket became NaN on every rank. That rank loaded another checkpoint, was reset or "
                "rolled forward alone, or runs another version. Nothing is lost here: state.state_dict() can still be saved; then restart "
                "from the last checkpoint");
  }
}

// What the last step sent is spent, or comes back; the device decides unless the host already knows (`all`: rollback).
void Engine::settle_device(bool all) {
  if (device_stream_ == nullptr || step_buckets_.empty()) return;
  const DeviceStream::Scope scope(*device_stream_);
  std::set<std::shared_ptr<DeviceReport>> reports;
  for (const auto& bucket : step_buckets_) {
    if (bucket->on_device() == nullptr || bucket->report == nullptr) continue;
    bucket->restore_on_device(all || gives_back(*bucket) ? nullptr : bucket->report->step_is_bad(), device_stream_->handle());
    reports.insert(bucket->report);
  }
  for (const auto& report : reports) report->clear_step(device_stream_->handle());
}

// For state_dict(): as settle_device, but a good step stays open for rollback(). Waits for the device.
void Engine::settle_device_now() {
  if (device_stream_ == nullptr) return;
  const DeviceStream::Scope scope(*device_stream_);
  for (const auto& bucket : step_buckets_)
    if (bucket->report != nullptr && bucket->report->read_step_is_bad(device_stream_->handle())) bucket->failed = true;
  for (const auto& bucket : step_buckets_)
    if (bucket->on_device() != nullptr && gives_back(*bucket)) bucket->restore_on_device(nullptr, device_stream_->handle());
  device_stream_->synchronize();
}

void Engine::read_device_statistics() {
  if (device_stream_ == nullptr) return;
  for (const auto& bucket : step_buckets_)
    if (bucket->on_device() != nullptr) bucket->read_statistics(device_stream_->handle());
}

} // namespace compressed_ddp
