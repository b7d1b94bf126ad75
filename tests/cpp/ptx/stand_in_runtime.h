// The part of the CUDA runtime that compressed_ddp's device code calls, on the interpreter: a program linked with this library instead
// of the real one launches its own kernels, from the PTX in its own fat binary, on memory of simt::allocate.
//
// Streams queue their work and run it when somebody has to wait for it, and then as late as allowed: only what the awaited
// work depends on by stream order and events. So host code that forgets to wait sees stale memory, as it may on a GPU. In fuzz mode
// any stream whose next piece of work is allowed to run may go first.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "simt.h"

namespace simt {

struct StandInOptions { // as long as nobody sets them: those of the environment, as default_options()
  bool fuzz;            // random order among streams
  uint64_t seed;
};
StandInOptions& stand_in_options();

// The failure that made the device unusable (as cudaErrorLaunchFailure does), until reset_device.
struct DeviceFailure {
  FailureKind kind;
  std::string message;
};
std::optional<DeviceFailure> device_failure();

// Forgets the failure and all queued work. Allocations, streams and events stay.
void reset_device();

// Calls of the runtime so far, by anybody; a test of the stand-in itself asks whether its calls arrived here.
uint64_t runtime_calls();

// The launch after `which` - 1 others is refused, as one is whose kernel does not fit what is left of the device; 0 = none.
void refuse_launch(uint64_t which);

} // namespace simt
