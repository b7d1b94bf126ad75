#include "device_queue.h"

#include <stdexcept>

namespace simt {
namespace {

uint64_t next_random(uint64_t& state) { // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

CompletionPtr completed() {
  auto completion = std::make_shared<Completion>();
  completion->done = true;
  return completion;
}

} // namespace

DeviceQueue::StreamId DeviceQueue::create_stream(bool blocking) {
  streams_[next_id_].blocking = blocking;
  return next_id_++;
}

void DeviceQueue::destroy_stream(StreamId stream) {
  Stream& found = streams_.at(stream);
  found.destroyed = true;
  if (found.queue.empty()) streams_.erase(stream);
}

CompletionPtr DeviceQueue::tail(StreamId stream) const {
  const Stream& found = streams_.at(stream);
  return found.queue.empty() ? completed() : found.queue.back().completion;
}

bool DeviceQueue::is_idle(StreamId stream) const { return streams_.at(stream).queue.empty(); }

CompletionPtr DeviceQueue::enqueue(StreamId id, std::function<void()> work, std::vector<CompletionPtr> after) {
  Stream& stream = streams_.at(id);
  if (id == 0) {
    for (const auto& [other, blocking] : streams_)
      if (other != 0 && blocking.blocking) after.push_back(tail(other));
  } else if (stream.blocking) {
    after.push_back(tail(0));
  }
  stream.queue.push_back({std::move(work), std::move(after), std::make_shared<Completion>()});
  return stream.queue.back().completion;
}

bool DeviceQueue::may_run(const Stream& stream) const {
  if (stream.queue.empty()) return false;
  for (const CompletionPtr& completion : stream.queue.front().after)
    if (!completion->done) return false;
  return true;
}

void DeviceQueue::run_next(StreamId id) {
  Stream& stream = streams_.at(id);
  const Work work = std::move(stream.queue.front());
  stream.queue.pop_front();
  work.completion->done = true; // even if it fails: nobody may wait for it forever
  const bool gone = stream.destroyed && stream.queue.empty();
  work.run();
  if (gone) streams_.erase(id);
}

DeviceQueue::StreamId DeviceQueue::owner(const CompletionPtr& completion) const {
  for (const auto& [id, stream] : streams_)
    for (const Work& work : stream.queue)
      if (work.completion == completion) return id;
  throw std::logic_error("stand-in runtime: a wait for work that was dropped");
}

void DeviceQueue::advance(const CompletionPtr& wanted) {
  if (fuzz_) {
    std::vector<StreamId> able;
    for (const auto& [id, stream] : streams_)
      if (may_run(stream)) able.push_back(id);
    if (!able.empty()) return run_next(able[next_random(random_) % able.size()]);
  }
  // As late as allowed: down the chain of what the wanted work waits for.
  CompletionPtr target = wanted;
  for (size_t depth = 0; depth < 1000000; ++depth) {
    const StreamId id = owner(target);
    const Stream& stream = streams_.at(id);
    if (may_run(stream)) return run_next(id);
    for (const CompletionPtr& completion : stream.queue.front().after)
      if (!completion->done) target = completion;
  }
  throw std::logic_error("stand-in runtime: streams wait for each other in a circle");
}

void DeviceQueue::wait(const CompletionPtr& completion) {
  while (!completion->done) advance(completion);
}

void DeviceQueue::wait_stream(StreamId stream) { wait(tail(stream)); }

void DeviceQueue::wait_all() {
  std::vector<CompletionPtr> tails;
  for (const auto& [id, stream] : streams_) tails.push_back(tail(id));
  for (const CompletionPtr& completion : tails) wait(completion);
}

void DeviceQueue::clear() {
  for (auto& [id, stream] : streams_) {
    for (Work& work : stream.queue) work.completion->done = true;
    stream.queue.clear();
  }
}

void DeviceQueue::set_order(bool fuzz, uint64_t seed) {
  fuzz_ = fuzz;
  random_ = seed;
}

} // namespace simt
