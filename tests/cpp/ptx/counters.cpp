#include "counters.h"

#include <algorithm>

#include "launch_counters.h"

namespace simt {
namespace {

std::map<std::string, Counters>& by_kernel() {
  static auto* const all = new std::map<std::string, Counters>;
  return *all;
}

} // namespace

Counters& counters_of(const std::string& kernel) { return by_kernel()[kernel]; }

const std::map<std::string, Counters>& counters() { return by_kernel(); }

Counters total() {
  Counters sum;
  for (const auto& [kernel, counted] : by_kernel()) {
    sum.launches += counted.launches;
    sum.instructions += counted.instructions;
    sum.global_bytes_read += counted.global_bytes_read;
    sum.global_bytes_written += counted.global_bytes_written;
    sum.sectors_read += counted.sectors_read;
    sum.sectors_written += counted.sectors_written;
    sum.accesses_of_16_bytes += counted.accesses_of_16_bytes;
    sum.global_accesses += counted.global_accesses;
    sum.global_atomics += counted.global_atomics;
    sum.fences += counted.fences;
    sum.shared_bytes_peak = std::max(sum.shared_bytes_peak, counted.shared_bytes_peak);
  }
  return sum;
}

void reset_counters() { by_kernel().clear(); }

} // namespace simt
