// What launches did, added up per kernel: the figures of docs/benchmarks.md that are counted in simulation, not timed.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace simt {

struct Counters {
  uint64_t launches = 0;
  uint64_t instructions = 0;
  // What threads asked for; lanes of a warp that load from one address ask once (with count_sectors). Atomics count as read and written,
  // red as written.
  uint64_t global_bytes_read = 0, global_bytes_written = 0;
  // 32-byte sectors of global memory, each counted once per warp instruction (a warp's loads of one sector are one request to it)
  uint64_t sectors_read = 0, sectors_written = 0;
  uint64_t accesses_of_16_bytes = 0, global_accesses = 0;
  uint64_t global_atomics = 0, fences = 0;
  uint64_t shared_bytes_peak = 0;
};

const std::map<std::string, Counters>& counters(); // by kernel name (as launched)
Counters total();                                  // over all kernels
void reset_counters();

} // namespace simt
