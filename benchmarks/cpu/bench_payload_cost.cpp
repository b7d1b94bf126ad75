// What payload version 3 costs beside version 1, on one thread: selection and encoding, and decoding of 8 payloads. Torch-free.
//
//   bench_payload_cost NUMEL GROUP_NUMEL WARMUP_STEPS TURNS DENSITY..
//
// Prints one line of JSON per density and arm with the thread's processor time of every turn in ms; bench_payload_cost.py runs it and
// makes ratios of them. All arms run in turns. Gradients are Gaussian and new in every turn; every arm of the selection has its own
// residual, which holds what WARMUP_STEPS steps have left over.
#include <ctime>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/compensate_select.h"
#include "cpu/decode_apply.h"
#include "cpu/encode.h"
#include "payload_v1.h"

using namespace compressed_ddp;

namespace {

constexpr int64_t kWorldSize = 8;
// Gradients and outputs rotate, so that none is found in a cache; and no divisor of the number of arms, so that each arm gets each buffer.
constexpr int64_t kNumBuffers = 5;
constexpr int64_t kWindowNumel = 1 << 16;

constexpr auto in_one_go = [](int64_t count, auto&& run) { run(int64_t{0}, count); };

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "bench_payload_cost: %s\n", what);
  std::exit(1);
}

double cpu_ms() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

// A Gaussian gradient [numel], another one at every call, without drawing new numbers: a window of one of several buffers.
class Gradients {
 public:
  explicit Gradients(int64_t numel) : random_(1) {
    std::normal_distribution<float> normal;
    for (auto& buffer : buffers_) {
      buffer.resize(static_cast<size_t>(numel + kWindowNumel));
      for (float& value : buffer) value = normal(random_);
    }
  }
  const float* next() { return buffers_[++calls_ % kNumBuffers].data() + random_() % (kWindowNumel / 16) * 16; }

 private:
  std::mt19937_64 random_;
  std::vector<float> buffers_[kNumBuffers];
  uint64_t calls_ = 0;
};

// One version and value format: a plan, a residual and the payloads of eight steps, in place of those of eight ranks.
class Arm {
 public:
  Arm(std::string name, Layout layout, bool version1)
      : name_(std::move(name)),
        layout_(std::move(layout)),
        version1_(version1),
        bytes_(version1 ? v1::num_payload_bytes(layout_) : payload_bytes(layout_)),
        plan_(layout_),
        residual_(static_cast<size_t>(layout_.numel)),
        gathered_(static_cast<size_t>(kWorldSize * bytes_)) {
    for (const Segment& segment : layout_.segments) residuals_.push_back(residual_.data() + segment.offset);
    selected_.indices.resize(static_cast<size_t>(layout_.selected_numel));
    selected_.values.resize(static_cast<size_t>(layout_.selected_numel));
  }

  const std::string& name() const { return name_; }
  int64_t bytes() const { return bytes_; }
  int64_t selected_numel() const { return layout_.selected_numel; }

  // As Bucket does it.
  void select_and_encode(const float* gradient, int64_t rank) {
    uint8_t* payload = gathered_.data() + rank * bytes_;
    const auto to =
        version1_ ? v1::payload_entries(layout_, payload) : v1::PayloadEntries{selected_.indices.data(), selected_.values.data()};
    const CompensateSelectStatistics selected =
        compensate_select(plan_, {gradient, GradientType::kFloat32, residuals_.data(), nullptr, to.indices, to.values}, in_one_go);
    const bool non_finite = selected.non_finite > 0;
    if (version1_) {
      v1::encode_header(layout_, rank, 0, non_finite, payload);
      return;
    }
    float* const* not_yet_kept = layout_.value_format == ValueFormat::kBFloat16 ? nullptr : residuals_.data();
    encode_selected(layout_, {to.values, to.indices, not_yet_kept, non_finite, payload}, in_one_go);
    encode_header(layout_, rank, 0, non_finite, payload);
  }

  void decode_all(float* bucket) {
    if (version1_) {
      require(v1::check_gathered(layout_, gathered_.data(), kWorldSize, 0), "a payload of version 1 is wrong");
      v1::decode_apply(layout_, gathered_.data(), kWorldSize, bucket);
      return;
    }
    require(check_payloads(layout_, gathered_.data(), kWorldSize, {0}, 0, in_one_go).empty(), "a payload is wrong");
    compressed_ddp::decode_apply(layout_, {gathered_.data(), kWorldSize, bucket, GradientType::kFloat32}, in_one_go);
  }

  std::vector<double> select_ms, decode_ms;

 private:
  std::string name_;
  Layout layout_;
  bool version1_;
  int64_t bytes_;
  CompensateSelect plan_;
  std::vector<float> residual_;
  std::vector<float*> residuals_;
  std::vector<uint8_t> gathered_;
  Entries selected_;
};

Layout make_layout(int64_t numel, int64_t group_numel, double density, ValueFormat value_format) {
  std::vector<int64_t> segments, groups, k;
  for (int64_t begin = 0; begin < numel; begin += group_numel) {
    groups.push_back(static_cast<int64_t>(segments.size()));
    segments.push_back(std::min(group_numel, numel - begin));
    k.push_back(selection_k(density, segments.back()));
  }
  return Layout::make(segments, groups, k, value_format);
}

void print(const Arm& arm, const char* stage, double density, const std::vector<double>& samples) {
  std::printf("{\"density\": %g, \"stage\": \"%s\", \"payload\": \"%s\", \"entries\": %lld, \"bytes\": %lld, \"cpu_ms\": [", density, stage,
              arm.name().c_str(), static_cast<long long>(arm.selected_numel()), static_cast<long long>(arm.bytes()));
  for (size_t i = 0; i < samples.size(); ++i) std::printf("%s%.5f", i == 0 ? "" : ", ", samples[i]);
  std::printf("]}\n");
}

void measure(int64_t numel, int64_t group_numel, double density, int64_t warmup_steps, int64_t turns, Gradients& gradients) {
  std::vector<std::unique_ptr<Arm>> arms;
  arms.push_back(std::make_unique<Arm>("v1", make_layout(numel, group_numel, density, ValueFormat::kFloat32), true));
  for (const ValueFormat value_format : {ValueFormat::kFloat32, ValueFormat::kBFloat16, ValueFormat::kSign})
    arms.push_back(std::make_unique<Arm>(name_of(value_format), make_layout(numel, group_numel, density, value_format), false));
  std::vector<float> outputs[kNumBuffers];
  for (auto& output : outputs) output.resize(static_cast<size_t>(numel));

  for (int64_t step = 0; step < warmup_steps + kWorldSize; ++step) {
    const float* gradient = gradients.next();
    for (const auto& arm : arms) arm->select_and_encode(gradient, step % kWorldSize);
  }
  uint64_t used = 0;                              // outputs rotate over all arms
  for (int64_t turn = -2; turn < turns; ++turn) { // two to warm up
    const float* gradient = gradients.next();
    for (const auto& arm : arms) {
      const double start = cpu_ms();
      arm->select_and_encode(gradient, (turn + kWorldSize) % kWorldSize);
      if (turn >= 0) arm->select_ms.push_back(cpu_ms() - start);
    }
    for (const auto& arm : arms) {
      float* output = outputs[used++ % kNumBuffers].data();
      const double start = cpu_ms();
      arm->decode_all(output);
      if (turn >= 0) arm->decode_ms.push_back(cpu_ms() - start);
    }
  }
  for (const auto& arm : arms) print(*arm, "select and encode", density, arm->select_ms);
  for (const auto& arm : arms) print(*arm, "decode of 8", density, arm->decode_ms);
  std::fflush(stdout);
}

} // namespace

int main(int argc, char** argv) {
  require(argc >= 6, "usage: NUMEL GROUP_NUMEL WARMUP_STEPS TURNS DENSITY..");
  const int64_t numel = std::atoll(argv[1]), group_numel = std::atoll(argv[2]);
  require(numel > 0 && group_numel > 0, "NUMEL and GROUP_NUMEL are above 0");
  Gradients gradients(numel);
  for (int i = 5; i < argc; ++i) measure(numel, group_numel, std::atof(argv[i]), std::atoll(argv[3]), std::atoll(argv[4]), gradients);
  return 0;
}
