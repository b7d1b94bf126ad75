#include "engine.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "collectives.h"
#include "gradient_type.h"
#include "wire_format.h"

namespace compressed_ddp {
namespace {

using Future = c10::ivalue::Future;

std::string text_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

bool has_backend(c10d::ProcessGroup& process_group, c10::DeviceType type) {
  try {
    process_group.getBackend(type);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// Records are compared on the host, and so travel as CPU tensors where that is possible.
c10::Device record_device(c10d::ProcessGroup& process_group, c10::Device device) {
  if (has_backend(process_group, at::kCPU)) return at::kCPU;
  TORCH_CHECK(!device.is_cpu(),
              "compressed_ddp: the process group has no backend for CPU tensors, through which these buckets are exchanged; "
              "use init_process_group(backend='cpu:gloo,cuda:nccl')");
  return device;
}

const Entry* first_entry(const std::vector<EntryPtr>& entries) { return entries.empty() ? nullptr : entries.front().get(); }

bool runs_on_device([[maybe_unused]] const at::Tensor& buffer) {
#if COMPRESSED_DDP_CUDA
  return has_cuda_stages(buffer.device());
#else
  return false;
#endif
}

} // namespace

std::exception_ptr failed_exchange(const Engine::Place& place, const std::exception& error, bool refused) {
  const std::string text = text_of(error);
  const auto says = [&](const char* words) { return text.find(words) != std::string::npos; };
  const char* advice = says(kLostOrderWords) ? ": this rank's first error says why. "
                       : !refused ? ". Usually another rank has died or is stalled beyond the process group's timeout: look for the first "
                                    "error in the other ranks' logs. "
                       : says(kRefusedWords) // not that rank's fault
                           ? ". "
                           : ". That rank loaded another checkpoint, was reset or rolled forward alone, or runs another version. ";
  return std::make_exception_ptr(
      std::runtime_error("compressed_ddp: the exchange of the bucket that begins with '" + place.bucket->name() + "' failed at step " +
                         std::to_string(place.step) + " on rank " + std::to_string(place.rank) + " of " + std::to_string(place.world_size) +
                         ": " + text + advice +
                         "Nothing is lost here: what this rank had selected goes back into its residual, so state.state_dict() "
                         "can still be saved; then restart from the last checkpoint."));
}

Engine::Engine(EngineOptions options)
    : options_(std::move(options)), process_group_(c10::intrusive_ptr<c10d::ProcessGroup>()), launch_orders_(new_launch_orders()) {}

ExchangeKind Engine::exchange_kind(int64_t world_size) const {
  if (options_.exchange == ExchangeKind::kAuto) return options_.automatic.sparse.value_or(default_exchange(world_size));
  return options_.exchange.value_or(default_exchange(world_size));
}

ExchangeKind Engine::dense_kind() const {
  return options_.exchange == ExchangeKind::kAuto ? options_.automatic.dense : options_.exchange.value_or(ExchangeKind::kDense);
}

void Engine::check_ranks_per_node(int64_t count, int64_t world_size) {
  TORCH_CHECK_VALUE(count > 0 && world_size % count == 0, "TopKEFState: exchange='hierarchical' needs as many ranks on each node, but ",
                    count, " ranks per node do not divide the world size ", world_size,
                    "; pass another ranks_per_node, or exchange='split'");
}

void Engine::set_process_group(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  const std::lock_guard lock(mutex_);
  process_group_ = c10::weak_intrusive_ptr<c10d::ProcessGroup>(process_group);
  groups_.clear();
  ranks_per_node_ = 0;
  choices_.clear();
  residuals_.release_shard();
  if (costs_are_measured_) costs_.reset();
  costs_are_measured_ = false;
  launch_orders_ = new_launch_orders();
  order_is_lost_ = false;
  agreed_.clear();
}

bool Engine::has_compressed() const {
  const std::lock_guard lock(mutex_);
  return has_compressed_;
}

bool Engine::is_bound() const {
  const std::lock_guard lock(mutex_);
  return residuals_.is_bound();
}

bool Engine::has_process_group() const {
  const std::lock_guard lock(mutex_);
  return !process_group_.expired();
}

// ---- what comes in

template <typename Fill>
c10::intrusive_ptr<Future> Engine::run(Fill&& fill, at::Tensor buffer, c10::IValue result, c10::TypePtr result_type) {
  std::vector<c10::Device> devices;
  if (!buffer.is_cpu()) devices.push_back(buffer.device());
  auto future = c10::make_intrusive<Future>(std::move(result_type), std::move(devices));
  const std::lock_guard lock(mutex_);
  Request request;
  request.buffer = std::move(buffer);
  request.result = std::move(result);
  request.future = future;
  try {
    fill(request);
    request.known = true;
    reduce(request);
  } catch (...) {
    // A bucket of this step that cannot even start: the optimizer will not use the step, so the others have to give back what they
    // sent. (Unless it would have begun a new step, or is another model's: then the step before was a good one.)
    if (request.begun || (request.known && !repeats(request))) mark_failed(request);
    future->setError(std::current_exception());
  }
  return future;
}

c10::intrusive_ptr<Future> Engine::reduce_bucket(c10d::GradBucket& bucket, c10::IValue result, c10::TypePtr result_type) {
  const auto fill = [&](Request& request) {
    const std::vector<at::Tensor> parameters = bucket.getParameters();
    check_one_model(bucket, parameters);
    for (const at::Tensor& parameter : parameters) {
      request.entries.push_back(residuals_.of_parameter(parameter));
      // Not used in this backward pass: DDP will not hand a result to it, so its residual must not be spent.
      request.unused.push_back(!parameter.grad().defined());
    }
  };
  return run(fill, bucket.getBuffer(), std::move(result), std::move(result_type));
}

c10::intrusive_ptr<Future> Engine::reduce_named(at::Tensor buffer, const std::string& name, const std::vector<int64_t>& sizes,
                                                const std::vector<int64_t>& segment_numels, bool exempt, c10::IValue result,
                                                c10::TypePtr result_type) {
  const auto fill = [&](Request& request) { request.entries.push_back(residuals_.of_name(name, sizes, segment_numels, exempt)); };
  return run(fill, std::move(buffer), std::move(result), std::move(result_type));
}

c10::intrusive_ptr<Future> Engine::reduce_parameters(at::Tensor buffer, const std::vector<at::Tensor>& parameters,
                                                     const std::vector<uint8_t>& unused, c10::IValue result, c10::TypePtr result_type) {
  const auto fill = [&](Request& request) {
    for (const at::Tensor& parameter : parameters) request.entries.push_back(residuals_.of_parameter(parameter));
    request.unused = unused;
    request.presence_numel = static_cast<int64_t>(parameters.size());
  };
  return run(fill, std::move(buffer), std::move(result), std::move(result_type));
}

void Engine::check_one_model(const c10d::GradBucket& bucket, const std::vector<at::Tensor>& parameters) {
  // Nothing tells a hook which model a bucket comes from. But one model never shows an index again with parameters that are all
  // new, once its last bucket has been seen; a second model begins with exactly that.
  if (!residuals_.is_bound()) {
    const bool all_new = std::all_of(parameters.begin(), parameters.end(),
                                     [&](const at::Tensor& parameter) { return residuals_.find_parameter(parameter) == nullptr; });
    TORCH_CHECK_VALUE(!(all_new && saw_last_bucket_ && seen_indices_.contains(bucket.getIndex())),
                      "topk_ef_hook: this TopKEFState already serves another model: one state serves one model, because its residuals "
                      "belong to that model's parameters; create a second TopKEFState");
  }
  seen_indices_.insert(bucket.getIndex());
  saw_last_bucket_ = saw_last_bucket_ || bucket.isLast();
}

void Engine::check_entries(const Request& request) const {
  TORCH_CHECK_VALUE(!request.buffer.is_sparse(),
                    "topk_ef_hook: expected a dense bucket, got a sparse gradient (an Embedding with sparse=True); use sparse=False for "
                    "a model that is compressed");
  gradient_type(request.buffer); // a refused bucket must not count as a step
  int64_t numel = request.presence_numel;
  for (const EntryPtr& entry : request.entries) numel += entry->numel;
  TORCH_CHECK_VALUE(numel == request.buffer.numel() && request.buffer.dim() == 1 && request.buffer.is_contiguous(),
                    "compressed_ddp: expected a flat contiguous bucket of ", numel, " entries, got ", request.buffer.sizes(),
                    " with strides ", request.buffer.strides());
  for (const EntryPtr& entry : request.entries) {
    if (!entry->name.empty()) continue;
    TORCH_CHECK_VALUE(!options_.exempt_needs_names,
                      "topk_ef_hook: exempt was given, but the parameters have no names yet, so it cannot be followed; call "
                      "state.bind(model) before training, or pass named_parameters=model.named_parameters() to TopKEFState");
    TORCH_CHECK_VALUE(!residuals_.has_waiting(),
                      "topk_ef_hook: a loaded state waits for the names of the parameters; call state.bind(model) before training, or pass "
                      "named_parameters=model.named_parameters() to TopKEFState");
  }
}

// ---- steps

bool Engine::repeats(const Request& request) const {
  return std::any_of(request.entries.begin(), request.entries.end(), [&](const EntryPtr& entry) { return entry->last_step == step_; });
}

void Engine::begin_step_if_repeated(Request& request) {
  if (repeats(request)) {
    wait_until_idle();
    settle();
    metrics_ = current_metrics();
    ++step_;
    step_buckets_.clear();
    agreement_bytes_ = 0;
  }
  step_begun_ = request.begun = true;
  for (const EntryPtr& entry : request.entries) entry->last_step = step_;
}

double Engine::density_of_current_step() {
  if (!options_.density_of_step) return options_.density;
  if (density_step_ != step_) {
    const double density = options_.density_of_step(step_);
    TORCH_CHECK_VALUE(density > 0.0 && density <= 1.0, "TopKEFState: density(", step_, ") must be in (0, 1], got ", density);
    density_ = density;
    density_step_ = step_;
  }
  return density_;
}

void Engine::wait_until_idle() {
  std::unique_lock lock(progress_->mutex);
  progress_->idle.wait(lock, [&] { return progress_->in_flight == 0; });
}

bool Engine::gives_back(const Bucket& bucket) const { return bucket.failed || (progress_->step_is_bad && !bucket.is_independent()); }

// What the last step sent is now either spent, or goes back because the optimizer did not use it.
void Engine::settle() {
  const std::lock_guard lock(progress_->mutex);
#if COMPRESSED_DDP_CUDA
  settle_device(false);
#endif
  for (const auto& bucket : step_buckets_) {
    if (bucket->key().on_device)
      ; // settle_device
    else if (gives_back(*bucket))
      bucket->restore();
    else
      bucket->forget_sent();
    bucket->failed = false;
    bucket->works.clear(); // a dense step's work holds DDP's bucket
  }
  progress_->step_is_bad = false;
}

// ---- the path

void Engine::reduce(Request& request) {
  check_entries(request);
  const c10::intrusive_ptr<c10d::ProcessGroup> process_group = process_group_.lock();
  TORCH_CHECK(process_group,
              "compressed_ddp: the process group is gone (destroy_process_group was called?); create a new TopKEFState, or a new "
              "process group before the next step");
#if COMPRESSED_DDP_CUDA
  check_capture(request, *process_group); // before anything is enqueued or allocated
  const std::string report = take_reports();
#endif
  begin_step_if_repeated(request);
#if COMPRESSED_DDP_CUDA
  {
    const Unsent unsent(order_is_lost_, process_group->getSize()); // the other ranks hear of it at other buckets
    TORCH_CHECK(report.empty(), report);
  }
#endif
  if (order_is_lost_)
    std::rethrow_exception(failed_exchange({bucket_of(request), step_, process_group->getRank(), process_group->getSize()},
                                           std::runtime_error(kLostOrderWords)));
#if COMPRESSED_DDP_CUDA
  if (has_cuda_stages(request.buffer.device())) return reduce_on_device(bucket_of(request), request, process_group);
#endif
  if (!request.buffer.is_cpu()) return reduce_through_host(request, process_group);
  const std::shared_ptr<Bucket> bucket = bucket_of(request);
  if (travels_dense(bucket, request, process_group)) return reduce_dense(bucket, request, process_group);
  reduce_sparse(bucket, request, process_group);
}

bool Engine::travels_dense(const std::shared_ptr<Bucket>& bucket, const Request& request,
                           const c10::intrusive_ptr<c10d::ProcessGroup>& process_group) {
  if (is_dense_step()) return true;
  if (options_.exchange != ExchangeKind::kAuto) return false;
  agree(bucket, *process_group, request.buffer.device()); // before anything that only some ranks might take part in
  const Unsent unsent(order_is_lost_, process_group->getSize());
  return is_dense(choose(bucket, process_group, request.buffer.device()));
}

// Once for each bucket, by its size and the costs alone.
ExchangeKind Engine::choose(const std::shared_ptr<Bucket>& bucket, const c10::intrusive_ptr<c10d::ProcessGroup>& process_group,
                            c10::Device device) {
  const auto found = choices_.find(bucket->identity_hash());
  if (found != choices_.end()) return found->second.kind;
  if (!costs_.has_value()) {
    TORCH_CHECK(options_.measure_costs, "compressed_ddp: exchange='auto' does not know what exchanges cost");
    costs_ = options_.measure_costs(process_group, device);
    costs_are_measured_ = true;
  }
  const int64_t world_size = process_group->getSize();
  const ExchangeKind sparse = exchange_kind(world_size);
  const int64_t dense_bytes = bucket->numel() * static_cast<int64_t>(c10::elementSize(dense_type(bucket->key().type)));
  const Prediction prediction = predict(*costs_, sparse, world_size, bucket->size(density_of_current_step(), dense_bytes));
  const ExchangeChoice choice{bucket->name(), bucket->numel(), prediction.is_dense() ? dense_kind() : sparse, prediction};
  choices_.emplace(bucket->identity_hash(), choice);
  if (options_.note_choice) options_.note_choice(choice);
  return choice.kind;
}

void Engine::mark_failed(const Request& request) {
  const bool independent = !request.entries.empty() && !request.entries.front()->parameter.has_value();
  if (independent || !step_begun_) return; // its own bucket, if it came so far, has been marked
  const std::lock_guard lock(progress_->mutex);
  progress_->step_is_bad = true;
}

void Engine::mark_failed(Bucket& bucket) {
  const std::lock_guard lock(progress_->mutex);
  bucket.failed = true;
  progress_->step_is_bad = progress_->step_is_bad || !bucket.is_independent();
}

std::shared_ptr<Bucket> Engine::find_bucket(const Request& request) const {
  const GradientType type = gradient_type(request.buffer);
  const auto [begin, end] = buckets_.equal_range(first_entry(request.entries));
  if (begin == end) return nullptr; // before a device is asked what it can run: the first call may come in a capture
  const bool on_device = runs_on_device(request.buffer);
  for (auto found = begin; found != end; ++found)
    if (found->second->key().is(request.entries, request.presence_numel, type, on_device)) return found->second;
  return nullptr;
}

std::shared_ptr<Bucket> Engine::bucket_of(const Request& request) {
  if (std::shared_ptr<Bucket> found = find_bucket(request)) return found;
  // A rebuilt bucket takes its parameters from older ones, which will not come again: their buffers go.
  const std::set<EntryPtr> taken(request.entries.begin(), request.entries.end());
  const auto is_taken = [&](const auto& item) {
    const auto& entries = item.second->key().entries;
    return std::any_of(entries.begin(), entries.end(), [&](const EntryPtr& entry) { return taken.contains(entry); });
  };
  BucketKey key{request.entries, request.presence_numel, gradient_type(request.buffer), runs_on_device(request.buffer)};
#if COMPRESSED_DDP_CUDA
  for (const auto& item : buckets_) {
    if (!is_taken(item)) continue;
    TORCH_CHECK(!item.second->captured, "compressed_ddp: a CUDA graph holds the buffers of the bucket that begins with '",
                item.second->name(), "', but its parameters came in another bucket; use a new TopKEFState for it");
    // The residual is about to move to the host.
    if (item.second->key().on_device && !key.on_device && device_stream_ != nullptr) device_stream_->synchronize();
  }
#endif
  std::erase_if(buckets_, is_taken);
  return buckets_
      .emplace(first_entry(request.entries),
               std::make_shared<Bucket>(std::move(key), options_.scope, options_.value_format, options_.min_compress_numel))
      ->second;
}

// ---- agreement

void Engine::agree(const std::shared_ptr<Bucket>& bucket, c10d::ProcessGroup& process_group, c10::Device device) {
  const uint64_t structure = bucket->structure_hash();
  const bool dense = is_dense_step();
  const bool callable = static_cast<bool>(options_.density_of_step);
  // With a callable density any step may change k, on one rank alone if the callable is wrong; and a dense all-reduce carries no
  // header that could show another step. Then the ranks compare once in every step.
  const bool compare_step = (callable || (dense && !is_ever_dense())) && agreed_step_ != step_; // ever dense: the step is of no importance
  if (agreed_.contains(bucket->identity_hash()) && !compare_step) return;
  const c10::Device where = record_device(process_group, device);

  AgreementRecord record;
  record.wire_version = kWireVersion;
  record.rank = process_group.getRank();
  record.world_size = process_group.getSize();
  record.step = step_;
  record.density = callable && dense ? 0.0 : density_of_current_step();
  record.density_is_callable = callable;
  record.scope = static_cast<int64_t>(options_.scope);
  record.value_format = static_cast<int64_t>(options_.value_format);
  record.exchange = static_cast<int64_t>(options_.exchange.value_or(exchange_kind(record.world_size)));
  if (options_.exchange == ExchangeKind::kAuto) record.exchange = auto_exchange_number(exchange_kind(record.world_size), dense_kind());
  record.ranks_per_node = options_.ranks_per_node;
  if (costs_.has_value()) record.costs_hash = hash_bytes(&*costs_, sizeof *costs_);
  record.error_feedback = options_.error_feedback;
  record.dense_steps = options_.dense_steps;
  record.min_compress_numel = options_.min_compress_numel;
  record.gradient_type = static_cast<int64_t>(bucket->key().type);
  record.numel = bucket->numel();
  record.num_segments = static_cast<int64_t>(bucket->key().entries.size());
  record.structure_hash = structure;
  record.selected_numel = dense ? 0 : bucket->selected_numel(record.density);
  record.model_parameters = residuals_.num_bound();
  record.exempt_hash = record.names_hash = kHashSeed;
  bool named = true;
  for (const EntryPtr& entry : bucket->key().entries) {
    record.exempt_hash = hash_bytes(&entry->exempt, sizeof entry->exempt, record.exempt_hash);
    record.names_hash = hash_bytes(entry->name.c_str(), entry->name.size() + 1, record.names_hash);
    named = named && !entry->name.empty();
  }
  if (!named) record.names_hash = 0;
  bucket->name().copy(record.bucket, sizeof record.bucket - 1);

  at::Tensor mine = at::empty({static_cast<int64_t>(sizeof record)}, at::dtype(at::kByte));
  at::Tensor all = at::empty({record.world_size * static_cast<int64_t>(sizeof record)}, at::dtype(at::kByte));
  std::memcpy(mine.data_ptr<uint8_t>(), &record, sizeof record);
  try {
    at::Tensor gathered = all.to(where);
    all_gather(process_group, mine.to(where), gathered);
    all = gathered.to(at::kCPU);
  } catch (const std::exception& error) {
    std::rethrow_exception(failed_exchange({bucket, step_, process_group.getRank(), process_group.getSize()}, error));
  }
  agreement_bytes_ += all_gather_sent_bytes(record.world_size, sizeof record);
  std::vector<AgreementRecord> records(static_cast<size_t>(record.world_size));
  std::memcpy(records.data(), all.const_data_ptr<uint8_t>(), records.size() * sizeof record);
  const std::string disagreement = describe_disagreement(records);
  TORCH_CHECK(disagreement.empty(), "compressed_ddp: ", disagreement);
  // Not before the ranks have compared it: one that raises by itself lets the others wait.
  if (options_.ranks_per_node > 0) check_ranks_per_node(options_.ranks_per_node, record.world_size);
  agreed_.insert(bucket->identity_hash());
  agreed_step_ = step_;
}

} // namespace compressed_ddp
