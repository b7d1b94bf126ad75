// The CUDA stages on one case, and what the CPU engine makes of it.
#pragma once

#include "../selection_reference.h"
#include "cpu/encode.h"
#include "cuda/compensate_select.h"
#include "device_memory.h"

namespace compressed_ddp::testing {

constexpr int64_t kRank = 1;
constexpr int64_t kStep = 7;

struct EncodedCase {
  std::vector<uint8_t> payload;
  std::vector<float> residual; // of the whole bucket, after
  double gradient_sq = 0, residual_sq = 0, sent_sq = 0;
};

inline EncodedCase on_cpu(const SelectionCase& c) {
  EncodedCase result;
  CompensateSelect plan(c.layout);
  const Selection selection = run_selection(c, plan);
  result.payload.resize(static_cast<size_t>(payload_bytes(c.layout)));
  const EncodeStatistics dense =
      encode_dense(c.layout, c.gradient.data(), c.gradient.type(), c.unused.empty() ? nullptr : c.unused.data(), result.payload.data());
  const bool non_finite = selection.statistics.non_finite + dense.non_finite > 0;
  result.residual = selection.residual;
  const std::vector<float*> residuals = segment_pointers(c.layout, result.residual.data());
  const bool is_kept = c.layout.value_format == ValueFormat::kBFloat16 || c.residual.empty(); // by the selection, or by nobody
  const double lost_sq = encode_selected(
      c.layout,
      {selection.values.data(), selection.indices.data(), is_kept ? nullptr : residuals.data(), non_finite, result.payload.data()},
      in_one_go);
  encode_header(c.layout, kRank, kStep, non_finite, result.payload.data());
  result.gradient_sq = selection.statistics.gradient_sq + dense.gradient_sq;
  result.residual_sq = selection.statistics.residual_sq + lost_sq;
  result.sent_sq = selection.statistics.sent_sq - lost_sq;
  return result;
}

// A layout in device memory, with its scratch; serves any number of cases. The engine puts all tables into one allocation and the scratch
// into another; here each has one of its own, so that an access behind a table is one outside of known memory.
class CudaPlan {
 public:
  explicit CudaPlan(const Layout& layout) : layout_(layout), plan_(layout), statistics_(1) {
    // Pointers into memory of the host, which no kernel may use: each is moved.
    std::vector<uint8_t> tables(static_cast<size_t>(plan_.table_bytes())), scratch(static_cast<size_t>(plan_.workspace_bytes()));
    device_ = cuda::device_plan(plan_, tables.data(), scratch.data());
    move_table(plan_.tiles, device_.tiles);
    move_table(plan_.runs, device_.runs);
    move_table(plan_.large_groups, device_.large_groups);
    move_table(plan_.small_groups, device_.small_groups);
    move_table(plan_.dense_tiles, device_.dense_tiles);
    move_table(plan_.group_ranges, device_.group_ranges);
    move_table(plan_.segment_offsets, device_.segment_offsets);
    const size_t groups = plan_.large_groups.size(), tiles = plan_.tiles.size(), slots = static_cast<size_t>(plan_.slots_numel);
    move_scratch(groups, device_.states);
    move_scratch(1, device_.step);
    move_scratch(plan_.runs.size(), device_.look_back);
    move_scratch(groups * cuda::kGroupHistogramBins, device_.histograms);
    move_scratch(layout.value_format == ValueFormat::kSign ? groups * cuda::kExponents : 0, device_.significands);
    num_cleared_ = scratch_.size();
    for (DeviceMemory<uint8_t>& cleared : scratch_) cleared.fill_bytes(0);
    move_scratch(tiles, device_.tile_states);
    move_scratch(3 * (tiles + plan_.small_groups.size() + plan_.dense_tiles.size()), device_.sums);
    move_scratch(slots, device_.slot_values);
    move_scratch(slots, device_.slot_indices);
  }

  const cuda::Plan& plan() const { return plan_; }
  const cuda::DevicePlan& device() const { return device_; }

  // `residual_front`: entries in front of every segment's residual, which spoil its alignment.
  EncodedCase run(const SelectionCase& c, cuda::Method method, size_t gradient_front = 0, size_t residual_front = 0) {
    const auto gradient_bytes = static_cast<size_t>(c.layout.numel * element_bytes(c.gradient.type()));
    const auto* bytes = static_cast<const uint8_t*>(c.gradient.data());
    DeviceMemory<uint8_t> gradient(std::span(bytes, gradient_bytes),
                                   gradient_front * static_cast<size_t>(element_bytes(c.gradient.type())));
    std::vector<DeviceMemory<float>> residuals;
    std::vector<float*> pointers;
    for (const Segment& segment : layout_.segments) {
      if (c.residual.empty() || segment.group == kDenseGroup) {
        pointers.push_back(nullptr);
        continue;
      }
      residuals.emplace_back(std::span(c.residual).subspan(static_cast<size_t>(segment.offset), static_cast<size_t>(segment.numel)),
                             residual_front);
      pointers.push_back(residuals.back().data());
    }
    DeviceMemory<float*> table{std::span<float* const>(pointers)};
    DeviceMemory<uint8_t> unused{std::span<const uint8_t>(c.unused)};
    DeviceMemory<uint8_t> payload(static_cast<size_t>(payload_bytes(layout_)));
    payload.fill_bytes(0xa5);
    const cuda::SelectArguments arguments{gradient.data(),
                                          c.gradient.type(),
                                          c.residual.empty() ? nullptr : table.data(),
                                          c.unused.empty() ? nullptr : unused.data(),
                                          payload.data(),
                                          make_header(layout_, kRank, kStep, false),
                                          statistics_.data()};
    cuda::compensate_select_and_encode(device(), arguments, method, nullptr);
    require(cudaStreamSynchronize(nullptr), "compensate_select_and_encode");

    EncodedCase result;
    result.payload = payload.download();
    result.residual = c.residual;
    for (size_t s = 0, r = 0; s < pointers.size(); ++s) {
      if (pointers[s] == nullptr) continue;
      const std::vector<float> values = residuals[r++].download();
      std::copy(values.begin(), values.end(), result.residual.begin() + layout_.segments[s].offset);
    }
    const cuda::SelectStatistics sums = statistics_.download()[0];
    result.gradient_sq = sums.gradient_sq;
    result.residual_sq = sums.acc_sq - sums.sent_sq;
    result.sent_sq = sums.sent_sq;
    return result;
  }

  // What a selection must leave as it found it.
  bool workspace_is_clear() const {
    return std::all_of(scratch_.begin(), scratch_.begin() + static_cast<std::ptrdiff_t>(num_cleared_), [](const auto& part) {
      const std::vector<uint8_t> bytes = part.download();
      return std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0; });
    });
  }

 private:
  template <typename T>
  void move_table(const std::vector<T>& table, const T*& pointer) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(table.data());
    tables_.emplace_back(std::span(bytes, table.size() * sizeof(T)));
    pointer = reinterpret_cast<const T*>(tables_.back().data());
  }
  template <typename T>
  void move_scratch(size_t numel, T*& pointer) {
    scratch_.emplace_back(numel * sizeof(T));
    pointer = reinterpret_cast<T*>(scratch_.back().data());
  }

  Layout layout_;
  cuda::Plan plan_;
  cuda::DevicePlan device_{};
  std::vector<DeviceMemory<uint8_t>> tables_, scratch_;
  size_t num_cleared_ = 0; // the first so many parts of the scratch
  DeviceMemory<cuda::SelectStatistics> statistics_;
};

inline void expect_same_payload(const Layout& layout, const std::vector<uint8_t>& expected, const std::vector<uint8_t>& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  const PayloadHeader want = read_header(expected.data()), got = read_header(actual.data());
  ASSERT_EQ(want.flags, got.flags) << "(flags)";
  const Entries wanted = entries_of(layout, expected.data()), found = entries_of(layout, actual.data());
  ASSERT_EQ(wanted.indices.size(), found.indices.size()) << "(no payload)";
  for (size_t e = 0; e < wanted.indices.size(); ++e) {
    ASSERT_EQ(wanted.indices[e], found.indices[e]) << "index of entry " << e;
    ASSERT_EQ(bits_of(wanted.values[e]), bits_of(found.values[e])) << "value of entry " << e << " at index " << wanted.indices[e];
  }
  for (size_t b = 0; b < expected.size(); ++b) ASSERT_EQ(expected[b], actual[b]) << "byte " << b << " of the payload";
}

inline void expect_same(const Layout& layout, const EncodedCase& expected, const EncodedCase& actual) {
  expect_same_payload(layout, expected.payload, actual.payload);
  if (::testing::Test::HasFatalFailure()) return;
  ASSERT_TRUE(same_bits(expected.residual, actual.residual)) << "(residual)";
  EXPECT_TRUE(sums_near("gradient_sq", expected.gradient_sq, actual.gradient_sq, 1e-3));
  // Differences of fp32 sums: exact only relative to the larger one. (Of sent_sq with sign values only.)
  if (layout.value_format != ValueFormat::kSign) {
    EXPECT_TRUE(sums_near("sent_sq", expected.sent_sq, actual.sent_sq, 1e-3));
  } else {
    EXPECT_NEAR(expected.sent_sq, actual.sent_sq, 1e-3 * (expected.residual_sq + expected.sent_sq) + 1e-30);
  }
  if (std::isfinite(expected.residual_sq)) {
    EXPECT_NEAR(expected.residual_sq, actual.residual_sq, 1e-3 * (expected.residual_sq + expected.sent_sq) + 1e-30);
  }
}

} // namespace compressed_ddp::testing
