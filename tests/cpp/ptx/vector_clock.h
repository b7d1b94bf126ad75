// What a thread knows to have happened before: vector clocks, compact because most threads synchronise only by barriers of the
// whole block. Each thread counts its own ticks from 1; a barrier gives all its threads one common tick, so what a block knows of itself
// is mostly one number (`floor`), and what it knows of other blocks is shared by all its threads. Clocks never change once others can
// see them; who learns more gets a new one.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace simt {

using Tick = uint32_t;

// A pointer that counts references without atomics: the simulation runs on one CPU thread.
template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* object) : object_(object) {
    if (object_) ++object_->references;
  }
  Ref(const Ref& other) : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ && --object_->references == 0) delete object_;
  }
  explicit operator bool() const { return object_ != nullptr; }
  const T* operator->() const { return object_; }
  const T& operator*() const { return *object_; }
  bool operator==(const Ref&) const = default;

 private:
  T* object_ = nullptr;
};

// Lanes of one warp of a block, known up to `tick`.
struct KnownLanes {
  uint32_t warp, lanes;
  Tick tick;
  bool operator==(const KnownLanes&) const = default;
};

// What is known of the threads of one block: all of them up to `floor`, some further.
struct BlockClock {
  uint32_t block = 0;
  Tick floor = 0;
  std::vector<KnownLanes> above;
  mutable uint32_t references = 0;

  bool knows(uint32_t thread, Tick tick) const {
    if (tick <= floor) return true;
    for (const KnownLanes& known : above)
      if (known.warp == thread / 32 && (known.lanes >> (thread % 32) & 1) != 0 && tick <= known.tick) return true;
    return false;
  }
  void learn(const KnownLanes& known);
  void learn_all(const BlockClock& other);
};

// What is known of several blocks, ordered by block.
struct GridClock {
  std::vector<Ref<BlockClock>> blocks;
  mutable uint32_t references = 0;

  const BlockClock* find(uint32_t block) const;
};

// into = the union of both. Without a copy where one of them knows all that the other does.
void join(Ref<BlockClock>& into, const Ref<BlockClock>& other);
void join(Ref<GridClock>& into, const Ref<GridClock>& other);

// One thread's place in time.
struct ThreadClock {
  uint32_t block = 0, thread = 0; // block: number of the block in all launches; thread: in the block
  Tick now = 1;
  Tick floor = 0;        // of `own`, at hand for the common question
  Ref<BlockClock> own;   // of its block; that it knows itself goes without saying
  Ref<GridClock> others; // of other blocks (an entry of its own block in here does no harm)
  // What its next relaxed write releases (from its last fence that serves everyone, or its own block), and what its next fence acquires.
  Ref<GridClock> released, released_in_block;
  Ref<GridClock> pending, pending_in_block;

  uint32_t warp() const { return thread / 32; }
  uint32_t lane_bit() const { return 1u << (thread % 32); }
  bool knows(uint32_t other_block, uint32_t other_thread, Tick tick) const {
    if (other_block == block) return tick <= floor || other_thread == thread || (own && own->knows(other_thread, tick));
    const BlockClock* known = others ? others->find(other_block) : nullptr;
    return known != nullptr && known->knows(other_thread, tick);
  }
  // All that it knows, itself included, for others to acquire; then its time goes on.
  Ref<GridClock> release();
  void acquire(const Ref<GridClock>& clock);
};

// A rendezvous: everyone knows what any of them knew. `whole_block`: the threads are all threads of the block.
void join_threads(const std::vector<ThreadClock*>& threads, bool whole_block);

} // namespace simt
