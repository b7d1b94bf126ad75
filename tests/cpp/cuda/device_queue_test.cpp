// Streams and events of the stand-in runtime: when queued work runs.
#include "device_queue.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "device_memory.h"
#include "stand_in_runtime.h"

namespace simt {
namespace {

struct Log {
  std::string text;
  std::function<void()> add(char c) {
    return [this, c] { text += c; };
  }
};

TEST(DeviceQueue, NothingRunsBeforeSomebodyWaits) {
  DeviceQueue queue;
  Log log;
  const auto stream = queue.create_stream(false);
  queue.enqueue(stream, log.add('a'));
  queue.enqueue(stream, log.add('b'));
  EXPECT_EQ(log.text, "");
  queue.wait_stream(stream);
  EXPECT_EQ(log.text, "ab");
}

TEST(DeviceQueue, AWaitRunsOnlyWhatItDependsOn) {
  DeviceQueue queue;
  Log log;
  const auto first = queue.create_stream(false), second = queue.create_stream(false);
  const CompletionPtr event = queue.enqueue(first, log.add('a'));
  queue.enqueue(first, log.add('b'));
  queue.enqueue(second, log.add('c'), {event});
  queue.wait_stream(second);
  EXPECT_EQ(log.text, "ac");
  queue.wait_all();
  EXPECT_EQ(log.text, "acb");
}

TEST(DeviceQueue, AForgottenWaitLetsTheConsumerRunFirst) {
  DeviceQueue queue;
  Log log;
  const auto producer = queue.create_stream(false), consumer = queue.create_stream(false);
  queue.enqueue(producer, log.add('p'));
  queue.enqueue(consumer, log.add('c'));
  queue.wait_stream(consumer);
  EXPECT_EQ(log.text, "c");
}

TEST(DeviceQueue, BlockingStreamsAreOrderedWithTheDefaultStream) {
  DeviceQueue queue;
  Log log;
  const auto blocking = queue.create_stream(true), other = queue.create_stream(false);
  queue.enqueue(blocking, log.add('a'));
  queue.enqueue(other, log.add('x'));
  queue.enqueue(0, log.add('b'));
  queue.enqueue(blocking, log.add('c'));
  queue.wait_stream(blocking);
  EXPECT_EQ(log.text, "abc");
}

TEST(DeviceQueue, FuzzFindsEveryOrderThatEventsAllowAndNoOther) {
  std::set<std::string> orders;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    DeviceQueue queue;
    queue.set_order(true, seed);
    Log log;
    const auto first = queue.create_stream(false), second = queue.create_stream(false);
    queue.enqueue(first, log.add('a'));
    const CompletionPtr event = queue.enqueue(first, log.add('b'));
    queue.enqueue(second, log.add('x'));
    queue.enqueue(second, log.add('y'), {event});
    queue.wait_all();
    orders.insert(log.text);
  }
  EXPECT_EQ(orders, (std::set<std::string>{"abxy", "axby", "xaby"}));
}

TEST(DeviceQueue, ADestroyedStreamStillFinishes) {
  DeviceQueue queue;
  Log log;
  const auto stream = queue.create_stream(false);
  queue.enqueue(stream, log.add('a'));
  queue.destroy_stream(stream);
  queue.wait_all();
  EXPECT_EQ(log.text, "a");
  EXPECT_FALSE(queue.is_stream(stream));
}

TEST(StandInRuntime, AMissingWaitBetweenStreamsShows) {
  using compressed_ddp::testing::require;
  cudaStream_t producer, consumer;
  cudaEvent_t event;
  require(cudaStreamCreateWithFlags(&producer, cudaStreamNonBlocking), "stream");
  require(cudaStreamCreateWithFlags(&consumer, cudaStreamNonBlocking), "stream");
  require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  for (const bool wait : {true, false}) {
    int value = 0, seen = 0;
    const int one = 1;
    require(cudaMemcpyAsync(&value, &one, sizeof one, cudaMemcpyHostToHost, producer), "copy");
    require(cudaEventRecord(event, producer), "record");
    EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
    if (wait) require(cudaStreamWaitEvent(consumer, event, 0), "wait");
    require(cudaMemcpyAsync(&seen, &value, sizeof value, cudaMemcpyHostToHost, consumer), "copy");
    require(cudaStreamSynchronize(consumer), "synchronize");
    EXPECT_EQ(seen, wait ? 1 : 0);
    require(cudaDeviceSynchronize(), "synchronize");
    cudaGetLastError(); // NotReady is an answer, not a failure
  }
  cudaEventDestroy(event);
  cudaStreamDestroy(producer);
  cudaStreamDestroy(consumer);
  EXPECT_GT(runtime_calls(), 10u);
}

TEST(StandInRuntime, AnErrorIsReportedOnceAndTheDeviceGoesOn) {
  EXPECT_EQ(cudaStreamWaitEvent(nullptr, reinterpret_cast<cudaEvent_t>(uintptr_t{77}), 0), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  void* p = nullptr;
  EXPECT_EQ(cudaMalloc(&p, 16), cudaSuccess);
  EXPECT_EQ(cudaFree(p), cudaSuccess);
}

} // namespace
} // namespace simt
