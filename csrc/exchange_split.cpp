// exchange="split": the bucket is cut into one range per rank, its owner. Volume per rank: two payloads of a bucket's size in all, however
// many ranks there are.
//
//   begin     per range: compensate_select_, encode                           a payload for every owner
//   start 0   all-to-all                                                      each owner has world_size payloads of its range
//   finish 0  decode_apply_: the average of the range, in fp32, rank order;   dense segments too
//             compensate_select_ of the average, encode                       one payload of the average
//   start 1   all-gather                                                      every rank has the payload of every owner
//   finish 1  decode_apply_ of one payload per range: the result
//             return_dropped: what this rank sent and no owner selected goes back to the residual
//
// Ranges lie one after another and are cut by payload bytes, so a group that reaches over a border is selected from in each range by
// itself, its k being that of its part: every payload has one size, nothing can overflow, and skewed data cannot make one owner the
// bottleneck. (Ok-Topk, Li and Hoefler 2022, and SparCML, Renggli et al. 2019, spread indices over owners instead: one selection, but
// sizes that have to be negotiated or capacities that can overflow.)
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "exchange.h"
#include "gradient_type.h"

namespace compressed_ddp {
namespace {

class SplitExchange final : public Exchange {
 public:
  SplitExchange(std::vector<BucketRange> ranges, const Members& members, ExchangeTypes types, const StageMaker& maker)
      : members_(members), types_(types), on_device_(maker.on_device), nan_if_flagged_(maker.nan_if_flagged) {
    for (const BucketRange& range : ranges) numel_ += range.numel();
    const size_t own = static_cast<size_t>(members.index);
    BucketRange averages = ranges[own];
    for (BucketRange& range : ranges) {
      begins_.push_back(range.begin);
      offsets_.push_back(send_bytes_);
      if (range.numel() == 0) { // a small bucket, many ranks
        stages_.push_back(nullptr);
        bytes_.push_back(0);
        continue;
      }
      stages_.push_back(maker.make(std::move(range), true));
      bytes_.push_back(stages_.back()->payload_bytes());
      send_bytes_ += bytes_.back();
    }
    stride_ = *std::max_element(bytes_.begin(), bytes_.end());
    sent_ = bytes_on(maker.device, send_bytes_);
    received_ = bytes_on(maker.device, members.count * bytes_[own]);
    average_ =
        at::zeros({stride_}, sent_.options()); // of equal size on all ranks; zeros behind the payload, and no garbage before the first
    gathered_ = bytes_on(maker.device, members.count * stride_);
    if (stages_[own] == nullptr) return;
    const auto fp32 = sent_.options().dtype(at::kFloat);
    sum_ = at::empty({averages.numel()}, fp32);
    // fp32 values round nothing; without error feedback what is lost is lost.
    const bool keeps_lost = stages_[own]->has_residuals() && averages.layout.value_format != ValueFormat::kFloat32;
    if (keeps_lost) lost_ = at::zeros({averages.numel()}, fp32);
    averages.residuals.clear();
    for (const Segment& segment : averages.layout.segments) {
      if (!keeps_lost) break;
      averages.residuals.push_back(segment.group == kDenseGroup ? nullptr : lost_.data_ptr<float>() + segment.offset);
    }
    owner_ = maker.make_owner(std::move(averages), false);
  }

  int num_collectives() const override { return 2; }

  void begin(const at::Tensor& gradient, const Unused& unused, int64_t step) override {
    step_ = step;
    sums_ = {};
    has_refused_ = false;
    has_added_lost_ = false;
    if (lost_.defined()) owner_->clear(lost_.data_ptr<float>(), lost_.numel());
    for (size_t o = 0; o < stages_.size(); ++o)
      if (stages_[o] != nullptr)
        sums_ +=
            stages_[o]->compensate_select_and_encode(part_of(gradient, o), types_.gradient, unused, members_.self(step), payload_for(o));
  }

  WorkPtr start(int collective, ProcessGroup& process_group) override {
    if (collective == 1) return start_all_gather(process_group, average_, gathered_);
    const std::vector<int64_t> from_each(static_cast<size_t>(members_.count), bytes_[static_cast<size_t>(members_.index)]);
    return start_all_to_all(process_group, sent_, received_, bytes_, from_each);
  }

  bool finish(int collective, at::Tensor& gradient) override {
    if (collective == 1) return apply_averages(gradient);
    if (owner_ != nullptr) select_averages();
    return false; // what all ranks see, all judge
  }

  // The other ranks wait for this one's averages. When the payloads have not arrived, they have not arrived there either.
  int refuse(int collective, bool arrived) override {
    if (collective != 0 || !arrived || owner_ == nullptr) return num_collectives();
    PayloadHeader header = make_header(owner_->layout(), members_.self(step_).rank, step_, false);
    header.flags = kFlagRefused;
    std::memcpy(average_.data_ptr<uint8_t>(), &header, sizeof header);
    has_refused_ = true;
    return 1;
  }

  void restore(const uint32_t* condition) override {
    if (has_added_lost_)
      own().add_lost(average_.const_data_ptr<uint8_t>(), lost_.const_data_ptr<float>(), -count_factor(), types_.result, condition);
    if (!on_device_) has_added_lost_ = false; // a device undoes it once by itself, and after every replay of a graph
    for (size_t o = 0; o < stages_.size(); ++o)
      if (stages_[o] != nullptr) stages_[o]->restore(payload_for(o), condition);
  }
  void forget_sent() override {
    for (const auto& stages : stages_)
      if (stages != nullptr) stages->forget_sent();
  }

  int64_t payload_bytes() const override { return send_bytes_; }
  SentBytes sent_bytes() const override {
    return {.all_gather = all_gather_sent_bytes(members_.count, stride_),
            .all_to_all = static_cast<double>(send_bytes_ - bytes_[static_cast<size_t>(members_.index)])};
  }
  const std::vector<std::unique_ptr<Stages>>& stages() const override { return stages_; }

 private:
  Stages& own() { return *stages_[static_cast<size_t>(members_.index)]; }
  uint8_t* payload_for(size_t owner) { return sent_.data_ptr<uint8_t>() + offsets_[owner]; }
  float count_factor() const { return static_cast<float>(members_.count); }
  void* part_of(const at::Tensor& bucket, size_t owner) const {
    return static_cast<uint8_t*>(bucket.data_ptr()) + begins_[owner] * bucket.element_size();
  }

  void select_averages() {
    const Received received{received_.const_data_ptr<uint8_t>(), members_.count, members_.senders, step_};
    own().check(received);
    own().decode_apply(received, sum_.mutable_data_ptr(), GradientType::kFloat32);
    const Unused all_used;
    owner_->compensate_select_and_encode(sum_.const_data_ptr(), GradientType::kFloat32, all_used, members_.self(step_),
                                         average_.data_ptr<uint8_t>());
    if (!lost_.defined()) return;
    sums_.residual_sq +=
        own().add_lost(average_.const_data_ptr<uint8_t>(), lost_.const_data_ptr<float>(), count_factor(), types_.result, nullptr);
    has_added_lost_ = true;
  }

  bool apply_averages(at::Tensor& gradient) {
    if (has_refused_) throw std::runtime_error("this rank has refused its range");
    const auto received_from = [&](size_t o) {
      const auto owner = static_cast<int64_t>(o);
      return Received{gathered_.const_data_ptr<uint8_t>() + owner * stride_, 1, {members_.senders.rank_of(owner)}, step_};
    };
    // All before the first is applied: nothing is written if one is not what it should be.
    for (size_t o = 0; o < stages_.size(); ++o)
      if (stages_[o] != nullptr) stages_[o]->check(received_from(o));
    bool bad = false;
    for (size_t o = 0; o < stages_.size(); ++o)
      if (stages_[o] != nullptr) bad = stages_[o]->decode_apply(received_from(o), part_of(gradient, o), types_.result) || bad;
    const auto count = static_cast<int64_t>(std::find(bytes_.begin(), bytes_.end(), 0) - bytes_.begin()); // empty ranges come last
    bad = nan_if_flagged_(gathered_.const_data_ptr<uint8_t>(), stride_, count, gradient.mutable_data_ptr(), numel_, types_.result) || bad;
    double grown_sq = 0;
    for (size_t o = 0; o < stages_.size(); ++o)
      if (stages_[o] != nullptr && stages_[o]->has_residuals())
        grown_sq += stages_[o]->return_dropped(payload_for(o), part_of(gradient, o), types_.result);
    sums_.residual_sq += grown_sq;                           // it is no longer sent
    sums_.sent_sq = std::max(0.0, sums_.sent_sq - grown_sq); // when all of it comes back, rounding may leave less than nothing
    return bad;
  }

  Members members_;
  ExchangeTypes types_;
  bool on_device_;
  NanIfFlagged nan_if_flagged_;
  int64_t numel_ = 0;
  int64_t step_ = -1;
  std::vector<int64_t> begins_, offsets_, bytes_; // of every owner's range: in the bucket; of its payload: in sent_, and its size
  std::vector<std::unique_ptr<Stages>> stages_;   // of every owner's range
  std::unique_ptr<Stages> owner_;                 // of the averages of this rank's range; its residuals are lost_
  int64_t send_bytes_ = 0;
  int64_t stride_ = 0; // of payloads in gathered_: the largest
  at::Tensor sent_, received_, average_, gathered_;
  at::Tensor sum_;  // [numel of this rank's range]: the average before it is selected from
  at::Tensor lost_; // same: the average minus what its payload decodes to, where that is not left out altogether
  bool has_added_lost_ = false;
  bool has_refused_ = false;
};

} // namespace

std::unique_ptr<Exchange> make_split_exchange(std::vector<BucketRange> ranges, const Members& members, ExchangeTypes types,
                                              const StageMaker& maker) {
  return std::make_unique<SplitExchange>(std::move(ranges), members, types, maker);
}

} // namespace compressed_ddp
