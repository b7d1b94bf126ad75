// Very many tiny launch sequences on several streams at once, always against the CPU engine: what goes wrong once in a hundred thousand
// launches (a ticket, a look-back, a fence) shows here. Every sequence starts from the residual that the one before it left, so one wrong
// bit in any of them is still there when the next comparison comes.
//
//   COMPRESSED_DDP_STRESS_SEQUENCES   how many, of up to eight launches each (default 2000)
//   COMPRESSED_DDP_STRESS_PART        "2/4": the second of four parts, with a quarter of the sequences and data of its own
#include <cstdlib>
#include <optional>
#include <stdexcept>

#include "cpu/decode_apply.h"
#include "cuda/decode_apply.h"
#include "cuda_cases.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using Numbers = std::vector<int64_t>;

constexpr int64_t kBatch = 1000; // sequences between two comparisons
constexpr int64_t kNumGradients = 5;
constexpr int64_t kLongLanePeriod = 16; // the lane whose groups have several runs takes part in every so many'th sequence

struct Part {
  int64_t index = 0, count = 1, sequences = 2000;
};

Part part_from_environment() {
  Part part;
  if (const char* sequences = std::getenv("COMPRESSED_DDP_STRESS_SEQUENCES")) part.sequences = std::atoll(sequences);
  if (const char* text = std::getenv("COMPRESSED_DDP_STRESS_PART")) {
    long long index = 0, count = 0;
    if (std::sscanf(text, "%lld/%lld", &index, &count) != 2 || index < 1 || index > count)
      throw std::invalid_argument("COMPRESSED_DDP_STRESS_PART: expected i/n with 1 <= i <= n, got " + std::string(text));
    part.index = index - 1;
    part.count = count;
  }
  part.sequences /= part.count;
  if (part.sequences < 1) throw std::invalid_argument("COMPRESSED_DDP_STRESS_SEQUENCES: expected at least one sequence per part");
  return part;
}

// One bucket on one stream, and the same bucket on the CPU.
class Lane {
 public:
  Lane(const char* name, const Layout& layout, GradientType type, uint64_t seed)
      : name_(name),
        layout_(layout),
        type_(type),
        plan_(layout),
        cpu_plan_(layout),
        cpu_residual_(static_cast<size_t>(layout.numel)),
        cpu_indices_(static_cast<size_t>(layout.selected_numel)),
        cpu_values_(static_cast<size_t>(layout.selected_numel)),
        residual_(std::span<const float>(cpu_residual_)),
        payload_(static_cast<size_t>(payload_bytes(layout))),
        bucket_(static_cast<size_t>(layout.numel * element_bytes(type))),
        status_(1),
        statistics_(1) {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    for (int64_t i = 0; i < kNumGradients; ++i) {
      cpu_gradients_.emplace_back(type, normal_values(layout.numel, seed + static_cast<uint64_t>(i)));
      const auto* bytes = static_cast<const uint8_t*>(cpu_gradients_.back().data());
      gradients_.emplace_back(std::span<const uint8_t>(bytes, bucket_.size()));
    }
    std::vector<float*> pointers = segment_pointers(layout_, residual_.data());
    for (size_t s = 0; s < pointers.size(); ++s)
      if (layout_.segments[s].group == kDenseGroup) pointers[s] = nullptr;
    residual_table_.emplace(std::span<float* const>(pointers));
    status_.fill_bytes(0);
    payload_.fill_bytes(0xa5);
    require(cudaDeviceSynchronize(), "setting up"); // what was set up on the default stream, our stream does not wait for
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  ~Lane() { cudaStreamDestroy(stream_); }

  // select and encode, then decode of what came out.
  void enqueue() {
    const cuda::SelectArguments select{gradients_[gradient_of(enqueued_)].data(),
                                       type_,
                                       residual_table_->data(),
                                       nullptr,
                                       payload_.data(),
                                       make_header(layout_, 0, enqueued_, false),
                                       statistics_.data()};
    const auto method = enqueued_ % 3 == 2 ? cuda::Method::kTwoPasses : cuda::Method::kOnePass;
    cuda::compensate_select_and_encode(plan_.device(), select, method, stream_);
    const cuda::DecodeArguments decode{payload_.data(), 1, bucket_.data(), type_, make_header(layout_, 0, enqueued_, false),
                                       status_.data()};
    cuda::decode_apply(plan_.device(), decode, stream_);
    ++enqueued_;
  }

  // Waits for the stream, takes the same steps on the CPU and compares.
  void expect_as_on_cpu() {
    if (compared_ == enqueued_) return;
    SCOPED_TRACE(std::string(name_) + ", sequences " + std::to_string(compared_) + " .. " + std::to_string(enqueued_ - 1));
    while (compared_ < enqueued_) step_on_cpu(compared_++);
    std::vector<uint8_t> payload(payload_.size());
    encode_selected(layout_, {cpu_values_.data(), cpu_indices_.data(), nullptr, false, payload.data()}, in_one_go); // fp32 loses nothing
    const int64_t last = enqueued_ - 1;
    TypedBuffer& gradient = cpu_gradients_[gradient_of(last)];
    encode_dense(layout_, gradient.data(), type_, nullptr, payload.data());
    encode_header(layout_, 0, last, false, payload.data());
    TypedBuffer bucket(type_, layout_.numel);
    decode_apply(layout_, {payload.data(), 1, bucket.data(), type_}, in_one_go);

    require(cudaStreamSynchronize(stream_), "the launches");
    expect_same_payload(layout_, payload, payload_.download());
    if (::testing::Test::HasFatalFailure()) return;
    ASSERT_TRUE(same_bits(cpu_residual_, residual_.download())) << "(residual)";
    const auto* bytes = static_cast<const uint8_t*>(bucket.data());
    ASSERT_EQ(std::vector<uint8_t>(bytes, bytes + bucket_.size()), bucket_.download()) << "(bucket)";
    ASSERT_EQ(status_.download()[0].bad_rank, 0u);
    ASSERT_EQ(status_.download()[0].step_is_bad, 0u);
    ASSERT_TRUE(plan_.workspace_is_clear());
  }

 private:
  static size_t gradient_of(int64_t step) { return static_cast<size_t>(step % kNumGradients); }

  void step_on_cpu(int64_t step) {
    TypedBuffer& gradient = cpu_gradients_[gradient_of(step)];
    compensate_select(
        cpu_plan_,
        {gradient.data(), type_, segment_pointers(layout_, cpu_residual_.data()).data(), nullptr, cpu_indices_.data(), cpu_values_.data()},
        all_cuts()[0].parallel_for);
  }

  const char* name_;
  Layout layout_;
  GradientType type_;
  CudaPlan plan_;
  CompensateSelect cpu_plan_;
  std::vector<float> cpu_residual_;
  std::vector<int32_t> cpu_indices_;
  std::vector<float> cpu_values_;
  std::vector<TypedBuffer> cpu_gradients_;
  DeviceMemory<float> residual_;
  DeviceMemory<uint8_t> payload_, bucket_;
  DeviceMemory<cuda::DecodeStatus> status_;
  DeviceMemory<cuda::SelectStatistics> statistics_;
  std::vector<DeviceMemory<uint8_t>> gradients_;
  std::optional<DeviceMemory<float*>> residual_table_;
  cudaStream_t stream_ = nullptr;
  int64_t enqueued_ = 0, compared_ = 0;
};

TEST(LaunchStress, EveryTinySequenceEqualsTheCpuEngine) {
  const Part part = part_from_environment();
  const uint64_t seed = 1000 + 100 * static_cast<uint64_t>(part.index);
  SCOPED_TRACE("part " + std::to_string(part.index + 1) + "/" + std::to_string(part.count) + ", " + std::to_string(part.sequences) +
               " sequences, seed " + std::to_string(seed));
  const int64_t t = cuda::kTileNumel;
  // A small group, a group of two segments and three tiles with a dense segment between them, and nothing else.
  const Layout tiny = Layout::make(Numbers{300, t + 77, 50, 900}, Numbers{0, 1, kDenseGroup, 1}, Numbers{3, 60});
  const Layout several_runs = Layout::make(Numbers{17 * t + 5, 700}, Numbers{0, 1}, Numbers{700, 1});
  Lane first("tiny, float32", tiny, GradientType::kFloat32, seed);
  Lane second("tiny, bfloat16", tiny, GradientType::kBFloat16, seed + 10);
  Lane third("several runs, float32", several_runs, GradientType::kFloat32, seed + 20);

  int64_t until_comparison = kBatch;
  for (int64_t sequence = 0; sequence < part.sequences; ++sequence) {
    Lane& lane = sequence % kLongLanePeriod == 0 ? third : sequence % 2 == 0 ? first : second;
    lane.enqueue();
    if (--until_comparison > 0 && sequence + 1 < part.sequences) continue;
    until_comparison = kBatch;
    for (Lane* each : {&first, &second, &third}) {
      each->expect_as_on_cpu();
      if (HasFatalFailure()) return;
    }
  }
}

} // namespace
} // namespace compressed_ddp
