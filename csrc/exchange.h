// Stage 3, exchange: the payloads of all ranks to all ranks, over torch.distributed. The only collectives of the sparse path.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace compressed_ddp {

using c10d::ProcessGroup;

// Starts one all-gather of equal sizes. payload: uint8 [payload_bytes]; gathered: uint8 flat [world_size * payload_bytes], written.
// Both must live until the returned work is done. Throws when the process group refuses at once.
c10::intrusive_ptr<c10d::Work> start_all_gather(ProcessGroup& process_group, const at::Tensor& payload, at::Tensor& gathered);

// The same, waited for.
void all_gather(ProcessGroup& process_group, const at::Tensor& payload, at::Tensor& gathered);

// Starts a dense all-reduce (sum) of `bucket` in place: the first dense_steps steps.
c10::intrusive_ptr<c10d::Work> start_all_reduce(ProcessGroup& process_group, at::Tensor& bucket);

// Bytes that one rank puts on the network.
inline double all_gather_sent_bytes(int64_t world_size, int64_t payload_bytes) {
  return static_cast<double>((world_size - 1) * payload_bytes);
}
inline double ring_all_reduce_sent_bytes(int64_t world_size, int64_t bucket_bytes) {
  return 2.0 * static_cast<double>(world_size - 1) / static_cast<double>(world_size) * static_cast<double>(bucket_bytes);
}

} // namespace compressed_ddp
