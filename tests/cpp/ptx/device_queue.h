// Streams and events of the stand-in runtime: what is queued, what may run, and what a wait makes run.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

namespace simt {

// One record of an event, or a piece of work: done or not.
struct Completion {
  bool done = false;
};
using CompletionPtr = std::shared_ptr<Completion>;

class DeviceQueue {
 public:
  using StreamId = uint64_t; // 0 = the default stream

  StreamId create_stream(bool blocking); // blocking: ordered with the default stream, as streams without cudaStreamNonBlocking are
  void destroy_stream(StreamId stream);  // its work still runs
  bool is_stream(StreamId stream) const { return streams_.contains(stream); }

  // Queues work behind what the stream holds; `after`: further conditions.
  CompletionPtr enqueue(StreamId stream, std::function<void()> work, std::vector<CompletionPtr> after = {});

  // Runs what is needed until all of a stream, or one completion, or everything is done. The first exception of some work ends the
  // wait; the work that threw is gone, the rest stays queued.
  void wait_stream(StreamId stream);
  void wait(const CompletionPtr& completion);
  void wait_all();

  CompletionPtr tail(StreamId stream) const; // of the last piece of work; done if there is none
  bool is_idle(StreamId stream) const;
  void clear(); // drops all queued work
  void set_order(bool fuzz, uint64_t seed);

 private:
  struct Work {
    std::function<void()> run;
    std::vector<CompletionPtr> after;
    CompletionPtr completion;
  };
  struct Stream {
    bool blocking = true;
    bool destroyed = false;
    std::deque<Work> queue;
  };

  bool may_run(const Stream& stream) const;
  void run_next(StreamId id);
  void advance(const CompletionPtr& wanted); // runs one piece of work on the way to `wanted`
  StreamId owner(const CompletionPtr& completion) const;

  std::map<StreamId, Stream> streams_{{0, Stream{}}};
  StreamId next_id_ = 1;
  bool fuzz_ = false;
  uint64_t random_ = 1;
};

} // namespace simt
