// exchange="hierarchical": whole gradients inside a node, where the network is fast; payloads between nodes, a shard each.
//
//   begin      pack: shard l, the l-th part of every parameter, for rank l of the node
//   start 0    all-to-all inside the node
//   finish 0   the node's mean of this rank's shard, in fp32, rank order            dense parameters too
//              begin of the exchange between the owners of this shard: compensate_select_ and encode, by the residual of the shard
//   ..         its collectives                                                      allgather, or split above 16 nodes
//              the average of all nodes, in the gradient's type
//   start n    all-gather of the averages inside the node
//   finish n   unpack into the bucket
//
// A residual belongs to a node, and each of its ranks keeps one shard: memory / ranks per node. What a node selects is selected from the
// mean of its ranks, so nothing is lost when P / G is taken for the world size: over all nodes,
// nodes * result + residuals = means + residuals before.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "exchange.h"
#include "gradient_type.h"

namespace compressed_ddp {
namespace {

class HierarchicalExchange final : public Exchange {
 public:
  HierarchicalExchange(std::unique_ptr<ShardStages> shards, std::unique_ptr<Exchange> between, int between_collectives,
                       int64_t node_payload_bytes, int64_t index, GradientType type, const StageMaker& maker)
      : shards_(std::move(shards)),
        between_(std::move(between)),
        between_collectives_(between_collectives),
        node_payload_bytes_(node_payload_bytes) {
    const auto gradients = at::TensorOptions().dtype(scalar_type(type)).device(maker.device);
    const int64_t own = shards_->own_message_numel(), count = shards_->count();
    int64_t sent = 0;
    for (const int64_t numel : shards_->message_numels()) sent += numel;
    sent_ = at::zeros({sent}, gradients); // no garbage in the padding
    received_ = at::empty({count * own}, gradients);
    mean_ = at::empty({own}, gradients.dtype(at::kFloat));
    slots_ = at::zeros({count * shards_->slot_bytes()}, gradients.dtype(at::kByte));
    slot_ = slots_.narrow(0, index * shards_->slot_bytes(), shards_->slot_bytes());
    result_ = slot_.narrow(0, kSlotAlignment, shards_->own_numel() * element_bytes(type)).view(gradients.dtype().toScalarType());
  }

  int num_collectives() const override { return between_collectives_ + 2; }

  void begin(const at::Tensor& gradient, const Unused& unused, int64_t step) override {
    step_ = step;
    is_bad_ = has_begun_ = has_refused_ = false;
    shards_->pack(gradient.const_data_ptr(), unused.of_entries, sent_.mutable_data_ptr());
  }

  WorkPtr start(int collective, ProcessGroup& process_group) override {
    if (collective == 0) {
      const std::vector<int64_t> from_each(static_cast<size_t>(shards_->count()), shards_->own_message_numel());
      return start_all_to_all(process_group, sent_, received_, shards_->message_numels(), from_each);
    }
    if (collective == num_collectives() - 1) return start_all_gather(process_group, slot_, slots_);
    return between_ == nullptr ? nullptr : between_->start(collective - 1, process_group);
  }

  bool finish(int collective, at::Tensor& gradient) override {
    if (collective == num_collectives() - 1) return apply_slots(gradient);
    if (collective == 0) {
      shards_->mean(received_.const_data_ptr(), mean_.mutable_data_ptr<float>());
      if (between_ != nullptr) between_->begin(mean_, {{}, mean_.const_data_ptr<float>() + shards_->own_numel()}, step_);
      has_begun_ = between_ != nullptr;
    } else if (between_ != nullptr) {
      is_bad_ = between_->finish(collective - 1, result_) || is_bad_;
    }
    if (collective == between_collectives_) shards_->seal(slot_.data_ptr<uint8_t>(), step_, is_bad_ ? kFlagNonFinite : uint8_t{0});
    return false; // what all ranks of the node see, all judge
  }

  // This rank's node has its shard from nobody else, whatever happens between the nodes.
  int refuse(int collective, bool arrived) override {
    const int last = num_collectives() - 1;
    if (collective == last || (collective == 0 && !arrived)) return num_collectives();
    if (collective > 0 && between_ != nullptr) { // owners of other nodes wait, too
      const int next = between_->refuse(collective - 1, arrived);
      if (next < between_->num_collectives()) return next + 1;
    }
    shards_->seal(slot_.data_ptr<uint8_t>(), step_, kFlagRefused);
    has_refused_ = true;
    return last;
  }

  void restore(const uint32_t* condition) override {
    if (has_begun_) between_->restore(condition);
  }
  void forget_sent() override {
    if (has_begun_) between_->forget_sent();
  }

  int64_t payload_bytes() const override { return node_payload_bytes_; }
  SentBytes sent_bytes() const override {
    SentBytes sent = between_ == nullptr ? SentBytes{} : between_->sent_bytes();
    sent.in_node_all_to_all = static_cast<double>((sent_.numel() - shards_->own_message_numel()) * sent_.element_size());
    sent.in_node_all_gather = all_gather_sent_bytes(shards_->count(), shards_->slot_bytes());
    return sent;
  }
  const std::vector<std::unique_ptr<Stages>>& stages() const override { return between_ == nullptr ? no_stages_ : between_->stages(); }
  const StageSums& sums() const override { return between_ == nullptr ? sums_ : between_->sums(); }
  bool knows_unused(const std::vector<uint8_t>& unused) const override { return shards_->knows_unused(unused); }

 private:
  bool apply_slots(at::Tensor& gradient) {
    if (has_refused_) throw std::runtime_error("this rank has refused its shard");
    shards_->check(slots_.const_data_ptr<uint8_t>(), step_);
    return shards_->unpack(slots_.const_data_ptr<uint8_t>(), step_, gradient.mutable_data_ptr());
  }

  std::unique_ptr<ShardStages> shards_;
  std::unique_ptr<Exchange> between_;
  int between_collectives_;
  int64_t node_payload_bytes_;
  int64_t step_ = -1;
  bool is_bad_ = false;
  bool has_begun_ = false; // the exchange between nodes, in this step: before it, nothing of the residual was touched
  bool has_refused_ = false;
  at::Tensor sent_, received_; // shards and presences, by all_to_all
  at::Tensor mean_;            // fp32: this rank's shard, then the presences
  at::Tensor slots_, slot_;    // of the node's averages; of this rank's, a view
  at::Tensor result_;          // of slot_: the shard
  const std::vector<std::unique_ptr<Stages>> no_stages_;
};

} // namespace

std::unique_ptr<Exchange> make_hierarchical_exchange(const Dealt& dealt, const Node& node, std::unique_ptr<Exchange> between,
                                                     int between_collectives, int64_t node_payload_bytes, GradientType type,
                                                     const StageMaker& maker) {
  return std::make_unique<HierarchicalExchange>(maker.deal(dealt, node, type), std::move(between), between_collectives, node_payload_bytes,
                                                node.shard.index, type, maker);
}

} // namespace compressed_ddp
