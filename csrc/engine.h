// The engine behind one TopKEFState: which step it is, which bucket this is, whether the ranks agree, and what happens when
// something fails. Both entries (Python hook, C++ hook) and all_reduce_ end in `reduce`. Holds no Python object but the results of
// the last step, and no strong reference to a process group.
#pragma once

#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/comm.hpp>

#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "agreement.h"
#include "bucket.h"
#include "exchange_auto.h"
#include "launch_order.h"
#include "residuals.h"
#include "stages_cpu.h"
#if COMPRESSED_DDP_CUDA
#include "device_stream.h"
#endif

namespace compressed_ddp {

struct EngineOptions {
  double density = 0.01;                          // unused when density_of_step is set
  std::function<double(int64_t)> density_of_step; // a callable density; may take the GIL
  Scope scope = Scope::kTensor;
  ValueFormat value_format = ValueFormat::kBFloat16;
  std::optional<ExchangeKind> exchange; // none: default_exchange
  struct Auto {                         // of kAuto
    std::optional<ExchangeKind> sparse; // kAllGather or kSplit; none: default_exchange
    ExchangeKind dense = ExchangeKind::kDense;
  } automatic;
  int64_t ranks_per_node = 0; // hierarchical; 0 = find_ranks_per_node
  // A new group of some ranks of a group, for tensors of a device type; made by all of them in the same order. May take the GIL.
  using ProcessGroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;
  std::function<ProcessGroupPtr(const ProcessGroupPtr&, const std::vector<int64_t>& ranks, c10::DeviceType)> make_group;
  // Called by all ranks of a group, which hear the same. May take the GIL.
  std::function<int64_t(const ProcessGroupPtr&)> find_ranks_per_node;
  std::function<ExchangeCosts(const ProcessGroupPtr&, c10::Device)> measure_costs; // as find_ranks_per_node
  std::function<void(const ExchangeChoice&)> note_choice;                          // when it is made. May take the GIL
  bool error_feedback = true;
  int64_t dense_steps = 2;
  int64_t min_compress_numel = 1024;
  bool exempt_needs_names = false; // the user gave exempt rules: they mean nothing before names are known
};

struct Metrics {              // of the last completed step; the keys of TopKEFState.metrics()
  SentBytes bytes_sent;       // in collectives of gradients
  double agreement_bytes = 0; // sent by comparisons of the ranks
  double dense_bytes = 0;
  double gradient_bytes = 0;
  double payload_bytes = 0;
  double gradient_norm = 0;
  double residual_norm = 0;
  double captured_energy = 0;
  int64_t step = -1;
};

class Engine {
 public:
  explicit Engine(EngineOptions options);

  const EngineOptions& options() const { return options_; }
  ResidualStore& residuals() { return residuals_; }

  void set_process_group(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
  bool has_process_group() const; // and it still exists

  // Averages `buffer` in place over the ranks. The future completes with `result` (a tensor, or a Python object that stands for it).
  // Every error, of whatever kind, arrives through the future; none is thrown.
  c10::intrusive_ptr<c10::ivalue::Future> reduce_bucket(c10d::GradBucket& bucket, c10::IValue result, c10::TypePtr result_type);
  c10::intrusive_ptr<c10::ivalue::Future> reduce_named(at::Tensor buffer, const std::string& name, const std::vector<int64_t>& sizes,
                                                       const std::vector<int64_t>& segment_numels, bool exempt, c10::IValue result,
                                                       c10::TypePtr result_type);
  // buffer = the parameters' gradients one after another (in each parameter's bucket order), then one 0/1 entry per parameter.
  c10::intrusive_ptr<c10::ivalue::Future> reduce_parameters(at::Tensor buffer, const std::vector<at::Tensor>& parameters,
                                                            const std::vector<uint8_t>& unused, c10::IValue result,
                                                            c10::TypePtr result_type);

  void bind(const std::vector<NamedParameter>& parameters);
  int64_t completed_steps(); // synchronised steps begun so far
  void rollback();           // the last step was not applied: restore what it sent
  void reset();
  std::vector<std::pair<std::string, at::Tensor>> export_residuals();
  void load(int64_t step, const std::vector<std::pair<std::string, at::Tensor>>& residuals, const std::optional<Shard>& shard,
            const std::vector<ShardPlace>& places);
  std::optional<Shard> shard() const;           // of the residuals that this rank keeps; none: all of them
  std::vector<ShardPlace> shard_places() const; // of what export_residuals shows
  std::optional<ExchangeCosts> costs() const;   // of auto, as soon as they are known
  void use_costs(const ExchangeCosts& costs);   // instead of measured ones; choices that were made are made anew
  std::vector<ExchangeChoice> choices() const;  // of auto, in the order of names
  Metrics metrics();
  bool has_compressed() const;
  bool is_bound() const;
  bool is_compressed(const at::Tensor& parameter) const; // some step has selected from it

  // The last results are Python objects when the Python entry is used: free them while the GIL is held.
  void drop_results();

  // Why a failed future failed, in words: used by callbacks, so it may not touch the engine.
  struct Place {
    std::shared_ptr<Bucket> bucket;
    int64_t step;
    int rank;
    int world_size;
  };

 private:
  // What callbacks on the process group's threads touch. They share it, so that none of them can be the last owner of the engine.
  struct Progress {
    std::mutex mutex;
    std::condition_variable idle;
    int64_t in_flight = 0;
    bool step_is_bad = false; // some bucket of the current step failed or was non-finite: the optimizer will not use this step
  };

  struct Request {
    at::Tensor buffer;
    std::vector<EntryPtr> entries;
    std::vector<uint8_t> unused; // per entry
    int64_t presence_numel = 0;
    bool known = false; // its entries are this engine's
    bool begun = false; // it belongs to the current step
    c10::IValue result;
    c10::intrusive_ptr<c10::ivalue::Future> future;
  };

  template <typename Fill>
  c10::intrusive_ptr<c10::ivalue::Future> run(Fill&& fill, at::Tensor buffer, c10::IValue result, c10::TypePtr result_type);
  void reduce(Request& request);
  void mark_failed(const Request& request);
  void reduce_through_host(const Request& request, const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
  void reduce_sparse(const std::shared_ptr<Bucket>& bucket, const Request& request,
                     const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
  void reduce_dense(const std::shared_ptr<Bucket>& bucket, const Request& request,
                    const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
#if COMPRESSED_DDP_CUDA // engine_device.cpp
  DeviceStream& device_stream(c10::Device device);
  void reduce_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request,
                        const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
  void sparse_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request,
                        const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
  void dense_on_device(const std::shared_ptr<Bucket>& bucket, const Request& request, c10d::ProcessGroup& process_group);
  void check_capture(Request& request, c10d::ProcessGroup& process_group);
  void check_not_captured(const char* what) const;
  StageMaker stages_on_device(c10::Device device, GradientType type, const std::shared_ptr<DeviceReport>& report);
  std::shared_ptr<DeviceReport> new_report(c10::Device device);
  void give_report(Bucket& bucket, c10::Device device);
  std::string take_reports();
  void clear_reports();
  void settle_device(bool all);
  void settle_device_now();
  void read_device_statistics();
#endif
  // From here on the other ranks wait for this bucket's collectives: if an exception comes before all_begun, no later one may begin on this
  // rank.
  class Unsent {
   public:
    Unsent(bool& order_is_lost, int64_t world_size)
        : order_is_lost_(order_is_lost), has_peers_(world_size > 1), exceptions_(std::uncaught_exceptions()) {}
    ~Unsent() { order_is_lost_ = order_is_lost_ || (has_peers_ && std::uncaught_exceptions() > exceptions_); }
    void all_begun() { has_peers_ = false; } // none waits any more
    Unsent(const Unsent&) = delete;
    Unsent& operator=(const Unsent&) = delete;

   private:
    bool& order_is_lost_;
    bool has_peers_;
    int exceptions_;
  };
  void note_sparse(const std::shared_ptr<Bucket>& bucket, const Request& request, int64_t world_size);
  void mark_failed(Bucket& bucket); // what this step has taken out of its residual goes back
  // For what follows note_sparse or note_dense.
  template <typename Function>
  auto or_mark_failed(Bucket& bucket, Function&& function) {
    try {
      return function();
    } catch (...) {
      mark_failed(bucket);
      throw;
    }
  }
  // A dense bucket, behind note_dense: the gradient, with residuals, in the type in which it travels; divided, so that its sum is the
  // average.
  at::Tensor begin_dense(Bucket& bucket, const Request& request, int64_t world_size);
  void note_dense(const std::shared_ptr<Bucket>& bucket, const Request& request, int64_t world_size);
  bool may_come_back() const; // something that some bucket of this step sends
  struct Run;                 // engine_exchange.cpp
  void start(std::shared_ptr<Run> run, const Request& request);
  using Groups = std::vector<c10::weak_intrusive_ptr<c10d::ProcessGroup>>; // of every collective of an exchange
  const Groups& groups(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group, const Bucket& bucket, c10::DeviceType device_type);
  Groups make_groups(const c10::intrusive_ptr<c10d::ProcessGroup>& process_group, bool one_for_each, c10::DeviceType device_type);
  ExchangeKind exchange_kind(int64_t world_size) const; // of payloads
  ExchangeKind dense_kind() const;                      // of buckets that are dense behind the dense steps
  static void check_ranks_per_node(int64_t count, int64_t world_size);
  bool travels_dense(const std::shared_ptr<Bucket>& bucket, const Request& request,
                     const c10::intrusive_ptr<c10d::ProcessGroup>& process_group);
  ExchangeKind choose(const std::shared_ptr<Bucket>& bucket, const c10::intrusive_ptr<c10d::ProcessGroup>& process_group,
                      c10::Device device);
  Bucket::Plan plan_of(c10d::ProcessGroup& process_group, double density) const;
  StageMaker stages_on_cpu(ExchangeKind kind);
  void begin_step_if_repeated(Request& request);
  void check_entries(const Request& request) const;
  void check_one_model(const c10d::GradBucket& bucket, const std::vector<at::Tensor>& parameters);
  bool repeats(const Request& request) const; // it begins a new step
  std::shared_ptr<Bucket> find_bucket(const Request& request) const;
  std::shared_ptr<Bucket> bucket_of(const Request& request);
  double density_of_current_step();
  void agree(const std::shared_ptr<Bucket>& bucket, c10d::ProcessGroup& process_group, c10::Device device);
  void wait_until_idle();
  bool gives_back(const Bucket& bucket) const; // with the progress mutex held
  void settle();
  Metrics current_metrics() const;
  bool is_ever_dense() const { return options_.exchange.has_value() && is_dense(*options_.exchange); }
  bool is_dense_step() const { return step_ < options_.dense_steps || is_ever_dense(); }
  at::ScalarType dense_type(GradientType type) const; // in which a bucket of this type travels that is dense in this step

  // One public call at a time; callbacks never take it. Recursive, because a callable density may ask the state for its step or metrics.
  mutable std::recursive_mutex mutex_;
  EngineOptions options_;
  ResidualStore residuals_;
  c10::weak_intrusive_ptr<c10d::ProcessGroup> process_group_;
  std::map<bool, Groups> groups_;      // by whether the CUDA stages run; those that are no process_group_ belong to whoever made them
  int64_t ranks_per_node_ = 0;         // hierarchical: as soon as it is known
  bool costs_are_measured_ = false;    // for this process group
  std::optional<ExchangeCosts> costs_; // auto: as soon as they are known
  std::map<uint64_t, ExchangeChoice> choices_; // auto: by identity of the bucket
  LaunchOrders launch_orders_;
  bool order_is_lost_ = false; // of the collectives that the hook begins: some bucket of this rank never began its first
  SelectScratch scratch_;
  std::multimap<const Entry*, std::shared_ptr<Bucket>> buckets_; // by first entry
  std::shared_ptr<Progress> progress_ = std::make_shared<Progress>();

#if COMPRESSED_DDP_CUDA
  std::unique_ptr<DeviceStream> device_stream_; // of the first bucket's device
  c10::Device device_ = at::kCPU;
  std::shared_ptr<DeviceReport> device_report_; // of the model's buckets; named tensors have their own
  // All that were ever made: one that nobody uses any more serves the next bucket, since copies to it may be on their way.
  std::vector<std::shared_ptr<DeviceReport>> reports_;
  std::unique_ptr<PinnedBytes> statistics_; // where metrics() has them copied to
#endif

  int64_t step_ = 0;                                  // index of the current step
  std::vector<std::shared_ptr<Bucket>> step_buckets_; // that came in it, in order
  double density_ = 0;                                // of the current step
  int64_t density_step_ = -1;                         // the step density_ was evaluated for
  bool step_begun_ = false;                           // some bucket of the current step has come
  int64_t agreed_step_ = -1;                          // with a callable density: the step the ranks have compared last
  std::set<uint64_t> agreed_;                         // identities of the buckets that the ranks have compared; survives load(), see there
  double agreement_bytes_ = 0;                        // sent for comparisons in the current step
  bool has_compressed_ = false;
  bool past_dense_steps_ = false; // some bucket has come behind them, sparse or by a choice of auto
  Metrics metrics_;

  std::set<size_t> seen_indices_; // of DDP buckets, to notice a second model when nothing is bound
  bool saw_last_bucket_ = false;
};

// One flag on the tensor's device: some entry is Inf or NaN. By the extremes, which are NaN if any entry is: one pass, where at::isfinite
// makes several over temporaries.
at::Tensor is_non_finite(const at::Tensor& tensor);

// What a failed exchange is reported as. `refused`: the bytes arrived, but are not what this rank expects.
std::exception_ptr failed_exchange(const Engine::Place& place, const std::exception& error, bool refused = false);

} // namespace compressed_ddp
