// Who owns a residual: parameters, by identity and (once known) by name; never a bucket index. (architecture.md, contract 7)
//
// A residual is a flat fp32 tensor in the order in which the parameter lies in a bucket: the parameter's own memory order when it
// is dense and non-overlapping (channels_last included), row-major otherwise. state_dict() shows it in the parameter's shape.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "shard.h"

namespace compressed_ddp {

// One parameter, or one name given to all_reduce_.
struct Entry {
  std::string name;                                                  // empty until names are known
  std::optional<c10::weak_intrusive_ptr<c10::TensorImpl>> parameter; // keeps the address from being reused, not the memory alive
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides; // of `sizes`, in bucket memory
  int64_t numel = 0;
  std::vector<int64_t> segment_numels; // what is selected from separately: one for a parameter
  bool exempt = false;                 // by the user's rule
  bool is_vector = false;              // the 1-D rule
  at::Tensor residual;                 // fp32 [numel of this rank's shard]; undefined until the first compressed step
  bool is_shard = false;               // the residual is of a shard: entries from residual_begin on
  int64_t residual_begin = 0;
  int64_t ordinal = 0;         // in the order in which the store met them
  int64_t last_step = -1;      // the last step in which it came
  bool was_compressed = false; // some step has selected from it

  at::Tensor shaped_residual() const; // a view: in the parameter's shape; of a shard flat
};
using EntryPtr = std::shared_ptr<Entry>;

struct NamedParameter {
  std::string name;
  at::Tensor parameter;
  bool exempt;
};

// Where the shard of a residual lies in its parameter (exchange="hierarchical").
struct ShardPlace {
  std::string name;
  int64_t begin, end; // in memory order, which the strides tell
  std::vector<int64_t> sizes, strides;
};

class ResidualStore {
 public:
  // Names (and the exempt rule) become known. A second call with the same parameters changes nothing; other parameters: ValueError.
  void bind(const std::vector<NamedParameter>& parameters);
  bool is_bound() const { return bound_; }
  int64_t num_bound() const { return bound_ ? static_cast<int64_t>(by_parameter_.size()) : 0; } // tied parameters count once

  // The entry of a parameter; a new one when nothing is bound, ValueError when it is not among the bound ones.
  EntryPtr of_parameter(const at::Tensor& parameter);
  EntryPtr find_parameter(const at::Tensor& parameter) const; // or nullptr
  // The entry of a name given to all_reduce_; ValueError when the numel or segments differ from those seen before.
  EntryPtr of_name(const std::string& name, const std::vector<int64_t>& sizes, const std::vector<int64_t>& segment_numels, bool exempt);

  // Allocates zeros on `device` at first use; moves there what was loaded.
  void ensure_residual(Entry& entry, c10::Device device = at::kCPU);

  // By name, copies, in the parameter's shape; waiting loaded ones included. ValueError when some residual has no name.
  std::vector<std::pair<std::string, at::Tensor>> export_residuals() const;
  // Replaces everything; each waits until its name comes. Shapes are checked then, or now where the name is known. shard, places: of
  // shards, what was true when they were exported.
  void import_residuals(const std::vector<std::pair<std::string, at::Tensor>>& residuals, const std::optional<Shard>& shard,
                        const std::vector<ShardPlace>& places);
  bool has_waiting() const { return !waiting_.empty(); }
  bool has_residuals() const; // of any entry, waiting ones included

  // Which part of every parameter this rank keeps the residual of. ValueError when residuals of another part are there.
  void set_shard(const Shard& shard);
  void release_shard() { shard_is_settled_ = false; } // another process group may ask for another one
  const std::optional<Shard>& shard() const { return shard_; }
  std::vector<ShardPlace> shard_places() const; // of what export_residuals shows

  // Forgets values and the names given to all_reduce_, keeps the names of parameters. Buckets made before must not be used again.
  void reset();
  void forget_steps();

 private:
  void take_waiting(Entry& entry);
  void check_residuals(const std::vector<std::pair<std::string, at::Tensor>>& residuals) const;
  void check_loaded(const Entry& entry, const at::Tensor& residual) const;
  ShardPlace place_of(const Entry& entry) const;

  EntryPtr make_entry(const at::Tensor& parameter);

  int64_t next_ordinal_ = 0;
  std::unordered_map<const c10::TensorImpl*, EntryPtr> by_parameter_;
  std::map<std::string, EntryPtr> by_name_; // ordered, so that state_dict() has a fixed order
  std::map<std::string, at::Tensor> waiting_;
  std::optional<Shard> shard_;                       // none: whole parameters
  bool shard_is_settled_ = false;                    // exchanges go by it: it cannot change
  std::map<std::string, ShardPlace> waiting_places_; // of waiting shards
  bool bound_ = false;
};

} // namespace compressed_ddp
