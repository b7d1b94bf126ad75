// exchange="allgather": every rank's payload to every rank. Volume per rank: (world_size - 1) payloads of the whole bucket.
#include <ATen/ops/empty.h>

#include "exchange.h"

namespace compressed_ddp {
namespace {

class AllGatherExchange final : public Exchange {
 public:
  AllGatherExchange(BucketRange range, const Members& members, ExchangeTypes types, const StageMaker& maker)
      : members_(members), types_(types) {
    stages_.push_back(maker.make(std::move(range), false));
    payload_ = bytes_on(maker.device, whole().payload_bytes());
    gathered_ = bytes_on(maker.device, members.count * whole().payload_bytes());
  }

  int num_collectives() const override { return 1; }

  void begin(const at::Tensor& gradient, const Unused& unused, int64_t step) override {
    step_ = step;
    sums_ = whole().compensate_select_and_encode(gradient.const_data_ptr(), types_.gradient, unused, members_.self(step),
                                                 payload_.data_ptr<uint8_t>());
  }

  WorkPtr start(int, ProcessGroup& process_group) override { return start_all_gather(process_group, payload_, gathered_); }

  bool finish(int, at::Tensor& gradient) override {
    const Received received{gathered_.const_data_ptr<uint8_t>(), members_.count, members_.senders, step_};
    whole().check(received);
    return whole().decode_apply(received, gradient.mutable_data_ptr(), types_.result);
  }

  void restore(const uint32_t* condition) override { whole().restore(payload_.const_data_ptr<uint8_t>(), condition); }
  void forget_sent() override { whole().forget_sent(); }

  int64_t payload_bytes() const override { return payload_.numel(); }
  SentBytes sent_bytes() const override { return {.all_gather = all_gather_sent_bytes(members_.count, payload_.numel())}; }
  const std::vector<std::unique_ptr<Stages>>& stages() const override { return stages_; }

 private:
  Stages& whole() { return *stages_.front(); }

  Members members_;
  ExchangeTypes types_;
  int64_t step_ = -1;
  std::vector<std::unique_ptr<Stages>> stages_; // one
  at::Tensor payload_;
  at::Tensor gathered_; // [count * payload_bytes]
};

} // namespace

std::unique_ptr<Exchange> make_all_gather_exchange(BucketRange range, const Members& members, ExchangeTypes types,
                                                   const StageMaker& maker) {
  return std::make_unique<AllGatherExchange>(std::move(range), members, types, maker);
}

at::Tensor bytes_on(c10::Device device, int64_t bytes) { return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device)); }

} // namespace compressed_ddp
