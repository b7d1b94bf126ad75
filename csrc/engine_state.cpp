// The engine between steps: counting, rolling back, checkpoints, metrics. engine.cpp has the steps themselves.
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "engine.h"

namespace compressed_ddp {

int64_t Engine::completed_steps() {
  const std::lock_guard lock(mutex_);
  return step_ + (step_begun_ ? 1 : 0);
}

void Engine::bind(const std::vector<NamedParameter>& parameters) {
  const std::lock_guard lock(mutex_);
  residuals_.bind(parameters);
}

void Engine::rollback() {
  const std::lock_guard lock(mutex_);
  wait_until_idle();
#if COMPRESSED_DDP_CUDA
  settle_device(true);
#endif
  for (const auto& bucket : step_buckets_)
    if (!bucket->key().on_device) bucket->restore();
}

void Engine::reset() {
  const std::lock_guard lock(mutex_);
#if COMPRESSED_DDP_CUDA
  check_not_captured("reset");
#endif
  wait_until_idle();
#if COMPRESSED_DDP_CUDA
  clear_reports();
#endif
  residuals_.reset();
  buckets_.clear();
  choices_.clear();
  costs_.reset();
  costs_are_measured_ = false;
  step_buckets_.clear();
  agreed_.clear();
  agreed_step_ = density_step_ = -1;
  step_ = 0;
  step_begun_ = has_compressed_ = past_dense_steps_ = progress_->step_is_bad = false;
  agreement_bytes_ = 0;
  metrics_ = {};
}

std::vector<std::pair<std::string, at::Tensor>> Engine::export_residuals() {
  const std::lock_guard lock(mutex_);
  wait_until_idle();
  {
    // Nothing is forgotten yet: a good step stays open for rollback(), a bad one for its buckets that are still to come.
    const std::lock_guard progress_lock(progress_->mutex);
#if COMPRESSED_DDP_CUDA
    settle_device_now();
#endif
    for (const auto& bucket : step_buckets_)
      if (!bucket->key().on_device && gives_back(*bucket)) bucket->restore();
  }
  std::vector<std::pair<std::string, at::Tensor>> residuals = residuals_.export_residuals();
#if COMPRESSED_DDP_CUDA
  // The copies are made on the caller's stream, to which they belong: what the stages write next comes behind them.
  if (device_stream_ != nullptr) {
    const DeviceStream::Scope behind(*device_stream_);
  }
#endif
  return residuals;
}

// Once ranks are past their dense steps, the buckets that they have compared stay compared: if only one rank loads in the middle of a run,
// it must not start a comparison that the others do not take part in. Every payload carries its step (modulo 65536), so all notice at the
// next exchange of payloads; where all buckets travel dense, nothing depends on the step.
void Engine::load(int64_t step, const std::vector<std::pair<std::string, at::Tensor>>& residuals, const std::optional<Shard>& shard,
                  const std::vector<ShardPlace>& places) {
  const std::lock_guard lock(mutex_);
  TORCH_CHECK_VALUE(!(past_dense_steps_ && step < options_.dense_steps),
                    "TopKEFState.load_state_dict: this state is past its dense steps and cannot go back to step ", step,
                    " (dense_steps=", options_.dense_steps, "); call reset() on every rank first");
#if COMPRESSED_DDP_CUDA
  check_not_captured("load_state_dict");
#endif
  wait_until_idle();
  residuals_.import_residuals(residuals, shard, places);
#if COMPRESSED_DDP_CUDA
  clear_reports();
#endif
  if (!past_dense_steps_ && is_dense_step() && !is_ever_dense()) agreed_.clear(); // they meet in a comparison in every step
  residuals_.forget_steps();
  buckets_.clear();
  step_buckets_.clear();
  step_ = step;
  density_step_ = agreed_step_ = -1;
  step_begun_ = progress_->step_is_bad = false;
  agreement_bytes_ = 0;
  metrics_ = {};
}

std::optional<Shard> Engine::shard() const {
  const std::lock_guard lock(mutex_);
  return residuals_.shard();
}

std::vector<ShardPlace> Engine::shard_places() const {
  const std::lock_guard lock(mutex_);
  return residuals_.shard_places();
}

std::optional<ExchangeCosts> Engine::costs() const {
  const std::lock_guard lock(mutex_);
  return costs_;
}

void Engine::use_costs(const ExchangeCosts& costs) {
  const std::lock_guard lock(mutex_);
  costs_ = costs;
  costs_are_measured_ = false;
  choices_.clear();
}

std::vector<ExchangeChoice> Engine::choices() const {
  const std::lock_guard lock(mutex_);
  std::vector<ExchangeChoice> all;
  for (const auto& [identity, choice] : choices_) all.push_back(choice);
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.bucket < b.bucket; });
  return all;
}

Metrics Engine::current_metrics() const {
  Metrics sum;
  double gradient_sq = 0, residual_sq = 0, sent_sq = 0;
  for (const auto& bucket : step_buckets_) {
    const BucketStep& last = bucket->last;
    sum.bytes_sent += last.bytes_sent;
    sum.dense_bytes += last.dense_bytes;
    sum.gradient_bytes += last.gradient_bytes;
    sum.payload_bytes += last.payload_bytes;
    gradient_sq += last.gradient_sq;
    residual_sq += last.residual_sq;
    sent_sq += last.sent_sq;
  }
  sum.agreement_bytes = agreement_bytes_;
  sum.gradient_norm = std::sqrt(gradient_sq);
  sum.residual_norm = options_.error_feedback ? std::sqrt(residual_sq) : 0.0;
  sum.captured_energy = sent_sq + residual_sq > 0 ? sent_sq / (sent_sq + residual_sq) : 1.0;
  sum.step = step_ + 1;
  return sum;
}

Metrics Engine::metrics() {
  const std::lock_guard lock(mutex_);
#if COMPRESSED_DDP_CUDA
  const std::string report = take_reports();
  TORCH_CHECK(report.empty(), report);
  read_device_statistics();
#endif
  const std::lock_guard progress_lock(progress_->mutex);
  // In the middle of a backward pass: the step before. Otherwise the step that has just been reduced.
  return progress_->in_flight > 0 || step_buckets_.empty() ? metrics_ : current_metrics();
}

bool Engine::is_compressed(const at::Tensor& parameter) const {
  const std::lock_guard lock(mutex_);
  const EntryPtr entry = residuals_.find_parameter(parameter);
  return entry != nullptr && entry->was_compressed;
}

void Engine::drop_results() {
  // With the GIL held, so this must not wait: whoever holds the mutex may want the GIL. Later is early enough.
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  for (const auto& [first, bucket] : buckets_) bucket->result = {};
  for (const auto& bucket : step_buckets_) bucket->result = {};
}

} // namespace compressed_ddp
