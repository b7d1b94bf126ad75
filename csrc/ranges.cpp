#include "ranges.h"

#include <algorithm>

#include "wire_format.h"

namespace compressed_ddp {
namespace {

// The payload of a range that grows part by part. Its bytes never become fewer.
class RangePayload {
 public:
  explicit RangePayload(const RangeRule& rule) : rule_(rule) { counts_.value_format = rule.value_format; }

  RangePayload with(const RangePart& part) const {
    RangePayload longer = *this;
    PayloadCounts& counts = longer.counts_;
    counts.numel += part.numel;
    if (part.dense) {
      counts.dense_numel += part.numel;
    } else if (part.numel > 0 && rule_.one_selection) {
      longer.compressed_numel_ += part.numel;
      counts.selected_numel = selection_k(rule_.density, longer.compressed_numel_);
      counts.num_groups = 1;
    } else if (part.numel > 0) {
      counts.selected_numel += selection_k(rule_.density, part.numel);
      ++counts.num_groups;
    }
    return longer;
  }
  int64_t bytes() const { return payload_sections(counts_).payload_bytes; }

 private:
  RangeRule rule_;
  PayloadCounts counts_;
  int64_t compressed_numel_ = 0;
};

class Cutter {
 public:
  Cutter(std::span<const RangePart> parts, const RangeRule& rule) : parts_(parts), rule_(rule), begins_(1) {
    for (const RangePart& part : parts) begins_.push_back(begins_.back() + part.numel);
  }

  int64_t numel() const { return begins_.back(); }
  int64_t bytes() const {
    RangePayload payload(rule_);
    for (const RangePart& part : parts_) payload = payload.with(part);
    return payload.bytes();
  }

  // The ends of at most `count` ranges whose payloads have at most `limit` bytes; empty if that is not possible.
  std::vector<int64_t> ends_within(int64_t limit, int64_t count) const {
    std::vector<int64_t> ends;
    for (int64_t begin = 0; begin < numel(); begin = ends.back()) {
      const int64_t end = end_of_range(begin, limit);
      if (end <= begin || static_cast<int64_t>(ends.size()) == count) return {};
      ends.push_back(end);
    }
    return ends;
  }

 private:
  // The largest end of a range whose payload has at most `limit` bytes; maybe `begin`, or before it.
  int64_t end_of_range(int64_t begin, int64_t limit) const {
    RangePayload payload(rule_);
    auto p = static_cast<size_t>(std::upper_bound(begins_.begin(), begins_.end(), begin) - begins_.begin()) - 1;
    for (int64_t from = begin; p < parts_.size(); from = begins_[++p]) {
      const auto part_until = [&](int64_t end) { return RangePart{end - from, parts_[p].dense}; };
      const RangePayload longer = payload.with(part_until(begins_[p + 1]));
      if (longer.bytes() > limit) {
        int64_t fits = from / kRangeNumel, too_long = begins_[p + 1] / kRangeNumel + 1;
        while (too_long - fits > 1) {
          const int64_t middle = (fits + too_long) / 2, end = middle * kRangeNumel;
          (end < begins_[p + 1] && payload.with(part_until(end)).bytes() <= limit ? fits : too_long) = middle;
        }
        return fits * kRangeNumel;
      }
      payload = longer;
    }
    return numel();
  }

  std::span<const RangePart> parts_;
  RangeRule rule_;
  std::vector<int64_t> begins_; // of the parts, and the end of the last
};

} // namespace

std::vector<int64_t> range_ends(std::span<const RangePart> parts, int64_t count, const RangeRule& rule) {
  const Cutter cutter(parts, rule);
  int64_t too_small = 0, suffices = cutter.bytes() / kPayloadAlignment; // times kPayloadAlignment, of which payloads are multiples
  while (suffices - too_small > 1) {
    const int64_t middle = (too_small + suffices) / 2;
    (cutter.ends_within(middle * kPayloadAlignment, count).empty() ? too_small : suffices) = middle;
  }
  std::vector<int64_t> ends = cutter.ends_within(suffices * kPayloadAlignment, count);
  ends.resize(static_cast<size_t>(count), cutter.numel());
  return ends;
}

} // namespace compressed_ddp
