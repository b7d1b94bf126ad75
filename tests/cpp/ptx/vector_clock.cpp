#include "vector_clock.h"

#include <algorithm>
#include <memory>

namespace simt {
namespace {

bool same_knowledge(const BlockClock& a, const BlockClock& b) { return a.floor == b.floor && a.above == b.above; }

} // namespace

void BlockClock::learn(const KnownLanes& known) {
  if (known.tick <= floor) return;
  KnownLanes merged = known;
  for (const KnownLanes& present : above) {
    if (present.warp != known.warp) continue;
    if (present.tick >= known.tick && (known.lanes & ~present.lanes) == 0) return;
    if (present.tick == known.tick) merged.lanes |= present.lanes;
  }
  std::erase_if(above, [&](const KnownLanes& present) {
    return present.warp == merged.warp && present.tick <= merged.tick && (present.lanes & ~merged.lanes) == 0;
  });
  above.push_back(merged);
}

void BlockClock::learn_all(const BlockClock& other) {
  if (other.floor > floor) {
    floor = other.floor;
    std::erase_if(above, [&](const KnownLanes& present) { return present.tick <= floor; });
  }
  for (const KnownLanes& known : other.above) learn(known);
}

const BlockClock* GridClock::find(uint32_t block) const {
  const auto found = std::lower_bound(blocks.begin(), blocks.end(), block,
                                      [](const Ref<BlockClock>& clock, uint32_t wanted) { return clock->block < wanted; });
  return found != blocks.end() && (*found)->block == block ? &**found : nullptr;
}

void join(Ref<BlockClock>& into, const Ref<BlockClock>& other) {
  if (!other || into == other) return;
  if (!into) {
    into = other;
    return;
  }
  BlockClock both;
  both.block = into->block;
  both.floor = into->floor;
  both.above = into->above;
  both.learn_all(*other);
  if (same_knowledge(both, *into)) return;
  into = same_knowledge(both, *other) ? other : Ref(new BlockClock(std::move(both)));
}

void join(Ref<GridClock>& into, const Ref<GridClock>& other) {
  if (!other || into == other) return;
  if (!into) {
    into = other;
    return;
  }
  auto both = std::make_unique<GridClock>();
  both->blocks.reserve(std::max(into->blocks.size(), other->blocks.size()));
  bool is_into = true, is_other = true;
  auto a = into->blocks.begin();
  auto b = other->blocks.begin();
  while (a != into->blocks.end() || b != other->blocks.end()) {
    if (b == other->blocks.end() || (a != into->blocks.end() && (*a)->block < (*b)->block)) {
      both->blocks.push_back(*a++);
      is_other = false;
    } else if (a == into->blocks.end() || (*b)->block < (*a)->block) {
      both->blocks.push_back(*b++);
      is_into = false;
    } else {
      Ref<BlockClock> joined = *a;
      join(joined, *b);
      is_into = is_into && joined == *a;
      is_other = is_other && joined == *b;
      both->blocks.push_back(std::move(joined));
      ++a;
      ++b;
    }
  }
  if (is_into) return;
  into = is_other ? other : Ref(both.release());
}

Ref<GridClock> ThreadClock::release() {
  auto mine = std::make_unique<BlockClock>();
  if (own) {
    mine->floor = own->floor;
    mine->above = own->above;
  }
  mine->block = block;
  mine->learn({warp(), lane_bit(), now});
  auto grid = std::make_unique<GridClock>();
  grid->blocks.emplace_back(mine.release());
  Ref<GridClock> all(grid.release());
  join(all, others);
  ++now;
  return all;
}

void ThreadClock::acquire(const Ref<GridClock>& clock) {
  if (!clock) return;
  join(others, clock);
  for (const Ref<BlockClock>& known : clock->blocks) {
    if (known->block != block) continue;
    join(own, known);
    floor = own->floor;
  }
}

void join_threads(const std::vector<ThreadClock*>& threads, bool whole_block) {
  auto own = std::make_unique<BlockClock>();
  own->block = threads.front()->block;
  Ref<GridClock> others;
  Tick last = 0;
  for (const ThreadClock* thread : threads) {
    last = std::max(last, thread->now);
    join(others, thread->others);
  }
  if (whole_block) {
    own->floor = last;
  } else {
    // Nobody has a tick above `last` yet, so all of them can be known up to there.
    const BlockClock* merged = nullptr;
    for (const ThreadClock* thread : threads) {
      if (thread->own && &*thread->own != merged) own->learn_all(*thread->own);
      if (thread->own) merged = &*thread->own;
    }
    KnownLanes known{threads.front()->warp(), 0, last};
    for (const ThreadClock* thread : threads) {
      if (thread->warp() != known.warp) {
        own->learn(known);
        known = {thread->warp(), 0, last};
      }
      known.lanes |= thread->lane_bit();
    }
    own->learn(known);
  }
  const Ref<BlockClock> joined(own.release());
  for (ThreadClock* thread : threads) {
    thread->own = joined;
    thread->others = others;
    thread->floor = joined->floor;
    thread->now = last + 1;
  }
}

} // namespace simt
