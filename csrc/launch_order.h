// Collectives that begin when another one is done begin on threads of the process group, in any order; but all ranks have to begin them in
// the same order. This is the queue that restores it: the order in which the hook saw the buckets.
//
// A rank that cannot begin one of them has lost the order: what it began next would meet another bucket's collective on the other ranks,
// and Gloo aborts a process that receives another size than it expects. So nothing of that order begins any more on that rank.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace compressed_ddp {

inline constexpr const char* kLostOrderWords = "an earlier exchange has failed on this rank, and the ranks' collectives no longer match";

class LaunchOrder {
 public:
  struct Begun {
    bool has_begun;
    std::function<void()> then; // what is to be done now
  };
  // Begins a collective, which must not wait, unless the order is lost.
  using Begin = std::function<Begun(bool is_lost)>;

  int64_t take_ticket() {
    const std::lock_guard lock(mutex_);
    return next_ticket_++;
  }

  // Begins it, and those after it that wait, as soon as all before have begun. What they return runs on this thread, too, but outside
  // the lock.
  void launch(int64_t ticket, Begin begin) {
    std::vector<std::function<void()>> then;
    {
      const std::lock_guard lock(mutex_);
      waiting_.emplace(ticket, std::move(begin));
      for (; !waiting_.empty() && (is_lost_ || waiting_.begin()->first == next_launch_); ++next_launch_) {
        Begun begun = waiting_.begin()->second(is_lost_);
        is_lost_ = is_lost_ || !begun.has_begun;
        then.push_back(std::move(begun.then));
        waiting_.erase(waiting_.begin());
      }
    }
    for (const auto& function : then) function();
  }

  // The collective of some ticket is never going to begin on this rank.
  void lose() {
    std::vector<std::function<void()>> then;
    {
      const std::lock_guard lock(mutex_);
      is_lost_ = true;
      for (const auto& [ticket, begin] : waiting_) then.push_back(begin(true).then);
      waiting_.clear();
    }
    for (const auto& function : then) function();
  }

 private:
  std::mutex mutex_;
  int64_t next_ticket_ = 0, next_launch_ = 0;
  bool is_lost_ = false;
  std::map<int64_t, Begin> waiting_;
};

// Of the collectives of one exchange behind the first: each of them has a process group of its own, and an order in it.
inline constexpr int kMaxLaterCollectives = 3;
using LaunchOrders = std::array<std::shared_ptr<LaunchOrder>, kMaxLaterCollectives>;
inline LaunchOrders new_launch_orders() {
  LaunchOrders orders;
  for (auto& order : orders) order = std::make_shared<LaunchOrder>();
  return orders;
}

} // namespace compressed_ddp
