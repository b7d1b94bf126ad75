// Where threads wait for each other: barriers of a block, collectives of a warp.
#include <algorithm>
#include <cstdio>
#include <sstream>

#include "lanes.h"
#include "scheduler.h"

namespace simt {
namespace {

constexpr int64_t kCost = 64;
constexpr uint32_t kFuzzOneIn = 4;

const char* name_of(Collective kind) {
  constexpr const char* kNames[] = {"syncwarp",   "ballot",     "shuffle",           "reduce add",
                                    "reduce min", "reduce max", "reduce min signed", "reduce max signed",
                                    "reduce and", "reduce or",  "reduce xor",        "match any"};
  return kNames[static_cast<int>(kind)];
}

std::string show_mask(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string show(const Gathering& gathering) {
  return std::string(name_of(gathering.kind)) + " of mask " + show_mask(gathering.mask) + " at " + show(gathering.at);
}

// redux.sync is 32 bits wide.
uint64_t reduce(const Gathering& gathering) {
  const auto signed_order = [](uint32_t value) { return value ^ 0x80000000u; };
  auto result = static_cast<uint32_t>(gathering.values[lowest_lane(gathering.mask)]);
  for (uint32_t lanes = gathering.mask & (gathering.mask - 1); lanes != 0; lanes &= lanes - 1) {
    const auto value = static_cast<uint32_t>(gathering.values[lowest_lane(lanes)]);
    switch (gathering.kind) {
      case Collective::kReduceAdd:
        result += value;
        break;
      case Collective::kReduceMin:
        result = std::min(result, value);
        break;
      case Collective::kReduceMax:
        result = std::max(result, value);
        break;
      case Collective::kReduceMinSigned:
        if (signed_order(value) < signed_order(result)) result = value;
        break;
      case Collective::kReduceMaxSigned:
        if (signed_order(value) > signed_order(result)) result = value;
        break;
      case Collective::kReduceAnd:
        result &= value;
        break;
      case Collective::kReduceOr:
        result |= value;
        break;
      default:
        result ^= value;
        break;
    }
  }
  return result;
}

uint64_t lanes_where(const Gathering& gathering, const auto& holds) {
  uint64_t result = 0;
  for (uint32_t lanes = gathering.mask; lanes != 0; lanes &= lanes - 1) {
    const uint32_t lane = lowest_lane(lanes);
    if (holds(gathering.values[lane])) result |= uint64_t{1} << lane;
  }
  return result;
}

} // namespace

// ---- barriers

uint32_t Scheduler::barrier(uint32_t id, uint32_t count, bool predicate, const Location& at) {
  enter(kCost, kFuzzOneIn, at);
  ThreadState& thread = *current_thread();
  BlockState& block = *thread.block;
  const auto refuse = [&](const std::string& why) { fail(FailureKind::kBarrier, "barrier " + std::to_string(id) + ": " + why, at); };
  if (id >= block.barriers.size()) refuse("there are 16, 0 to 15");
  if (count % 32 != 0) refuse("it must count whole warps, got " + std::to_string(count) + " threads");
  if (count >= threads_per_block_ + 32)
    refuse("it counts " + std::to_string(count) + " threads, the block has " + std::to_string(threads_per_block_));
  const uint32_t expected = count == 0 ? threads_per_block_ : std::min(count, threads_per_block_);
  const bool counts_all = expected == threads_per_block_;
  if (counts_all && block.left > 0) refuse("it counts all threads of the block, but " + std::to_string(block.left) + " of them have left");
  Barrier& barrier = block.barriers[id];
  if (barrier.waiting.empty()) {
    barrier.expected = expected;
    barrier.counts_all = counts_all;
    barrier.at = at;
    barrier.votes = 0;
  } else if (barrier.expected != expected) {
    refuse("it counts " + std::to_string(expected) + " threads here, but " + std::to_string(barrier.expected) + " for those that wait at " +
           show(barrier.at));
  }
  barrier.waiting.push_back(&thread);
  barrier.votes += predicate ? 1 : 0;
  if (barrier.waiting.size() == barrier.expected)
    complete(barrier, block);
  else
    wait(at);
  return static_cast<uint32_t>(thread.result);
}

void Scheduler::complete(Barrier& barrier, BlockState& block) {
  made_progress();
  if (options_.detect_races) {
    std::vector<ThreadClock*> clocks;
    clocks.reserve(barrier.waiting.size());
    for (ThreadState* thread : barrier.waiting) clocks.push_back(&thread->clock);
    join_threads(clocks, barrier.counts_all);
  }
  for (ThreadState* thread : barrier.waiting) {
    thread->result = barrier.votes;
    if (thread == current_thread()) continue;
    --block.waiting;
    make_ready(*thread);
  }
  barrier.waiting.clear();
}

// ---- collectives

void Scheduler::check_mask(const BlockState& block, Collective kind, uint32_t mask, const Location& at) {
  const ThreadState& thread = *current_thread();
  const auto refuse = [&](const std::string& why) {
    fail(FailureKind::kWrongMask, std::string(name_of(kind)) + " of mask " + show_mask(mask) + ": " + why, at);
  };
  if ((mask >> thread.lane & 1) == 0) refuse("lane " + std::to_string(thread.lane) + " executes it without being in the mask");
  const Warp& warp = block.warps[thread.warp];
  if (const uint32_t absent = mask & ~warp.present; absent != 0) {
    const uint32_t lane = lowest_lane(absent);
    const bool exists = thread.warp * 32 + lane < threads_per_block_;
    refuse("lane " + std::to_string(lane) + (exists ? " has left" : " does not exist in this block"));
  }
  // Lanes may wait at different collectives for a while, but not each for the other.
  for (const Gathering& gathering : warp.gatherings) {
    const bool is_same = gathering.kind == kind && gathering.mask == mask;
    if (!is_same && (gathering.mask >> thread.lane & 1) != 0 && (gathering.arrived & mask) != 0)
      refuse("lanes " + show_mask(gathering.arrived & mask) + " of it wait for this lane at the " + show(gathering));
  }
}

uint64_t Scheduler::collective(Collective kind, uint32_t mask, uint64_t value, uint32_t source_lane, const Location& at) {
  enter(kCost, kFuzzOneIn, at);
  ThreadState& thread = *current_thread();
  BlockState& block = *thread.block;
  check_mask(block, kind, mask, at);
  if (kind == Collective::kShuffle && (source_lane >= 32 || (mask >> source_lane & 1) == 0))
    fail(FailureKind::kWrongMask,
         "shuffle of mask " + show_mask(mask) + ": the source lane " + std::to_string(source_lane) + " is not in the mask", at);
  auto& gatherings = block.warps[thread.warp].gatherings;
  auto found = std::find_if(gatherings.begin(), gatherings.end(), [&](const Gathering& g) { return g.kind == kind && g.mask == mask; });
  if (found == gatherings.end()) {
    found = gatherings.emplace(gatherings.end());
    found->kind = kind;
    found->mask = mask;
    found->at = at;
  }
  found->arrived |= 1u << thread.lane;
  found->values[thread.lane] = value;
  found->source_lanes[thread.lane] = source_lane;
  if (found->arrived == mask) {
    complete(*found, block, thread.warp);
    gatherings.erase(found);
  } else {
    wait(at);
  }
  return thread.result;
}

void Scheduler::complete(Gathering& gathering, BlockState& block, uint32_t warp) {
  made_progress();
  uint64_t common = 0;
  if (gathering.kind == Collective::kBallot)
    common = lanes_where(gathering, [](uint64_t value) { return value != 0; });
  else if (gathering.kind >= Collective::kReduceAdd && gathering.kind <= Collective::kReduceXor)
    common = reduce(gathering);
  std::vector<ThreadClock*> clocks;
  for (uint32_t lanes = gathering.mask; lanes != 0; lanes &= lanes - 1) {
    const uint32_t lane = lowest_lane(lanes);
    ThreadState& thread = *block.threads[warp * 32 + lane];
    if (gathering.kind == Collective::kShuffle)
      thread.result = gathering.values[gathering.source_lanes[lane]];
    else if (gathering.kind == Collective::kMatchAny)
      thread.result = lanes_where(gathering, [&](uint64_t value) { return value == gathering.values[lane]; });
    else
      thread.result = common;
    if (gathering.kind == Collective::kSyncWarp) clocks.push_back(&thread.clock);
    if (&thread == current_thread()) continue;
    --block.waiting;
    make_ready(thread);
  }
  if (options_.detect_races && !clocks.empty()) join_threads(clocks, clocks.size() == threads_per_block_);
}

// ---- nobody of a block can go on

void Scheduler::fail_stuck(const BlockState& block, const Location& at) {
  std::ostringstream text;
  text << "no thread of the block can go on:";
  bool at_barrier = false;
  for (size_t id = 0; id < block.barriers.size(); ++id) {
    const Barrier& barrier = block.barriers[id];
    if (barrier.waiting.empty()) continue;
    at_barrier = true;
    text << " " << barrier.waiting.size() << " wait at barrier " << id << " at " << show(barrier.at) << " for " << barrier.expected << ";";
  }
  for (size_t w = 0; w < block.warps.size(); ++w)
    for (const Gathering& gathering : block.warps[w].gatherings)
      text << " lanes " << show_mask(gathering.arrived) << " of warp " << w << " wait at the " << show(gathering) << ";";
  text << " " << block.left << " have left";
  fail(at_barrier ? FailureKind::kBarrier : FailureKind::kWrongMask, text.str(), at);
}

} // namespace simt
