#include "bucket.h"

#include <ATen/ops/add.h>

#include <algorithm>
#include <utility>

#include "ranges.h"

namespace compressed_ddp {

Bucket::Bucket(BucketKey key, Scope scope, ValueFormat value_format, int64_t min_compress_numel)
    : key_(std::move(key)), scope_(scope), value_format_(value_format) {
  for (size_t e = 0; e < key_.entries.size(); ++e) {
    const Entry& entry = *key_.entries[e];
    int64_t offset = 0;
    for (const int64_t numel : entry.segment_numels) {
      dense_.push_back(entry.exempt || entry.is_vector || numel < min_compress_numel || numel == 0);
      whole_.add(e, offset, numel, dense_.back(), scope_);
      offset += numel;
    }
  }
  if (key_.presence_numel > 0) whole_.add(key_.entries.size(), 0, key_.presence_numel, true, scope_);

  structure_hash_ = hash_bytes(&key_.type, sizeof key_.type);
  for (const Part& part : whole_.parts) {
    const int64_t numbers[] = {static_cast<int64_t>(part.entry), part.numel, part.dense};
    structure_hash_ = hash_bytes(numbers, sizeof numbers, structure_hash_);
  }
  for (const EntryPtr& entry : key_.entries) { // of another shape, or order in memory, an entry is another number on another rank
    const int64_t dims = static_cast<int64_t>(entry->sizes.size());
    structure_hash_ = hash_bytes(&dims, sizeof dims, structure_hash_);
    for (size_t d = 0; d < entry->sizes.size(); ++d) {
      const int64_t numbers[] = {entry->sizes[d], entry->sizes[d] == 1 ? 0 : entry->strides[d]};
      structure_hash_ = hash_bytes(numbers, sizeof numbers, structure_hash_);
    }
  }
  identity_hash_ = structure_hash_;
  for (const EntryPtr& entry : key_.entries) { // neither changes when names become known later, or a state is loaded
    if (entry->parameter.has_value())
      identity_hash_ = hash_bytes(&entry->ordinal, sizeof entry->ordinal, identity_hash_);
    else
      identity_hash_ = hash_bytes(entry->name.c_str(), entry->name.size() + 1, identity_hash_);
  }
}

// Behind what is there already. In scope "chunk" a selection has at most kChunkNumel entries.
void Bucket::Parts::add(size_t entry, int64_t entry_offset, int64_t added, bool dense, Scope scope) {
  const int64_t part_numel = scope == Scope::kChunk && !dense ? kChunkNumel : std::max<int64_t>(added, 1);
  for (int64_t at = 0; at < added || at == 0; at += part_numel)
    parts.push_back({entry, entry_offset + at, numel + at, std::min(part_numel, added - at), dense});
  numel += added;
}

std::string Bucket::name() const {
  if (key_.entries.empty()) return "(empty)";
  const Entry& first = *key_.entries.front();
  if (!first.name.empty()) return first.name;
  std::string text = "a parameter of shape [";
  for (size_t i = 0; i < first.sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(first.sizes[i]);
  return text + "]";
}

int64_t Bucket::selected_numel(double density) const { return make_range(whole_, 0, numel(), density).layout.selected_numel; }

BucketSize Bucket::size(double density, int64_t dense_bytes) const {
  const Layout layout = make_range(whole_, 0, numel(), density).layout;
  return {numel(), layout.selected_numel, payload_bytes(layout), dense_bytes};
}

// ---- ranges

BucketRange Bucket::make_range(const Parts& of, int64_t begin, int64_t end, double density) const {
  BucketRange range{begin, end, {}, {}, {}};
  const bool is_whole = begin == 0 && end == of.numel;
  std::vector<int64_t> numels, groups, group_numels;
  for (const Part& part : of.parts) {
    const int64_t from = std::max(part.begin, begin), to = std::min(part.begin + part.numel, end);
    if (from >= to && !(is_whole && part.numel == 0)) continue;
    numels.push_back(std::max<int64_t>(to - from, 0));
    range.entries.push_back(part.entry);
    if (part.dense) {
      groups.push_back(kDenseGroup);
      continue;
    }
    if (scope_ != Scope::kBucket || group_numels.empty()) group_numels.push_back(0);
    group_numels.back() += to - from;
    groups.push_back(static_cast<int64_t>(group_numels.size()) - 1);
  }
  std::vector<int64_t> k;
  for (const int64_t numel : group_numels) k.push_back(selection_k(density, numel));
  range.layout = Layout::make(numels, groups, k, value_format_);
  return range;
}

std::vector<BucketRange> Bucket::cut(const Parts& of, int64_t count, double density) const {
  std::vector<RangePart> parts;
  for (const Part& part : of.parts) parts.push_back({part.numel, part.dense});
  std::vector<BucketRange> ranges;
  int64_t begin = 0;
  for (const int64_t end : range_ends(parts, count, {density, value_format_, scope_ == Scope::kBucket})) {
    ranges.push_back(make_range(of, begin, end, density));
    begin = end;
  }
  return ranges;
}

int64_t Bucket::payload_bytes_of(const Parts& of, ExchangeKind kind, int64_t members, double density) const {
  if (kind != ExchangeKind::kSplit) return of.numel == 0 ? 0 : payload_bytes(make_range(of, 0, of.numel, density).layout);
  int64_t bytes = 0;
  for (const BucketRange& range : cut(of, members, density)) bytes += range.numel() == 0 ? 0 : payload_bytes(range.layout);
  return bytes;
}

void Bucket::point_at_residuals(const Parts& of, BucketRange& range, ResidualStore& residuals, c10::Device device) const {
  size_t p = 0;
  for (size_t s = 0; s < range.entries.size(); ++s) {
    const Segment& segment = range.layout.segments[s];
    if (segment.group == kDenseGroup) {
      range.residuals.push_back(nullptr);
      continue;
    }
    const int64_t begin = range.begin + segment.offset;
    while (of.parts[p].begin + of.parts[p].numel <= begin) ++p;
    Entry& entry = *key_.entries[range.entries[s]];
    residuals.ensure_residual(entry, device);
    range.residuals.push_back(entry.residual.data_ptr<float>() + (of.parts[p].entry_offset - entry.residual_begin) +
                              (begin - of.parts[p].begin));
  }
}

// The residuals of a shard are ranges of entries, whatever segments those have: a segment's part of the shard is a part here.
Bucket::Parts Bucket::shard_of(const Shard& shard, Dealt* dealt) const {
  Parts parts;
  int64_t bucket_begin = 0; // of the entry
  const auto take = [&](size_t e, int64_t entry_offset, int64_t from, int64_t to, bool dense) {
    if (from >= to) return;
    if (dealt != nullptr) dealt->runs.push_back({shard.index, parts.numel, bucket_begin + from, to - from});
    parts.add(e, entry_offset, to - from, dense, scope_);
  };
  size_t segment = 0;
  for (size_t e = 0; e < key_.entries.size(); ++e) {
    const Entry& entry = *key_.entries[e];
    int64_t begin = 0; // of the segment, in the entry
    for (const int64_t numel : entry.segment_numels) {
      const int64_t from = std::max(begin, shard.begin(entry.numel)), to = std::min(begin + numel, shard.end(entry.numel));
      take(e, from, from, to, dense_[segment++] != 0);
      begin += numel;
    }
    bucket_begin += entry.numel;
  }
  take(key_.entries.size(), 0, shard.begin(key_.presence_numel), shard.end(key_.presence_numel), true);
  return parts;
}

// ---- exchanges

std::unique_ptr<Exchange> Bucket::make_exchange(const Parts& of, ExchangeKind kind, const Members& members, ExchangeTypes types,
                                                const Plan& plan, ResidualStore& residuals, const StageMaker& maker) const {
  const auto with_residuals = [&](BucketRange range) {
    if (plan.error_feedback) point_at_residuals(of, range, residuals, maker.device);
    return range;
  };
  if (kind != ExchangeKind::kSplit)
    return make_all_gather_exchange(with_residuals(make_range(of, 0, of.numel, plan.density)), members, types, maker);
  std::vector<BucketRange> ranges = cut(of, members.count, plan.density);
  for (BucketRange& range : ranges) range = with_residuals(std::move(range));
  return make_split_exchange(std::move(ranges), members, types, maker);
}

std::unique_ptr<Exchange> Bucket::make_hierarchical(const Plan& plan, ResidualStore& residuals, const StageMaker& maker) const {
  const int64_t count = plan.ranks_per_node, index = plan.rank % count, nodes = plan.world_size / count;
  Dealt dealt;
  dealt.num_entries = static_cast<int64_t>(key_.entries.size()) + (key_.presence_numel > 0);
  dealt.numel = numel();
  const Node node{plan.rank - index, {index, count}};
  const ExchangeKind between = default_exchange(nodes);
  Parts own;
  int64_t node_payload_bytes = 0;
  for (int64_t l = 0; l < count; ++l) {
    Parts parts = shard_of({l, count}, &dealt);
    dealt.numels.push_back(parts.numel);
    node_payload_bytes += payload_bytes_of(parts, between, nodes, plan.density);
    if (l == index) own = std::move(parts);
  }
  const Members owners{plan.rank / count, nodes, {index, count}};
  std::unique_ptr<Exchange> exchange;
  if (own.numel > 0) exchange = make_exchange(own, between, owners, {GradientType::kFloat32, key_.type}, plan, residuals, maker);
  return make_hierarchical_exchange(dealt, node, std::move(exchange), num_collectives(between), node_payload_bytes, key_.type, maker);
}

// ---- steps

void Bucket::prepare(const Plan& plan, ResidualStore& residuals, const StageMaker& maker) {
  exchange_.reset();
  exchange_ = plan.kind == ExchangeKind::kHierarchical
                  ? make_hierarchical(plan, residuals, maker)
                  : make_exchange(whole_, plan.kind, all_ranks(plan.rank, plan.world_size), {key_.type, key_.type}, plan, residuals, maker);
  plan_ = plan;
}

void Bucket::begin(const at::Tensor& gradient, const std::vector<uint8_t>& unused, int64_t step) {
  for (const Part& part : whole_.parts)
    if (!part.dense) key_.entries[part.entry]->was_compressed = true;
  exchange_->begin(gradient, {unused}, step);
}

void Bucket::note_sums() {
  const StageSums& sums = exchange_->sums();
  last.gradient_sq = sums.gradient_sq;
  last.residual_sq = sums.residual_sq;
  last.sent_sq = sums.sent_sq;
}

std::vector<Bucket::Compensated> Bucket::take_residuals(const at::Tensor& gradient, const std::vector<uint8_t>& unused,
                                                        ResidualStore& residuals) {
  std::vector<Compensated> compensated;
  taken_.reserve(key_.entries.size()); // before anything is in between
  int64_t begin = 0;                   // of the entry, in the bucket
  for (size_t e = 0; e < key_.entries.size(); ++e) {
    const EntryPtr& entry = key_.entries[e];
    const int64_t offset = std::exchange(begin, begin + entry->numel);
    if (!entry->residual.defined() || (e < unused.size() && unused[e] != 0)) continue;
    exchange_.reset(); // it points at them
    residuals.ensure_residual(*entry, gradient.device());
    compensated.push_back({offset, at::add(gradient.narrow(0, offset, entry->numel), entry->residual)});
    taken_.emplace_back(entry, std::exchange(entry->residual, at::Tensor()));
  }
  return compensated;
}

void Bucket::restore(const uint32_t* condition) {
  if (condition == nullptr)
    for (auto& [entry, residual] : std::exchange(taken_, {})) entry->residual = std::move(residual);
  if (exchange_ != nullptr && plan_.error_feedback) exchange_->restore(condition);
}

void Bucket::forget_sent() {
  taken_.clear();
  if (exchange_ != nullptr && plan_.error_feedback) exchange_->forget_sent();
}

#if COMPRESSED_DDP_CUDA
bool Bucket::knows_unused(const std::vector<uint8_t>& unused) const { return exchange_->knows_unused(unused); }

int64_t Bucket::num_statistics() const { return exchange_ == nullptr ? 0 : static_cast<int64_t>(exchange_->stages().size()); }

void Bucket::copy_statistics(cuda::SelectStatistics* to) const {
  for (const auto& stages : exchange_->stages()) {
    if (stages != nullptr) static_cast<StagesDevice&>(*stages).copy_statistics(to);
    ++to;
  }
}

void Bucket::take_statistics(const cuda::SelectStatistics* statistics) {
  last.gradient_sq = last.sent_sq = last.residual_sq = 0;
  for (const auto& stages : exchange_->stages()) {
    if (stages != nullptr) {
      last.gradient_sq += statistics->gradient_sq;
      last.sent_sq += statistics->sent_sq;
      last.residual_sq += std::max(0.0, statistics->acc_sq - statistics->sent_sq);
    }
    ++statistics;
  }
}
#endif

} // namespace compressed_ddp
