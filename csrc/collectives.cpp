#include "collectives.h"

namespace compressed_ddp {
namespace {

// torch 2.15 renamed _allgather_base and alltoall_base; concepts serve both names without a version macro.
template <typename Group>
concept HasSingle =
    requires(Group& group, at::Tensor& tensor, const c10d::AllgatherOptions& options) { group.all_gather_single(tensor, tensor, options); };

template <typename Group>
WorkPtr all_gather_single(Group& group, at::Tensor& gathered, at::Tensor& input) {
  const c10d::AllgatherOptions options;
  if constexpr (HasSingle<Group>) {
    return group.all_gather_single(gathered, input, options);
  } else {
    return group._allgather_base(gathered, input, options);
  }
}

template <typename Group>
WorkPtr all_to_all_single(Group& group, at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_numels,
                          std::vector<int64_t>& input_numels) {
  const c10d::AllToAllOptions options;
  if constexpr (HasSingle<Group>) {
    return group.all_to_all_single(output, input, output_numels, input_numels, options);
  } else {
    return group.alltoall_base(output, input, output_numels, input_numels, options);
  }
}

} // namespace

WorkPtr start_all_gather(ProcessGroup& process_group, const at::Tensor& input, at::Tensor& gathered) {
  at::Tensor mine = input;
  return all_gather_single(process_group, gathered, mine);
}

WorkPtr start_all_to_all(ProcessGroup& process_group, const at::Tensor& input, at::Tensor& output, std::vector<int64_t> input_numels,
                         std::vector<int64_t> output_numels) {
  at::Tensor mine = input;
  return all_to_all_single(process_group, output, mine, output_numels, input_numels);
}

WorkPtr start_all_reduce(ProcessGroup& process_group, at::Tensor& bucket) {
  std::vector<at::Tensor> tensors{bucket};
  return process_group.allreduce(tensors);
}

void all_gather(ProcessGroup& process_group, const at::Tensor& input, at::Tensor& gathered) {
  start_all_gather(process_group, input, gathered)->wait();
}

} // namespace compressed_ddp
