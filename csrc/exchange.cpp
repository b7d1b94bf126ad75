#include "exchange.h"

namespace compressed_ddp {
namespace {

// torch 2.15 renamed _allgather_base; a concept serves both without a version macro.
template <typename Group>
concept HasAllGatherSingle =
    requires(Group& group, at::Tensor& tensor, const c10d::AllgatherOptions& options) { group.all_gather_single(tensor, tensor, options); };

template <typename Group>
c10::intrusive_ptr<c10d::Work> all_gather_single(Group& group, at::Tensor& gathered, at::Tensor& payload) {
  const c10d::AllgatherOptions options;
  if constexpr (HasAllGatherSingle<Group>) {
    return group.all_gather_single(gathered, payload, options);
  } else {
    return group._allgather_base(gathered, payload, options);
  }
}

} // namespace

c10::intrusive_ptr<c10d::Work> start_all_gather(ProcessGroup& process_group, const at::Tensor& payload, at::Tensor& gathered) {
  at::Tensor input = payload;
  return all_gather_single(process_group, gathered, input);
}

void all_gather(ProcessGroup& process_group, const at::Tensor& payload, at::Tensor& gathered) {
  start_all_gather(process_group, payload, gathered)->wait();
}

c10::intrusive_ptr<c10d::Work> start_all_reduce(ProcessGroup& process_group, at::Tensor& bucket) {
  std::vector<at::Tensor> tensors{bucket};
  return process_group.allreduce(tensors);
}

} // namespace compressed_ddp
