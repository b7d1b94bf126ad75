#include "sectors.h"

#include <algorithm>
#include <utility>

namespace simt {

void WarpRequests::restart(uint32_t lanes) {
  all_lanes_ = lanes;
  for (Instruction& instruction : by_site_) {
    while (instruction.num_open > 0) instruction.close_oldest();
    instruction.executed.fill(0);
    instruction.oldest = 0;
  }
}

bool WarpRequests::is_far_ahead(uint32_t site, uint32_t lane) const {
  if (site >= by_site_.size()) return false;
  const Instruction& instruction = by_site_[site];
  return instruction.executed[lane] >= instruction.oldest + kOpenRequests;
}

uint32_t WarpRequests::Group::add(uintptr_t sector) {
  const uint64_t bit = uint64_t{1} << (sector - first);
  const bool is_new = (sectors & bit) == 0;
  sectors |= bit;
  return is_new ? 1 : 0;
}

uint32_t WarpRequests::Request::add(uintptr_t sector) {
  if (group.sectors == 0) group.first = sector & ~uintptr_t{15};
  if (group.covers(sector)) return group.add(sector);
  for (Group& other : more)
    if (other.covers(sector)) return other.add(sector);
  return more.emplace_back(Group{sector & ~uintptr_t{63}, 0}).add(sector);
}

WarpRequests::Request& WarpRequests::Instruction::open(uint64_t execution) {
  while (execution - oldest >= num_open) {
    if (num_open == ring.size()) {
      std::vector<Request> larger(std::max<size_t>(4, ring.size() * 2));
      for (uint64_t e = oldest; e < oldest + num_open; ++e) larger[e & (larger.size() - 1)] = std::move(request(e));
      ring = std::move(larger);
    }
    ++num_open;
  }
  return request(execution);
}

void WarpRequests::Instruction::close_oldest() {
  Request& closed = request(oldest);
  closed.group = {};
  closed.lanes = 0;
  closed.more.clear();
  ++oldest;
  --num_open;
}

WarpRequests::Added WarpRequests::add(uint32_t site, uint32_t lane, uintptr_t address, size_t bytes) {
  if (site >= by_site_.size()) by_site_.resize(site + 1);
  Instruction& instruction = by_site_[site];
  const uint64_t execution = instruction.executed[lane]++;
  const uintptr_t first = address / kSectorBytes, last = (address + bytes - 1) / kSectorBytes;
  if (execution < instruction.oldest) return {static_cast<uint32_t>(last - first + 1), bytes};
  Request& request = instruction.open(execution);
  const bool is_broadcast = request.lanes != 0 && request.first_address == address;
  if (request.lanes == 0) request.first_address = address;
  request.lanes |= 1u << lane;
  uint32_t added = 0;
  for (uintptr_t sector = first; sector <= last; ++sector) added += request.add(sector);
  while (instruction.num_open > 0 && instruction.request(instruction.oldest).lanes == all_lanes_) instruction.close_oldest();
  // Half of them, so that a lane whose company stays away is not told at every access that it is far ahead.
  if (instruction.num_open > kOpenRequests)
    while (instruction.num_open > kOpenRequests / 2) instruction.close_oldest();
  return {added, is_broadcast ? 0 : bytes};
}

} // namespace simt
