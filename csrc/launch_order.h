// Collectives that begin when another one is done begin on threads of the process group, in any order; but all ranks have to begin them in
// the same order. This is the queue that restores it: the order in which the hook saw the buckets.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace compressed_ddp {

class LaunchOrder {
 public:
  // Begins a collective, which must not wait; returns what is to be done when it has begun (or nothing).
  using Begin = std::function<std::function<void()>()>;

  int64_t take_ticket() {
    const std::lock_guard lock(mutex_);
    return next_ticket_++;
  }

  // Every ticket is launched once, with nullptr if there is nothing to begin. Begins it, and those after it that wait, as soon as all
  // before have begun. What they return runs on this thread, too, but outside the lock.
  void launch(int64_t ticket, Begin begin) {
    std::vector<std::function<void()>> then;
    {
      const std::lock_guard lock(mutex_);
      waiting_.emplace(ticket, std::move(begin));
      for (; !waiting_.empty() && waiting_.begin()->first == next_launch_; ++next_launch_) {
        if (waiting_.begin()->second) then.push_back(waiting_.begin()->second());
        waiting_.erase(waiting_.begin());
      }
    }
    for (const auto& function : then)
      if (function) function();
  }

 private:
  std::mutex mutex_;
  int64_t next_ticket_ = 0, next_launch_ = 0;
  std::map<int64_t, Begin> waiting_;
};

} // namespace compressed_ddp
