// The CUDA stages on a GPU, each beside the cheapest thing that touches the same memory. No torch. README.md beside says what each row is.
//
//   bench_cuda_stages --output FILE [--max-numel N] [--repetitions N] [--budget-s S] [--commit HASH] [--dirty 0|1]
//   bench_cuda_stages --list 1     the buckets, one a line as JSON; needs no GPU
//
// What is compared runs in turns (A B C A B C ..); a ratio is taken inside each turn. A time is that of the device between two events:
// a kernel in front of the first one keeps the GPU busy until the host has enqueued everything (how long that took stands beside it).
// Buffers take turns, so that together they are far larger than the L2 cache: nothing is read that the call before left there.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <cub/device/device_radix_sort.cuh>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/decode.h"
#include "cuda/compensate_select.h"
#include "cuda/decode_apply.h"
#include "cuda/launch.h"

namespace compressed_ddp {
namespace {

using cuda::check;
using cuda::Method;
using Clock = std::chrono::steady_clock;

constexpr int kWorldSize = 8;               // payloads of a decode
constexpr int kWarmUpSteps = 100;           // per residual, so that it holds what many steps have left over
constexpr int kWarmUpTurns = 2;             // not counted
constexpr int64_t kMinCompressNumel = 1024; // TopKEFState's default
constexpr int64_t kStep = 1;
constexpr int64_t kHoldCycles = 200'000; // about a tenth of a millisecond
constexpr int kThreads = 256;

// ---- device memory

class Memory {
 public:
  explicit Memory(int64_t bytes) { check(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 1))), "cudaMalloc"); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  template <typename T = uint8_t>
  T* at(int64_t bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + bytes);
  }

 private:
  void* data_ = nullptr;
};

int64_t free_bytes() {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(free);
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// ---- kernels of the baselines and of the data

__device__ uint64_t mixed(uint64_t x) { // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

__device__ void store(float* out, float value) { *out = value; }
__device__ void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16(value); }

template <typename T>
__global__ void normal_kernel(T* out, int64_t numel, uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < numel; i += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t bits = mixed(seed + static_cast<uint64_t>(i));
    const float u = (static_cast<float>(bits >> 40) + 1.0f) * 0x1p-24f, v = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
    store(out + i, sqrtf(-2.0f * logf(u)) * cospif(2.0f * v));
  }
}

__device__ float4 four(const float* values) { return *reinterpret_cast<const float4*>(values); }
__device__ float4 four(const __nv_bfloat16* values) {
  const uint2 bits = *reinterpret_cast<const uint2*>(values);
  return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
          __uint_as_float(bits.y & 0xffff0000u)};
}
__device__ float one(const float* value) { return *value; }
__device__ float one(const __nv_bfloat16* value) { return __bfloat162float(*value); }

constexpr int kStreamVectors = 4; // in flight per thread

// residual += gradient: the least that error feedback can cost.
template <typename T>
__global__ void __launch_bounds__(kThreads) stream_kernel(const T* gradient, float* residual, int64_t numel) {
  const int64_t first = int64_t{blockIdx.x} * kThreads * kStreamVectors * 4;
  float4 g[kStreamVectors], r[kStreamVectors];
#pragma unroll
  for (int v = 0; v < kStreamVectors; ++v) {
    const int64_t i = first + (int64_t{v} * kThreads + threadIdx.x) * 4;
    if (i + 4 > numel) continue;
    g[v] = four(gradient + i);
    r[v] = four(residual + i);
  }
#pragma unroll
  for (int v = 0; v < kStreamVectors; ++v) {
    const int64_t i = first + (int64_t{v} * kThreads + threadIdx.x) * 4;
    if (i + 4 <= numel)
      *reinterpret_cast<float4*>(residual + i) = {r[v].x + g[v].x, r[v].y + g[v].y, r[v].z + g[v].z, r[v].w + g[v].w};
    else
      for (int64_t j = i; j < numel; ++j) residual[j] += one(gradient + j);
  }
}

// For the sort: magnitude and position.
__global__ void keys_kernel(const float* values, uint32_t* keys, int32_t* positions, int64_t numel) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < numel; i += int64_t{gridDim.x} * blockDim.x) {
    keys[i] = __float_as_uint(values[i]) & 0x7fffffffu;
    positions[i] = static_cast<int32_t>(i);
  }
}

__global__ void fill_kernel(uint4* out, int64_t numel) { // of 16 bytes each
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < numel; i += int64_t{gridDim.x} * blockDim.x) out[i] = {1, 2, 3, 4};
}

// Busy for a while. The clock is read until enough has passed.
__global__ void hold_kernel(int64_t cycles) {
  const int64_t start = clock64();
  while (clock64() - start < cycles) {
  }
}

template <typename T>
void make_normal(T* out, int64_t numel, uint64_t seed, cudaStream_t stream) {
  normal_kernel<<<2048, kThreads, 0, stream>>>(out, numel, seed);
  check(cudaGetLastError(), "normal");
}

void add_stream(const void* gradient, GradientType type, float* residual, int64_t numel, cudaStream_t stream) {
  const int64_t per_block = int64_t{kThreads} * kStreamVectors * 4;
  const auto blocks = static_cast<unsigned>((numel + per_block - 1) / per_block);
  if (type == GradientType::kFloat32)
    stream_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const float*>(gradient), residual, numel);
  else
    stream_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const __nv_bfloat16*>(gradient), residual, numel);
  check(cudaGetLastError(), "stream");
}

// ---- what a bucket looks like

struct Parameter {
  int64_t numel;
  bool is_vector;
};

std::vector<Parameter> resnet50() { // as bench_stages.resnet50_parameters
  std::vector<Parameter> parameters;
  const auto convolution = [&](int64_t inputs, int64_t outputs, int64_t width) {
    parameters.insert(parameters.end(), {{inputs * outputs * width * width, false}, {outputs, true}, {outputs, true}});
  };
  convolution(3, 64, 7);
  int64_t inputs = 64;
  for (const auto& [planes, blocks] : {std::pair{64, 3}, {128, 4}, {256, 6}, {512, 3}})
    for (int block = 0; block < blocks; ++block) {
      convolution(inputs, planes, 1);
      convolution(planes, planes, 3);
      convolution(planes, 4 * planes, 1);
      if (block == 0) convolution(inputs, 4 * planes, 1);
      inputs = 4 * planes;
    }
  parameters.insert(parameters.end(), {{2048 * 1000, false}, {1000, true}});
  return parameters;
}

std::vector<Parameter> gpt2() { // the smallest one: 124,439,808 entries; as bench_stages.gpt2_parameters
  constexpr int64_t kWidth = 768;
  std::vector<Parameter> parameters = {{50257 * kWidth, false}, {1024 * kWidth, false}};
  for (int block = 0; block < 12; ++block)
    parameters.insert(parameters.end(), {{kWidth, true},
                                         {kWidth, true},
                                         {kWidth * 3 * kWidth, false},
                                         {3 * kWidth, true},
                                         {kWidth * kWidth, false},
                                         {kWidth, true},
                                         {kWidth, true},
                                         {kWidth, true},
                                         {kWidth * 4 * kWidth, false},
                                         {4 * kWidth, true},
                                         {4 * kWidth * kWidth, false},
                                         {kWidth, true}});
  parameters.insert(parameters.end(), {{kWidth, true}, {kWidth, true}});
  return parameters;
}

// From the last parameter to the first, as DDP does; repeated, and the last one cut to fit. 1-D and small ones travel dense.
Layout layout_of(const std::string& segmentation, int64_t numel, double density) {
  std::vector<Parameter> model;
  if (segmentation == "one") model = {{numel, false}};
  if (segmentation == "resnet50") model = resnet50();
  if (segmentation == "gpt2") model = gpt2();
  std::vector<int64_t> segments, groups, k;
  int64_t left = numel;
  while (left > 0)
    for (auto parameter = model.rbegin(); parameter != model.rend() && left > 0; ++parameter) {
      const int64_t here = std::min(parameter->numel, left);
      left -= here;
      segments.push_back(here);
      if (parameter->is_vector || here < kMinCompressNumel) {
        groups.push_back(kDenseGroup);
      } else {
        groups.push_back(static_cast<int64_t>(k.size()));
        k.push_back(selection_k(density, here));
      }
    }
  return Layout::make(segments, groups, k, ValueFormat::kBFloat16);
}

// ---- figures

struct Quartiles {
  double median = 0, p25 = 0, p75 = 0;
};

Quartiles quartiles(std::vector<double> samples) { // inclusive method, as timing.quartiles
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(samples.size() - 1);
    const auto below = static_cast<size_t>(place);
    const size_t above = std::min(below + 1, samples.size() - 1);
    return samples[below] + (place - static_cast<double>(below)) * (samples[above] - samples[below]);
  };
  return {at(0.5), at(0.25), at(0.75)};
}

Quartiles paired_ratio(const std::vector<double>& numerator, const std::vector<double>& denominator) {
  std::vector<double> ratios;
  for (size_t i = 0; i < numerator.size(); ++i) ratios.push_back(numerator[i] / denominator[i]);
  return quartiles(ratios);
}

struct Samples {
  std::vector<double> ms, enqueue_us;
};

struct Arm {
  std::string stage;
  std::function<void()> enqueue; // one more call, on the next buffers
  int64_t bytes = 0;             // that must be read and written at least
  std::string over;              // stage of whose time it is a multiple
  Samples samples{};
};

class Timer {
 public:
  explicit Timer(cudaStream_t stream) : stream_(stream) {
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
  }

  void in_turns(std::vector<Arm>& arms, int repetitions) {
    for (int turn = -kWarmUpTurns; turn < repetitions; ++turn)
      for (Arm& arm : arms) {
        hold_kernel<<<1, 1, 0, stream_>>>(kHoldCycles);
        check(cudaGetLastError(), "hold");
        check(cudaEventRecord(start_, stream_), "cudaEventRecord");
        const auto before = Clock::now();
        arm.enqueue();
        const double enqueue_us = std::chrono::duration<double, std::micro>(Clock::now() - before).count();
        check(cudaEventRecord(stop_, stream_), "cudaEventRecord");
        check(cudaEventSynchronize(stop_), arm.stage.c_str());
        float ms = 0;
        check(cudaEventElapsedTime(&ms, start_, stop_), "cudaEventElapsedTime");
        if (turn < 0) continue;
        arm.samples.ms.push_back(ms);
        arm.samples.enqueue_us.push_back(enqueue_us);
      }
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

// ---- the results file

std::string text(const char* format, double value) {
  char out[64];
  std::snprintf(out, sizeof out, format, value);
  return out;
}
std::string number(double value) { return std::isfinite(value) ? text("%.5g", value) : "null"; }
std::string quoted(const std::string& value) {
  std::string out = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + '"';
}
std::string json(const Quartiles& q) {
  return "{\"median\": " + number(q.median) + ", \"p25\": " + number(q.p25) + ", \"p75\": " + number(q.p75) + "}";
}

const char* name_of(GradientType type) { return type == GradientType::kFloat32 ? "float32" : "bfloat16"; }

struct Configuration {
  std::string segmentation;
  int64_t numel;
  double density; // 0: a baseline, which has none
  GradientType type;

  std::string axes() const {
    return "\"numel\": " + std::to_string(numel) + ", \"size_mib\": " + number(static_cast<double>(numel) * 4 / (1 << 20)) +
           ", \"density\": " + (density > 0 ? number(density) : "null") + ", \"dtype\": " + quoted(name_of(type)) +
           ", \"segmentation\": " + quoted(segmentation);
  }
  std::string words() const {
    return std::to_string(numel) + " x " + name_of(type) + ", " + segmentation +
           (density > 0 ? ", density " + text("%g", density) : ", baselines");
  }
};

struct Results {
  std::vector<std::string> rows, goals, clocks, skipped;
};

void add_goal(Results& results, const Configuration& c, const std::string& stage, const char* goal, double limit, double value) {
  const bool reached = value <= limit;
  results.goals.push_back("{\"stage\": " + quoted(stage) + ", " + c.axes() + ", \"goal\": " + quoted(goal) +
                          ", \"limit\": " + quoted("<= " + text("%g", limit)) + ", \"value\": " + number(value) +
                          ", \"reached\": " + (reached ? "true" : "false") + "}");
  std::printf("    goal: %s %s <= %g: %.3f, %s\n", stage.c_str(), goal, limit, value, reached ? "reached" : "MISSED");
}

const Arm* find(const std::vector<Arm>& arms, const std::string& stage) {
  for (const Arm& arm : arms)
    if (arm.stage == stage) return &arm;
  return nullptr;
}

void add_rows(Results& results, const Configuration& c, const Layout* layout, const std::vector<Arm>& arms, const std::string& device) {
  std::printf("%s\n", c.words().c_str());
  for (const Arm& arm : arms) {
    const Quartiles ms = quartiles(arm.samples.ms);
    std::string row = "{\"stage\": " + quoted(arm.stage) + ", " + c.axes();
    row += ", \"payloads\": " + std::string(arm.stage == "decode_apply_" ? std::to_string(kWorldSize) : "null");
    if (layout != nullptr)
      row += ", \"segments\": " + std::to_string(layout->segments.size()) + ", \"selected\": " + std::to_string(layout->selected_numel);
    row += ", \"ms\": " + json(ms);
    row += ", \"gb_per_s\": " + (arm.bytes > 0 ? number(static_cast<double>(arm.bytes) / ms.median / 1e6) : "null");
    row += ", \"enqueue_us\": " + number(quartiles(arm.samples.enqueue_us).median);
    std::printf("  %-34s %9.4f ms  [%.4f, %.4f]", arm.stage.c_str(), ms.median, ms.p25, ms.p75);
    std::optional<double> ratio;
    if (!arm.over.empty()) {
      const Quartiles over = paired_ratio(arm.samples.ms, find(arms, arm.over)->samples.ms);
      ratio = over.median;
      row += ", " + quoted("over_" + arm.over) + ": " + json(over);
      std::printf("   %.3f x %s [%.3f, %.3f]", over.median, arm.over.c_str(), over.p25, over.p75);
    }
    results.rows.push_back(row + "}");
    std::printf("\n");
    if (!ratio || c.density > 0.01) continue;

    // Of one segment of 100 and 400 MiB of fp32 entries; and of a whole model.
    const bool is_100 = c.segmentation == "one" && c.numel == 26'214'400, is_400 = c.segmentation == "one" && c.numel == 104'857'600;
    const bool one_pass = arm.stage == "compensate_select_encode, one pass",
               two_passes = arm.stage == "compensate_select_encode, two passes";
    if (is_100 && one_pass) add_goal(results, c, arm.stage, "time over the stream's", 1.25, *ratio);
    if (is_400 && one_pass) add_goal(results, c, arm.stage, "time over the stream's", 1.12, *ratio);
    if (is_100 && two_passes) add_goal(results, c, arm.stage, "time over the stream's", 1.6, *ratio);
    if (is_400 && two_passes) add_goal(results, c, arm.stage, "time over the stream's", 1.5, *ratio);
    if ((is_100 || is_400) && arm.stage == "decode_apply_") add_goal(results, c, arm.stage, "8 payloads over a fill", 1.3, *ratio);
    const double model_ms = device.find("H200") != std::string::npos ? 0.12 : device.find("H100") != std::string::npos ? 0.15 : 0;
    if (model_ms > 0 && one_pass && c.segmentation == "resnet50" && c.numel == 25'557'032 && c.type == GradientType::kFloat32)
      add_goal(results, c, arm.stage, "ms for 25 M fp32 parameters", model_ms, ms.median);
  }
  std::fflush(stdout);
}

// ---- one size, all densities

int64_t copies_for(int64_t bytes_each, int64_t l2_bytes, int64_t most) {
  return std::clamp<int64_t>((3 * l2_bytes + bytes_each - 1) / std::max<int64_t>(bytes_each, 1), 2, most);
}

// Buffers of one size, in turns: call() is the number of the next.
class Ring {
 public:
  Ring(int64_t bytes_each, int64_t count) : stride_(aligned(bytes_each)), count_(count), memory_(stride_ * count) {}
  uint8_t* at(int64_t i) const { return memory_.at<uint8_t>(i % count_ * stride_); }
  uint8_t* next() { return at(calls_++); }
  // All of them, and then all of them beginning with another one: against a second ring, never the same pairs twice in a row.
  uint8_t* next_shifted() {
    const int64_t i = calls_++;
    return at(i + i / count_);
  }
  int64_t count() const { return count_; }
  static int64_t bytes(int64_t bytes_each, int64_t count) { return aligned(bytes_each) * count; }

 private:
  int64_t stride_, count_, calls_ = 0;
  Memory memory_;
};

bool fits(Results& results, const Configuration& c, int64_t needed) {
  const int64_t free = free_bytes();
  if (needed <= free / 10 * 9) return true;
  const std::string reason = "needs " + number(static_cast<double>(needed) / (1 << 30)) + " GiB, " +
                             number(static_cast<double>(free) / (1 << 30)) + " GiB are free";
  results.skipped.push_back("{" + c.axes() + ", \"reason\": " + quoted(reason) + "}");
  std::printf("%s: left out, %s\n", c.words().c_str(), reason.c_str());
  return false;
}

void measure_stages(const Configuration& c, int repetitions, const cudaDeviceProp& device, cudaStream_t stream, Results& results) {
  const Layout layout = layout_of(c.segmentation, c.numel, c.density);
  const int64_t gradient_bytes = c.numel * element_bytes(c.type), residual_bytes = c.numel * 4, message_bytes = payload_bytes(layout);
  const int64_t l2_bytes = device.l2CacheSize;
  const int64_t count = copies_for(gradient_bytes + residual_bytes, l2_bytes, 128);
  const int64_t payload_count = std::min<int64_t>(count, 16);
  const int64_t gathered_count = copies_for(kWorldSize * message_bytes, l2_bytes, 8);
  const cuda::Plan plan(layout);
  const auto num_segments = static_cast<int64_t>(layout.segments.size());
  const int64_t pointers_bytes = num_segments * static_cast<int64_t>(sizeof(float*));
  if (!fits(results, c,
            2 * Ring::bytes(gradient_bytes, count) + 2 * Ring::bytes(residual_bytes, count) + Ring::bytes(message_bytes, payload_count) +
                Ring::bytes(kWorldSize * message_bytes, gathered_count) + plan.workspace_bytes() + plan.table_bytes() +
                Ring::bytes(pointers_bytes, count)))
    return;

  Ring gradients(gradient_bytes, count), residuals(residual_bytes, count), stream_residuals(residual_bytes, count);
  Ring outputs(gradient_bytes, count), payloads(message_bytes, payload_count), gathered(kWorldSize * message_bytes, gathered_count);
  Ring pointers(pointers_bytes, count);
  Memory tables(plan.table_bytes()), workspace(plan.workspace_bytes()), statistics(sizeof(cuda::SelectStatistics)),
      status(sizeof(cuda::DecodeStatus));
  std::vector<uint8_t> host_tables(static_cast<size_t>(plan.table_bytes()));
  plan.write_tables(host_tables.data());
  check(cudaMemcpy(tables.at(), host_tables.data(), host_tables.size(), cudaMemcpyHostToDevice), "copying the tables");
  for (int64_t i = 0; i < count; ++i) {
    std::vector<float*> host;
    for (const Segment& segment : layout.segments)
      host.push_back(segment.group == kDenseGroup ? nullptr : reinterpret_cast<float*>(residuals.at(i)) + segment.offset);
    check(cudaMemcpy(pointers.at(i), host.data(), static_cast<size_t>(pointers_bytes), cudaMemcpyHostToDevice), "copying pointers");
    if (c.type == GradientType::kFloat32)
      make_normal(reinterpret_cast<float*>(gradients.at(i)), c.numel, static_cast<uint64_t>(i) << 40, stream);
    else
      make_normal(reinterpret_cast<__nv_bfloat16*>(gradients.at(i)), c.numel, static_cast<uint64_t>(i) << 40, stream);
    check(cudaMemsetAsync(residuals.at(i), 0, static_cast<size_t>(residual_bytes), stream), "clearing residuals");
    check(cudaMemsetAsync(stream_residuals.at(i), 0, static_cast<size_t>(residual_bytes), stream), "clearing residuals");
  }
  check(cudaMemsetAsync(status.at(), 0, sizeof(cuda::DecodeStatus), stream), "clearing the status");
  cuda::clear_workspace(plan, workspace.at(), stream);
  const cuda::DevicePlan on_device = cuda::device_plan(plan, tables.at(), workspace.at());

  const auto select = [&](Method method, uint8_t* payload, uint32_t rank) {
    const cuda::SelectArguments arguments{gradients.next_shifted(),
                                          c.type,
                                          reinterpret_cast<float* const*>(pointers.next()),
                                          nullptr,
                                          payload,
                                          make_header(layout, rank, kStep, false),
                                          statistics.at<cuda::SelectStatistics>()};
    cuda::compensate_select_and_encode(on_device, arguments, method, stream);
  };
  check(cudaDeviceSynchronize(), "setting up"); // what was copied on the default stream, ours does not wait for
  for (int64_t step = 0; step < kWarmUpSteps * count; ++step) select(Method::kOnePass, payloads.next(), 0);
  for (uint32_t rank = 0; rank < kWorldSize; ++rank) select(Method::kOnePass, gathered.at(0) + rank * message_bytes, rank);
  for (int64_t i = 1; i < gathered.count(); ++i)
    check(
        cudaMemcpyAsync(gathered.at(i), gathered.at(0), static_cast<size_t>(kWorldSize * message_bytes), cudaMemcpyDeviceToDevice, stream),
        "copying payloads");
  check(cudaStreamSynchronize(stream), "warming up");

  const auto decode = [&] {
    const cuda::DecodeArguments arguments{
        gathered.next(), kWorldSize, outputs.next(), c.type, make_header(layout, 0, kStep, false), status.at<cuda::DecodeStatus>()};
    cuda::decode_apply(on_device, arguments, stream);
  };
  const int64_t select_bytes = gradient_bytes + 2 * residual_bytes + message_bytes;
  std::vector<Arm> arms;
  arms.push_back({"stream",
                  [&] { add_stream(gradients.next_shifted(), c.type, reinterpret_cast<float*>(stream_residuals.next()), c.numel, stream); },
                  gradient_bytes + 2 * residual_bytes, ""});
  arms.push_back({"compensate_select_encode, one pass", [&] { select(Method::kOnePass, payloads.next(), 0); }, select_bytes, "stream"});
  arms.push_back({"compensate_select_encode, two passes", [&] { select(Method::kTwoPasses, payloads.next(), 0); }, select_bytes, "stream"});
  arms.push_back({"fill", [&] { check(cudaMemsetAsync(outputs.next(), 0, static_cast<size_t>(gradient_bytes), stream), "fill"); },
                  gradient_bytes, ""});
  arms.push_back({"decode_apply_", decode, gradient_bytes + kWorldSize * message_bytes, "fill"});
  Timer(stream).in_turns(arms, repetitions);

  // Figures of a wrong result would be worth nothing.
  cuda::DecodeStatus found{};
  check(cudaMemcpy(&found, status.at(), sizeof found, cudaMemcpyDeviceToHost), "reading the status");
  if (found.bad_rank != 0 || found.step_is_bad != 0)
    throw std::runtime_error(c.words() + ": the decoder refused a payload of rank " + std::to_string(int64_t{found.bad_rank} - 1));
  if (message_bytes <= 1 << 26) {
    std::vector<uint8_t> payload(static_cast<size_t>(message_bytes));
    check(cudaMemcpy(payload.data(), payloads.at(0), payload.size(), cudaMemcpyDeviceToHost), "reading a payload");
    Entries entries;
    const auto in_one_go = [](int64_t count, auto&& run) { run(int64_t{0}, count); };
    const std::string wrong = decode_own(layout, payload.data(), entries, in_one_go);
    if (!wrong.empty()) throw std::runtime_error(c.words() + ": " + wrong);
  }
  add_rows(results, c, &layout, arms, device.name);
}

// What the memory and CUB give: copies, the stream, fills, and the radix sort of pairs.
void measure_baselines(const Configuration& c, int repetitions, const cudaDeviceProp& device, cudaStream_t stream, Results& results) {
  const int64_t bytes = c.numel * 4;
  const int64_t count = copies_for(2 * bytes, device.l2CacheSize, 128);
  size_t sort_bytes = 0;
  check(cub::DeviceRadixSort::SortPairsDescending(nullptr, sort_bytes, static_cast<const uint32_t*>(nullptr),
                                                  static_cast<uint32_t*>(nullptr), static_cast<const int32_t*>(nullptr),
                                                  static_cast<int32_t*>(nullptr), c.numel, 0, 32, stream),
        "DeviceRadixSort");
  if (!fits(results, c, 2 * Ring::bytes(bytes, count) + 4 * aligned(bytes) + static_cast<int64_t>(sort_bytes))) return;
  Ring from(bytes, count), to(bytes, count);
  Memory keys(bytes), sorted_keys(bytes), positions(bytes), sorted_positions(bytes), scratch(static_cast<int64_t>(sort_bytes));
  for (int64_t i = 0; i < count; ++i) {
    make_normal(reinterpret_cast<float*>(from.at(i)), c.numel, static_cast<uint64_t>(i) << 40, stream);
    make_normal(reinterpret_cast<float*>(to.at(i)), c.numel, static_cast<uint64_t>(i + count) << 40, stream);
  }
  keys_kernel<<<2048, kThreads, 0, stream>>>(reinterpret_cast<const float*>(from.at(0)), keys.at<uint32_t>(), positions.at<int32_t>(),
                                             c.numel);
  check(cudaGetLastError(), "keys");
  check(cudaStreamSynchronize(stream), "making data");

  std::vector<Arm> arms;
  arms.push_back(
      {"copy",
       [&] { check(cudaMemcpyAsync(to.next(), from.next(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream), "copy"); },
       2 * bytes, ""});
  arms.push_back({"stream",
                  [&] { add_stream(from.next_shifted(), GradientType::kFloat32, reinterpret_cast<float*>(to.next()), c.numel, stream); },
                  3 * bytes, ""});
  arms.push_back({"memset", [&] { check(cudaMemsetAsync(to.next(), 0, static_cast<size_t>(bytes), stream), "memset"); }, bytes, ""});
  arms.push_back({"fill kernel",
                  [&] {
                    fill_kernel<<<static_cast<unsigned>(std::min<int64_t>(c.numel / 4 / kThreads + 1, 1 << 20)), kThreads, 0, stream>>>(
                        reinterpret_cast<uint4*>(to.next()), c.numel / 4);
                    check(cudaGetLastError(), "fill");
                  },
                  bytes, ""});
  arms.push_back({"CUB radix sort of pairs",
                  [&] {
                    size_t size = sort_bytes;
                    check(cub::DeviceRadixSort::SortPairsDescending(scratch.at(), size, keys.at<const uint32_t>(),
                                                                    sorted_keys.at<uint32_t>(), positions.at<const int32_t>(),
                                                                    sorted_positions.at<int32_t>(), c.numel, 0, 32, stream),
                          "DeviceRadixSort");
                  },
                  0, "stream"});
  Timer(stream).in_turns(arms, repetitions);
  add_rows(results, c, nullptr, arms, device.name);
}

// ---- the machine

// Clocks, temperature and power as nvidia-smi reads them now; null where there is none.
std::string clocks_now(const std::string& when, const std::string& bus_id) {
  const std::vector<std::string> fields = {"clocks.sm",     "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active",
                                           "driver_version"};
  std::string query;
  for (const std::string& field : fields) query += (query.empty() ? "" : ",") + field;
  std::string line;
  const std::string command = "nvidia-smi -i " + bus_id + " --query-gpu=" + query + " --format=csv,noheader,nounits 2>/dev/null";
  if (FILE* pipe = ::popen(command.c_str(), "r")) {
    char buffer[512];
    if (std::fgets(buffer, sizeof buffer, pipe) != nullptr) line = buffer;
    if (::pclose(pipe) != 0) line.clear();
  }
  std::string out = "{\"when\": " + quoted(when);
  size_t begin = 0;
  for (const std::string& field : fields) {
    std::string value;
    if (begin < line.size()) {
      size_t end = std::min(line.find(',', begin), line.size());
      value = line.substr(begin, end - begin);
      begin = end + 1;
      value.erase(0, value.find_first_not_of(" \n"));
      value.erase(value.find_last_not_of(" \n") + 1);
    }
    out += ", " + quoted(field) + ": " + (value.empty() ? "null" : quoted(value));
  }
  return out + "}";
}

struct Options {
  std::string output, commit;
  int64_t max_numel = 400'000'000;
  int repetitions = 15;
  double budget_s = 1e9;
  int dirty = -1;
  bool list = false;
};

Options options_from(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 >= argc) throw std::invalid_argument(name + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--output")
      options.output = value;
    else if (name == "--commit")
      options.commit = value;
    else if (name == "--dirty")
      options.dirty = std::stoi(value);
    else if (name == "--list")
      options.list = value == "1";
    else if (name == "--max-numel")
      options.max_numel = std::stoll(value);
    else if (name == "--repetitions")
      options.repetitions = std::stoi(value);
    else if (name == "--budget-s")
      options.budget_s = std::stod(value);
    else
      throw std::invalid_argument("unknown option " + name);
  }
  if (options.output.empty() && !options.list) throw std::invalid_argument("expected --output FILE");
  if (options.repetitions < 1) throw std::invalid_argument("--repetitions: expected at least 1");
  return options;
}

std::string list(const std::vector<std::string>& entries) {
  std::string out = "[";
  for (size_t i = 0; i < entries.size(); ++i) out += (i == 0 ? "\n  " : ",\n  ") + entries[i];
  return out + (entries.empty() ? "]" : "\n ]");
}

void write(const Options& options, const cudaDeviceProp& device, const Results& results) {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&now));
  const auto version = [](int v) { return quoted(std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10)); };
  std::string out = "{\n \"benchmark\": \"bench_stages_cuda\",\n \"title\": \"The stages on a GPU\",\n \"system\": {\n";
  out += "  \"device\": " + quoted(device.name) + ",\n";
  out += "  \"compute_capability\": " + quoted(std::to_string(device.major) + "." + std::to_string(device.minor)) + ",\n";
  out += "  \"multiprocessors\": " + std::to_string(device.multiProcessorCount) + ",\n";
  out += "  \"memory_gib\": " + number(static_cast<double>(device.totalGlobalMem) / (1 << 30)) + ",\n";
  out += "  \"l2_mib\": " + number(static_cast<double>(device.l2CacheSize) / (1 << 20)) + ",\n";
  out += "  \"driver_cuda\": " + version(driver) + ",\n  \"runtime_cuda\": " + version(runtime) + ",\n";
  out += "  \"toolkit\": " + quoted(std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__)) + ",\n";
  out += "  \"commit\": " + (options.commit.empty() ? "null" : quoted(options.commit)) + ",\n";
  out += std::string("  \"dirty\": ") + (options.dirty < 0 ? "null" : options.dirty > 0 ? "true" : "false") + ",\n";
  out += "  \"date\": " + quoted(date) + ",\n  \"command\": \"benchmarks/gpu/verify.sh bench\"\n },\n";
  out += " \"settings\": {\"repetitions\": " + std::to_string(options.repetitions) + ", \"warmup_steps\": " + std::to_string(kWarmUpSteps) +
         ", \"gradients\": \"Gaussian, in turns over more than the L2 cache\", \"times\": \"device, between two events\", \"payloads\": " +
         std::to_string(kWorldSize) + "},\n";
  out += " \"goals\": " + list(results.goals) + ",\n \"rows\": " + list(results.rows) + ",\n";
  out += " \"clocks\": " + list(results.clocks) + ",\n \"skipped\": " + list(results.skipped) + "\n}\n";
  FILE* file = std::fopen(options.output.c_str(), "w");
  if (file == nullptr || std::fwrite(out.data(), 1, out.size(), file) != out.size() || std::fclose(file) != 0)
    throw std::runtime_error("cannot write " + options.output);
  std::printf("written: %s\n", options.output.c_str());
}

// The ones with goals first: where the time is short, the others are left out.
struct Shape {
  const char* segmentation;
  int64_t numel;
};
constexpr Shape kShapes[] = {{"one", 26'214'400}, {"one", 104'857'600},    {"resnet50", 25'557'032}, {"gpt2", 26'214'400},
                             {"one", 6'553'600},  {"resnet50", 6'553'600}, {"gpt2", 6'553'600},      {"one", 1'000'000},
                             {"one", 100'000},    {"gpt2", 104'857'600},   {"one", 400'000'000}};
constexpr double kDensities[] = {0.001, 0.01, 0.1};

void list_buckets(const Options& options) {
  for (const Shape& shape : kShapes)
    for (const double density : kDensities) {
      if (shape.numel > options.max_numel) continue;
      const Layout layout = layout_of(shape.segmentation, shape.numel, density);
      std::printf("{\"segmentation\": \"%s\", \"numel\": %lld, \"density\": %g, \"segments\": %zu, \"selected\": %lld, \"hash\": %llu}\n",
                  shape.segmentation, static_cast<long long>(shape.numel), density, layout.segments.size(),
                  static_cast<long long>(layout.selected_numel), static_cast<unsigned long long>(layout.hash));
    }
}

int run(int argc, char** argv) {
  const Options options = options_from(argc, argv);
  if (options.list) {
    list_buckets(options);
    return 0;
  }
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "bench_cuda_stages: no CUDA device (%s)\n", error != cudaSuccess ? cudaGetErrorString(error) : "none found");
    return 2;
  }
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  char bus_id[32] = "0";
  check(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, 0), "cudaDeviceGetPCIBusId");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");

  const auto start = Clock::now();
  const auto spent = [&] { return std::chrono::duration<double>(Clock::now() - start).count() > options.budget_s; };
  Results results;
  results.clocks.push_back(clocks_now("at the start", bus_id));
  for (const Shape& shape : kShapes) {
    if (shape.numel > options.max_numel) continue;
    std::vector<Configuration> configurations;
    if (std::strcmp(shape.segmentation, "one") == 0) configurations.push_back({"one", shape.numel, 0, GradientType::kFloat32});
    for (const GradientType type : {GradientType::kFloat32, GradientType::kBFloat16})
      for (const double density : kDensities) configurations.push_back({shape.segmentation, shape.numel, density, type});
    for (const Configuration& c : configurations) {
      if (spent()) {
        results.skipped.push_back("{" + c.axes() + ", \"reason\": \"the time was up\"}");
        continue;
      }
      (c.density > 0 ? measure_stages : measure_baselines)(c, options.repetitions, device, stream, results);
    }
    results.clocks.push_back(clocks_now("after " + std::to_string(shape.numel) + " entries, " + shape.segmentation, bus_id));
    write(options, device, results); // what there is survives a time limit
  }
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return 0;
}

} // namespace
} // namespace compressed_ddp

int main(int argc, char** argv) {
  try {
    return compressed_ddp::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_cuda_stages: %s\n", error.what());
    return 1;
  }
}
