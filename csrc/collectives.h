// The collectives of the project, over torch.distributed. All sizes are known to every rank before: nothing is negotiated here.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <vector>

namespace compressed_ddp {

using c10d::ProcessGroup;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// Each starts a collective; its tensors must live until the returned work is done. Throws when the process group refuses at once.

// input: flat [n]; gathered: flat [world_size * n] of the same type, written.
WorkPtr start_all_gather(ProcessGroup& process_group, const at::Tensor& input, at::Tensor& gathered);
// input: the parts for rank 0, 1, .. one after another; output: the parts from rank 0, 1, .. The sums of both lists are the numels.
WorkPtr start_all_to_all(ProcessGroup& process_group, const at::Tensor& input, at::Tensor& output, std::vector<int64_t> input_numels,
                         std::vector<int64_t> output_numels);
// Sum of `bucket` over the ranks, in place.
WorkPtr start_all_reduce(ProcessGroup& process_group, at::Tensor& bucket);

// The same, waited for.
void all_gather(ProcessGroup& process_group, const at::Tensor& input, at::Tensor& gathered);

// Bytes that one rank puts on the network.
inline double all_gather_sent_bytes(int64_t world_size, int64_t input_bytes) { return static_cast<double>((world_size - 1) * input_bytes); }
inline double ring_all_reduce_sent_bytes(int64_t world_size, int64_t bucket_bytes) {
  return 2.0 * static_cast<double>(world_size - 1) / static_cast<double>(world_size) * static_cast<double>(bucket_bytes);
}

} // namespace compressed_ddp
