#include "residuals.h"

#include <ATen/ops/all.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace compressed_ddp {
namespace {

std::string shape_text(c10::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

std::vector<int64_t> row_major_strides(c10::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// How a parameter lies in a bucket: the same rule as the reducer's bucket views.
std::vector<int64_t> bucket_strides(const at::Tensor& parameter) {
  return parameter.is_non_overlapping_and_dense() ? parameter.strides().vec() : row_major_strides(parameter.sizes());
}

// The memory order may have changed since the parameter was bound: net.to(memory_format=...).
std::vector<int64_t> strides_now(const Entry& entry) {
  if (entry.parameter.has_value())
    if (const auto parameter = entry.parameter->lock()) return bucket_strides(at::Tensor(parameter));
  return entry.strides;
}

} // namespace

EntryPtr ResidualStore::make_entry(const at::Tensor& parameter) {
  auto entry = std::make_shared<Entry>();
  entry->ordinal = next_ordinal_++;
  entry->parameter = c10::weak_intrusive_ptr<c10::TensorImpl>(parameter.getIntrusivePtr());
  entry->sizes = parameter.sizes().vec();
  entry->strides = bucket_strides(parameter);
  entry->numel = parameter.numel();
  entry->segment_numels = {entry->numel};
  entry->is_vector = parameter.dim() <= 1;
  return entry;
}

at::Tensor Entry::shaped_residual() const { return is_shard ? residual : residual.as_strided(sizes, strides); }

void ResidualStore::bind(const std::vector<NamedParameter>& parameters) {
  if (bound_) {
    bool same = true;
    size_t known = 0;
    for (const auto& [impl, entry] : by_parameter_) known += !entry->name.empty();
    same = known == parameters.size();
    for (const NamedParameter& item : parameters) {
      const EntryPtr entry = find_parameter(item.parameter);
      same = same && entry != nullptr && entry->name == item.name;
    }
    TORCH_CHECK_VALUE(same,
                      "TopKEFState: this state already serves another model: one state serves one model, because its residuals belong to "
                      "that model's parameters; create a second TopKEFState");
    return;
  }
  for (const NamedParameter& item : parameters) TORCH_CHECK_VALUE(!item.name.empty(), "TopKEFState: a parameter has an empty name");
  // Parameters that came through the hook before their names did must all be among the named ones.
  std::unordered_map<const c10::TensorImpl*, const NamedParameter*> named;
  for (const NamedParameter& item : parameters) named.emplace(item.parameter.unsafeGetTensorImpl(), &item);
  for (const auto& [impl, entry] : by_parameter_)
    TORCH_CHECK_VALUE(named.contains(impl), "TopKEFState: this state already serves another model: a parameter of shape ",
                      shape_text(entry->sizes), " that it has compressed is not among the named parameters; create a second TopKEFState");
  for (const NamedParameter& item : parameters) {
    EntryPtr& entry = by_parameter_[item.parameter.unsafeGetTensorImpl()];
    if (entry == nullptr) entry = make_entry(item.parameter);
    if (!entry->name.empty()) continue; // a tied parameter: the first of its names counts
    TORCH_CHECK_VALUE(by_name_.emplace(item.name, entry).second, "TopKEFState: the name '", item.name, "' is used twice");
    entry->name = item.name;
    entry->exempt = item.exempt;
  }
  for (auto& [name, entry] : by_name_) take_waiting(*entry);
  bound_ = true;
}

EntryPtr ResidualStore::find_parameter(const at::Tensor& parameter) const {
  const auto found = by_parameter_.find(parameter.unsafeGetTensorImpl());
  return found == by_parameter_.end() ? nullptr : found->second;
}

EntryPtr ResidualStore::of_parameter(const at::Tensor& parameter) {
  if (EntryPtr entry = find_parameter(parameter)) return entry;
  TORCH_CHECK_VALUE(!bound_, "TopKEFState: a parameter of shape ", shape_text(parameter.sizes()),
                    " is not among the parameters that this state is bound to: one state serves one model; create a second TopKEFState, or "
                    "bind the state to the model that is trained");
  return by_parameter_.emplace(parameter.unsafeGetTensorImpl(), make_entry(parameter)).first->second;
}

EntryPtr ResidualStore::of_name(const std::string& name, const std::vector<int64_t>& sizes, const std::vector<int64_t>& segment_numels,
                                bool exempt) {
  TORCH_CHECK_VALUE(!name.empty(), "all_reduce_: expected a non-empty name, which identifies the tensor's residual from step to step");
  const auto found = by_name_.find(name);
  if (found != by_name_.end()) {
    const EntryPtr& entry = found->second;
    TORCH_CHECK_VALUE(!entry->parameter.has_value(), "all_reduce_: the name '", name,
                      "' belongs to a parameter of the bound model; use another name");
    TORCH_CHECK_VALUE(entry->sizes == sizes && entry->segment_numels == segment_numels, "all_reduce_: the name '", name,
                      "' stands for a tensor of shape ", shape_text(entry->sizes), " in ", entry->segment_numels.size(),
                      " segments, but now has shape ", shape_text(sizes), " in ", segment_numels.size(),
                      " segments; use another name, or state.reset()");
    return entry;
  }
  auto entry = std::make_shared<Entry>();
  entry->ordinal = next_ordinal_++;
  entry->name = name;
  entry->sizes = sizes;
  entry->strides = row_major_strides(sizes);
  entry->segment_numels = segment_numels;
  entry->exempt = exempt;
  for (const int64_t numel : segment_numels) entry->numel += numel;
  take_waiting(*entry);
  by_name_.emplace(name, entry);
  return entry;
}

void ResidualStore::ensure_residual(Entry& entry, c10::Device device) {
  if (entry.residual.defined()) {
    if (entry.residual.device() != device) entry.residual = entry.residual.to(device);
    return;
  }
  entry.strides = strides_now(entry);
  const Shard shard = shard_.value_or(Shard{});
  entry.is_shard = shard_.has_value();
  entry.residual_begin = shard.begin(entry.numel);
  entry.residual = at::zeros({shard.numel_of(entry.numel)}, at::TensorOptions().dtype(at::kFloat).device(device));
}

bool ResidualStore::has_residuals() const {
  const auto has = [](const auto& item) { return item.second->residual.defined(); };
  return has_waiting() || std::any_of(by_parameter_.begin(), by_parameter_.end(), has) ||
         std::any_of(by_name_.begin(), by_name_.end(), has);
}

void ResidualStore::set_shard(const Shard& shard) {
  shard_is_settled_ = true;
  if (shard_.value_or(Shard{}) == shard) return;
  const Shard before = shard_.value_or(Shard{});
  TORCH_CHECK_VALUE(!has_residuals(), "TopKEFState: this rank keeps shard ", before.index, " of ", before.count,
                    " of the residuals, but its place in its node now asks for shard ", shard.index, " of ", shard.count,
                    "; go on with the exchange and the ranks_per_node that they were saved with, or start without residuals");
  shard_ = shard.count == 1 ? std::nullopt : std::optional(shard);
}

ShardPlace ResidualStore::place_of(const Entry& entry) const {
  const Shard shard = shard_.value_or(Shard{});
  return {entry.name, shard.begin(entry.numel), shard.end(entry.numel), entry.sizes, entry.strides};
}

std::vector<ShardPlace> ResidualStore::shard_places() const {
  std::vector<ShardPlace> places;
  for (const auto& [name, entry] : by_name_)
    if (entry->residual.defined()) places.push_back(place_of(*entry));
  for (const auto& [name, place] : waiting_places_) places.push_back(place);
  return places;
}

// A residual that was loaded, when its parameter is known.
void ResidualStore::check_loaded(const Entry& entry, const at::Tensor& residual) const {
  const std::string who = "TopKEFState.load_state_dict: the residual of '" + entry.name + "' ";
  const auto place = waiting_places_.find(entry.name);
  if (place == waiting_places_.end()) {
    TORCH_CHECK_VALUE(residual.sizes() == c10::IntArrayRef(entry.sizes), who, "has shape ", shape_text(residual.sizes()),
                      " but the parameter has shape ", shape_text(entry.sizes), "; load a state of the same model");
    return;
  }
  ShardPlace expected = place_of(entry);
  expected.strides = strides_now(entry);
  const ShardPlace& got = place->second;
  TORCH_CHECK_VALUE(got.sizes == expected.sizes, who, "is of a parameter of shape ", shape_text(got.sizes), " but the parameter has shape ",
                    shape_text(expected.sizes), "; load a state of the same model");
  TORCH_CHECK_VALUE(
      got.strides == expected.strides, who, "was saved of a parameter with strides ", shape_text(got.strides),
      " but the parameter has strides ", shape_text(expected.strides),
      "; a shard follows the memory format: bring the model into the one that it was saved in before this state is bound to it");
  TORCH_CHECK_VALUE(
      got.begin == expected.begin && got.end == expected.end && residual.dim() == 1 && residual.numel() == got.end - got.begin, who,
      "is said to hold entries ", got.begin, " to ", got.end, " and has shape ", shape_text(residual.sizes()),
      ", but this rank keeps entries ", expected.begin, " to ", expected.end, "; load this rank's own file");
}

void ResidualStore::take_waiting(Entry& entry) {
  const auto found = waiting_.find(entry.name);
  if (found == waiting_.end()) return;
  check_loaded(entry, found->second);
  ensure_residual(entry, entry.residual.defined() ? entry.residual.device() : at::kCPU);
  entry.shaped_residual().copy_(found->second);
  waiting_.erase(found);
  waiting_places_.erase(entry.name);
}

std::vector<std::pair<std::string, at::Tensor>> ResidualStore::export_residuals() const {
  for (const auto& [impl, entry] : by_parameter_)
    TORCH_CHECK_VALUE(!entry->name.empty(),
                      "TopKEFState.state_dict: the parameters have no names yet, and residuals are saved by name; call state.bind(model), "
                      "or pass named_parameters=model.named_parameters()");
  std::vector<std::pair<std::string, at::Tensor>> residuals;
  for (const auto& [name, entry] : by_name_)
    if (entry->residual.defined()) residuals.emplace_back(name, entry->shaped_residual().clone(at::MemoryFormat::Contiguous));
  for (const auto& [name, residual] : waiting_) residuals.emplace_back(name, residual.clone());
  return residuals;
}

void ResidualStore::import_residuals(const std::vector<std::pair<std::string, at::Tensor>>& residuals, const std::optional<Shard>& shard,
                                     const std::vector<ShardPlace>& places) {
  const Shard given = shard.value_or(Shard{}), kept = shard_.value_or(Shard{});
  TORCH_CHECK_VALUE(!shard_is_settled_ || residuals.empty() || given == kept, "TopKEFState.load_state_dict: the state holds shard ",
                    given.index, " of ", given.count, " of the residuals, but this rank keeps shard ", kept.index, " of ", kept.count,
                    "; go on with the exchange and the ranks_per_node that they were saved with, or start without residuals");
  const std::optional<Shard> shard_before = shard_;
  const std::map<std::string, ShardPlace> places_before = std::exchange(waiting_places_, {});
  if (!shard_is_settled_ && !residuals.empty()) shard_ = shard;
  for (const ShardPlace& place : places) waiting_places_.emplace(place.name, place);
  try {
    check_residuals(residuals);
  } catch (...) { // nothing has changed
    shard_ = shard_before;
    waiting_places_ = places_before;
    throw;
  }
  const std::map<std::string, ShardPlace> places_now = waiting_places_;
  reset();
  waiting_places_ = places_now;
  for (const auto& [name, residual] : residuals)
    waiting_.insert_or_assign(name, residual.detach().to(at::kCPU).clone(at::MemoryFormat::Contiguous));
  for (auto& [name, entry] : by_name_) take_waiting(*entry);
}

void ResidualStore::check_residuals(const std::vector<std::pair<std::string, at::Tensor>>& residuals) const {
  for (const auto& [name, residual] : residuals) {
    TORCH_CHECK_VALUE(residual.scalar_type() == at::kFloat, "TopKEFState.load_state_dict: expected the residual of '", name,
                      "' as float32, got ", residual.scalar_type());
    TORCH_CHECK_VALUE(residual.isfinite().all().item<bool>(), "TopKEFState.load_state_dict: the residual of '", name,
                      "' holds Inf or NaN, which would stay for ever; the file is damaged, start without residuals");
    const auto found = by_name_.find(name);
    if (found != by_name_.end()) check_loaded(*found->second, residual);
  }
}

void ResidualStore::reset() {
  waiting_.clear();
  waiting_places_.clear();
  const auto clear = [](Entry& entry) {
    entry.residual.reset();
    entry.residual_begin = 0;
    entry.last_step = -1;
    entry.was_compressed = false;
  };
  for (auto& [impl, entry] : by_parameter_) clear(*entry);
  // Names given to all_reduce_ are forgotten; the names of parameters stay.
  std::erase_if(by_name_, [](const auto& item) { return !item.second->parameter.has_value(); });
}

void ResidualStore::forget_steps() {
  for (auto& [impl, entry] : by_parameter_) entry->last_step = -1;
  for (auto& [name, entry] : by_name_) entry->last_step = -1;
}

} // namespace compressed_ddp
