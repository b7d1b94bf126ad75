// Which accesses of a warp's lanes are one request to memory: those of one instruction and the same execution of it, each lane's n-th.
// Lanes do not run in step here, so the requests that not all lanes have joined are kept for a while.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

class WarpRequests {
 public:
  static constexpr size_t kSectorBytes = 32;

  void restart(uint32_t lanes);
  // The lane is so far ahead of another that it should wait for it if it can.
  bool is_far_ahead(uint32_t site, uint32_t lane) const;
  struct Added {
    uint32_t sectors; // that the request did not have yet
    size_t bytes;     // 0 when an earlier lane has asked for the same address: a broadcast is served once
  };
  Added add(uint32_t site, uint32_t lane, uintptr_t address, size_t bytes);

 private:
  static constexpr size_t kOpenRequests = 512; // of one instruction; older ones are given up, and their latecomers counted apart

  // 64 sectors in a row: what a warp reads with 32 or 64 bytes per lane.
  struct Group {
    uintptr_t first = 0;
    uint64_t sectors = 0;

    bool covers(uintptr_t sector) const { return sector - first < 64; }
    uint32_t add(uintptr_t sector);
  };
  struct Request {
    Group group; // from a little in front of the first access on
    uint32_t lanes = 0;
    uintptr_t first_address = 0;
    std::vector<Group> more;

    uint32_t add(uintptr_t sector);
  };
  struct Instruction {
    std::array<uint64_t, 32> executed{}; // by each lane
    uint64_t oldest = 0;                 // execution that the first open request belongs to
    uint32_t num_open = 0;
    std::vector<Request> ring; // requests from `oldest` on, each at its execution modulo the size, a power of two

    Request& request(uint64_t execution) { return ring[execution & (ring.size() - 1)]; }
    Request& open(uint64_t execution);
    void close_oldest();
  };

  uint32_t all_lanes_ = 0;
  std::vector<Instruction> by_site_;
};

} // namespace simt
