// Bytes, sectors and launches of the CUDA stages on one bucket, counted by the interpreter.
#pragma once

#include "counters.h"
#include "cuda/decode_apply.h"
#include "cuda_cases.h"

namespace compressed_ddp::testing {

struct Counted {
  double bytes_per_element = 0;   // read and written
  double sectors_per_element = 0; // in bytes: 32 for each
  uint64_t launches = 0;
};

inline Counted counted_since_reset(int64_t numel) {
  const simt::Counters sum = simt::total();
  const auto n = static_cast<double>(numel);
  return {static_cast<double>(sum.global_bytes_read + sum.global_bytes_written) / n,
          32.0 * static_cast<double>(sum.sectors_read + sum.sectors_written) / n, sum.launches};
}

// Selection and encoding in the steady state: after `warm_up` steps, so that the residual holds what waits. Gaussian gradients.
inline Counted count_select(const Layout& layout, GradientType type, cuda::Method method, int warm_up = 3) {
  CudaPlan plan(layout);
  std::vector<float> residual(static_cast<size_t>(layout.numel));
  Counted counted;
  for (int step = 0; step <= warm_up; ++step) {
    const std::vector<float> gradient = normal_values(layout.numel, 60 + static_cast<uint64_t>(step));
    const SelectionCase c{layout, TypedBuffer(type, gradient), residual};
    if (step < warm_up) {
      residual = on_cpu(c).residual; // the same bits, sooner
      continue;
    }
    simt::reset_counters();
    plan.run(c, method);
    counted = counted_since_reset(layout.numel);
  }
  return counted;
}

inline Counted count_decode(const Layout& layout, int32_t world_size, GradientType type) {
  const std::vector<uint8_t> gathered = random_gathered(layout, world_size, kStep, 61);
  CudaPlan plan(layout);
  DeviceMemory<uint8_t> payloads{std::span<const uint8_t>(gathered)};
  DeviceMemory<uint8_t> bucket(static_cast<size_t>(layout.numel * element_bytes(type)));
  DeviceMemory<cuda::DecodeStatus> status(1);
  status.fill_bytes(0);
  require(cudaDeviceSynchronize(), "preparing");
  simt::reset_counters();
  cuda::decode_apply(plan.device(), {payloads.data(), world_size, bucket.data(), type, make_header(layout, 0, kStep, false), status.data()},
                     nullptr);
  require(cudaStreamSynchronize(nullptr), "decode_apply");
  return counted_since_reset(layout.numel);
}

} // namespace compressed_ddp::testing
