#include "compensate_select.h"

#include <algorithm>
#include <cmath>

namespace compressed_ddp {
namespace {

// 256 KiB of residual per block: block, candidates and gradient stay in a 512 KiB second-level cache between filter and store.
constexpr int64_t kBlockNumel = 65536;

// The sample: whole cache lines of 16 entries, at least 64 of them; small groups are sampled whole. A sampled entry costs about as
// much as a candidate that is not selected in the end, and n samples of a group leave kMarginSigmas * numel * sqrt(density / n) of
// those, so their sum is least near n = (2 * numel * sqrt(density))^(2/3).
constexpr int64_t kSampleLine = 16;
constexpr int64_t kMinSampleLines = 64;
// The guess is the sample's key of rank expected + margin. On random data it is too high less than once in 10^4 selections, which
// then cost twice the time; a margin of six sigmas cost 10 to 60 % of every selection (density 0.01, ResNet-50's layers most).
constexpr double kMarginSigmas = 4;
constexpr double kMarginEntries = 4;
constexpr int64_t kPrefetchLines = 16;

// The key of rank `rank` (0 = largest); reorders keys.
uint32_t select_key(std::vector<uint32_t>& keys, int64_t rank) {
  std::nth_element(keys.begin(), keys.begin() + rank, keys.end(), std::greater<>());
  return keys[static_cast<size_t>(rank)];
}

// The key of the count-th largest of a stream, without keeping the rest; keys of 0 do not count.
class LargestKeys {
 public:
  explicit LargestKeys(int64_t count) : count_(count) { keys_.reserve(static_cast<size_t>(2 * count)); }
  void add(uint32_t key) {
    if (key <= floor_) return;
    keys_.push_back(key);
    if (static_cast<int64_t>(keys_.size()) == 2 * count_) {
      floor_ = select_key(keys_, count_ - 1);
      keys_.resize(static_cast<size_t>(count_));
    }
  }
  uint32_t smallest() { return static_cast<int64_t>(keys_.size()) < count_ ? 0 : select_key(keys_, count_ - 1); } // 0: fewer were added

 private:
  int64_t count_;
  std::vector<uint32_t> keys_;
  uint32_t floor_ = 0; // `count` keys so far are at least this
};

} // namespace

int64_t sample_lines(int64_t numel, int64_t k) {
  const double n = static_cast<double>(numel), density = static_cast<double>(k) / n;
  const auto lines = static_cast<int64_t>(std::pow(2 * n * std::sqrt(density), 2.0 / 3)) / kSampleLine;
  return std::min(std::max(kMinSampleLines, lines), (numel + kSampleLine - 1) / kSampleLine);
}

int64_t sample_position(int64_t line, int64_t num_lines, int64_t numel) {
  const int64_t begin = static_cast<int64_t>(static_cast<__int128>(numel) * line / num_lines);
  const int64_t end = static_cast<int64_t>(static_cast<__int128>(numel) * (line + 1) / num_lines);
  const int64_t slots = std::max<int64_t>(1, (end - begin) / kSampleLine);
  const uint64_t mixed = static_cast<uint64_t>(line) * 0x9e3779b97f4a7c15ull;
  return begin + static_cast<int64_t>((mixed >> 33) % static_cast<uint64_t>(slots)) * kSampleLine;
}

CompensateSelect::CompensateSelect(const Layout& layout, const FilterKernels& kernels, EmitKernel emit)
    : kernels_(kernels), emit_(emit), kept_(layout.value_format == ValueFormat::kBFloat16 ? Kept::kLostByBFloat16 : Kept::kZero) {
  for (const Group& group : layout.groups) {
    GroupState state{};
    state.first_block = num_blocks();
    state.k = group.k;
    state.entry_offset = group.entry_offset;
    state.numel = group.numel;
    const auto group_index = static_cast<int32_t>(groups_.size());
    for (int32_t s = group.first_segment; s <= group.last_segment; ++s) {
      const Segment& segment = layout.segments[static_cast<size_t>(s)];
      if (segment.group != group_index) continue;
      for (int64_t at = 0; at < segment.numel; at += kBlockNumel) {
        Block block{};
        block.offset = segment.offset + at;
        block.segment_offset = at;
        block.numel = static_cast<int32_t>(std::min(kBlockNumel, segment.numel - at));
        block.segment = s;
        block.group = group_index;
        block.scratch_offset = scratch_numel_;
        scratch_numel_ += block.numel + kFilterSlack;
        blocks_.push_back(block);
      }
    }
    state.end_block = num_blocks();
    groups_.push_back(state);
  }
}

void CompensateSelect::begin(const CompensateSelectArguments& arguments) {
  arguments_ = arguments;
  // Only the pages that candidates really reach are ever touched, so a generous share per block costs address space, not memory.
  if (scratch_->numel < scratch_numel_) {
    scratch_->values.reset(new float[static_cast<size_t>(scratch_numel_)]);
    scratch_->indices.reset(new int32_t[static_cast<size_t>(scratch_numel_)]);
    scratch_->numel = scratch_numel_;
  }
  for (Block& block : blocks_) {
    block.unused = arguments.unused != nullptr && arguments.unused[block.segment] != 0;
    block.filtered = {};
    block.sent_sq = block.rejected_sq = 0;
  }
}

float* CompensateSelect::residual_of(const Block& block) const {
  return arguments_.residuals == nullptr ? nullptr : arguments_.residuals[block.segment] + block.segment_offset;
}
float* CompensateSelect::candidate_values(int64_t block) const {
  return scratch_->values.get() + blocks_[static_cast<size_t>(block)].scratch_offset;
}
int32_t* CompensateSelect::candidate_indices(int64_t block) const {
  return scratch_->indices.get() + blocks_[static_cast<size_t>(block)].scratch_offset;
}

FilterArguments CompensateSelect::filter_arguments(int64_t index) const {
  const Block& block = blocks_[static_cast<size_t>(index)];
  const auto* gradient = static_cast<const uint8_t*>(arguments_.gradient) + block.offset * element_bytes(arguments_.type);
  return {gradient,
          residual_of(block),
          block.numel,
          groups_[static_cast<size_t>(block.group)].low_key,
          candidate_values(index),
          candidate_indices(index)};
}

float CompensateSelect::acc_at(const Block& block, int64_t i) const {
  if (block.unused) return 0;
  const float gradient = with_gradient_type(
      arguments_.type, [&](auto type) { return to_float(static_cast<const decltype(type)*>(arguments_.gradient)[block.offset + i]); });
  const float* residual = residual_of(block);
  return residual == nullptr ? gradient : gradient + residual[i];
}

// ---- guess

uint32_t CompensateSelect::guess(const GroupState& group) const {
  const int64_t num_lines = sample_lines(group.numel, group.k);
  const int64_t sampled = std::min(num_lines * kSampleLine, group.numel);
  const bool everything = sampled == group.numel;
  const double expected = static_cast<double>(group.k) * static_cast<double>(sampled) / static_cast<double>(group.numel);
  const int64_t rank = everything ? group.k : static_cast<int64_t>(expected + kMarginSigmas * std::sqrt(expected) + kMarginEntries);
  if (rank >= sampled) return 1;

  // Sample positions ascend, so one walk over the group's blocks finds them; block_begin is the block's first entry in the group.
  struct Line {
    const Block* block;
    int64_t at;
  };
  std::vector<Line> lines;
  lines.reserve(static_cast<size_t>(num_lines));
  int64_t block = group.first_block, block_begin = 0;
  for (int64_t line = 0; line < num_lines; ++line) {
    const int64_t position = everything ? line * kSampleLine : sample_position(line, num_lines, group.numel);
    while (position >= block_begin + blocks_[static_cast<size_t>(block)].numel) block_begin += blocks_[static_cast<size_t>(block++)].numel;
    lines.push_back({&blocks_[static_cast<size_t>(block)], position - block_begin});
  }
  LargestKeys largest(rank);
  const int64_t bytes = element_bytes(arguments_.type);
  for (int64_t line = 0; line < num_lines; ++line) {
    if (line + kPrefetchLines < num_lines) {
      const Line& ahead = lines[static_cast<size_t>(line + kPrefetchLines)];
      __builtin_prefetch(static_cast<const uint8_t*>(arguments_.gradient) + (ahead.block->offset + ahead.at) * bytes);
      if (arguments_.residuals != nullptr) __builtin_prefetch(residual_of(*ahead.block) + ahead.at);
    }
    const Line& here = lines[static_cast<size_t>(line)];
    if (here.block->unused) continue; // zeros, which do not count
    const int64_t end = std::min<int64_t>(here.at + kSampleLine, here.block->numel);
    const float* residual = residual_of(*here.block);
    with_gradient_type(arguments_.type, [&](auto type) {
      const auto* gradient = static_cast<const decltype(type)*>(arguments_.gradient) + here.block->offset;
      for (int64_t i = here.at; i < end; ++i) {
        largest.add(selection_key(residual == nullptr ? to_float(gradient[i]) : to_float(gradient[i]) + residual[i]));
      }
    });
  }
  return std::clamp<uint32_t>(largest.smallest(), 1, kInfinityKey);
}

void CompensateSelect::guess_groups(int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) groups_[static_cast<size_t>(g)].low_key = guess(groups_[static_cast<size_t>(g)]);
}

// ---- filter

void CompensateSelect::filter_blocks(int64_t begin, int64_t end) {
  const auto source = arguments_.residuals == nullptr ? FilterSource::kGradient : FilterSource::kCompensate;
  const FilterKernel kernel = kernels_.of(arguments_.type, source, kept_);
  for (int64_t b = begin; b < end; ++b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    if (!block.unused) block.filtered = kernel(filter_arguments(b));
  }
}

// ---- refine

// After a guess that was too high: put the candidates back, find a low key that is surely low enough from a histogram, filter again.
void CompensateSelect::filter_again(GroupState& group) {
  struct Odd { // a non-finite candidate: its acc is nowhere but here
    int32_t index;
    float value;
    float residual;
  };
  constexpr int kShift = 20; // exponent and 3 bits: 2048 bins of an eighth of an octave
  std::vector<int64_t> histogram(size_t{1} << (31 - kShift));
  std::vector<std::vector<Odd>> odd(static_cast<size_t>(group.end_block - group.first_block));
  const bool has_residual = arguments_.residuals != nullptr;
  for (int64_t b = group.first_block; b < group.end_block; ++b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    if (block.unused) continue;
    float* residual = residual_of(block);
    for (int64_t c = 0; has_residual && c < block.filtered.count; ++c) {
      const int32_t i = candidate_indices(b)[c];
      const float value = candidate_values(b)[c];
      if (is_finite_key(selection_key(value))) {
        residual[i] = value;
      } else {
        odd[static_cast<size_t>(b - group.first_block)].push_back({i, value, residual[i]});
        residual[i] = 0; // never a candidate in the second filter; put right below
        ++histogram.back();
      }
    }
    for (int64_t i = 0; i < block.numel; ++i) ++histogram[selection_key(has_residual ? residual[i] : acc_at(block, i)) >> kShift];
  }
  int64_t above = 0;
  auto bin = static_cast<int64_t>(histogram.size()) - 1;
  while (bin > 0 && (above += histogram[static_cast<size_t>(bin)]) < group.k) --bin;
  group.low_key = std::clamp<uint32_t>(static_cast<uint32_t>(bin) << kShift, 1, kInfinityKey);

  const auto source = has_residual ? FilterSource::kResidual : FilterSource::kGradient;
  const FilterKernel kernel = kernels_.of(arguments_.type, source, kept_);
  for (int64_t b = group.first_block; b < group.end_block; ++b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    if (block.unused) continue;
    const float gradient_sq = block.filtered.gradient_sq;
    block.filtered = kernel(filter_arguments(b));
    block.filtered.gradient_sq = gradient_sq;
    // Merge the non-finite ones back in index order, from the end, in place.
    const auto& entries = odd[static_cast<size_t>(b - group.first_block)];
    int64_t from = block.filtered.count - 1;
    block.filtered.count += static_cast<int64_t>(entries.size());
    block.filtered.non_finite += static_cast<int64_t>(entries.size());
    int64_t to = block.filtered.count - 1;
    float* values = candidate_values(b);
    int32_t* indices = candidate_indices(b);
    for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) {
      for (; from >= 0 && indices[from] > entry->index; --from, --to) {
        values[to] = values[from];
        indices[to] = indices[from];
      }
      values[to] = entry->value;
      indices[to--] = entry->index;
      residual_of(block)[entry->index] = entry->residual;
    }
  }
}

// Exact key of rank k among the candidates, and how many of those equal to it are to be taken.
void CompensateSelect::set_threshold(GroupState& group, int64_t num_candidates) {
  constexpr int64_t kSmall = 4096; // below: copy and select at once
  constexpr int kBins = 4096;      // 16 KiB: stays in the first-level cache
  constexpr int kBinShift = 13;    // 4096 bins of 2^13 keys cover the four octaves above the low key, where nearly all candidates lie
  std::vector<uint32_t> keys;
  int64_t rank = group.k - 1; // counted from the largest
  const auto for_each_key = [&](auto&& function) {
    for (int64_t b = group.first_block; b < group.end_block; ++b) {
      const float* values = candidate_values(b);
      for (int64_t c = 0; c < blocks_[static_cast<size_t>(b)].filtered.count; ++c) function(selection_key(values[c]));
    }
  };
  if (num_candidates <= kSmall) {
    keys.reserve(static_cast<size_t>(num_candidates));
    for_each_key([&](uint32_t key) { keys.push_back(key); });
  } else {
    const auto bin_of = [low = group.low_key](uint32_t key) { return std::min<uint32_t>((key - low) >> kBinShift, kBins - 1); };
    std::vector<int64_t> histogram(kBins);
    for_each_key([&](uint32_t key) { ++histogram[bin_of(key)]; });
    uint32_t bin = kBins - 1;
    for (; rank >= histogram[bin]; --bin) rank -= histogram[bin];
    keys.reserve(static_cast<size_t>(histogram[bin]));
    for_each_key([&](uint32_t key) {
      if (bin_of(key) == bin) keys.push_back(key);
    });
  }
  group.threshold = select_key(keys, rank);
  // nth_element left the larger keys of this bin in front.
  const auto greater = std::count_if(keys.begin(), keys.begin() + rank, [&](uint32_t key) { return key > group.threshold; });
  group.ties = rank + 1 - greater;
}

void CompensateSelect::refine_groups(int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g) {
    GroupState& group = groups_[static_cast<size_t>(g)];
    const auto count_candidates = [&] {
      int64_t count = 0;
      for (int64_t b = group.first_block; b < group.end_block; ++b) count += blocks_[static_cast<size_t>(b)].filtered.count;
      return count;
    };
    int64_t num_candidates = count_candidates();
    if (num_candidates < group.k && group.low_key > 1) {
      filter_again(group);
      num_candidates = count_candidates();
    }
    if (num_candidates >= group.k) {
      set_threshold(group, num_candidates);
    } else { // the low key is 1: every non-zero entry is a candidate, the rest of the k are zeros
      group.threshold = 0;
      group.ties = group.k - num_candidates;
    }
  }
}

// ---- emit

void CompensateSelect::count_blocks(int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    const uint32_t threshold = groups_[static_cast<size_t>(block.group)].threshold;
    const float* values = candidate_values(b);
    block.greater = block.equal = 0;
    for (int64_t c = 0; c < block.filtered.count; ++c) {
      const uint32_t key = selection_key(values[c]);
      block.greater += key > threshold;
      block.equal += key == threshold;
    }
    if (threshold == 0) block.equal = block.numel - block.filtered.count; // the zeros
  }
}

void CompensateSelect::place_blocks() {
  for (const GroupState& group : groups_) {
    int64_t out = group.entry_offset;
    int64_t ties = group.ties;
    for (int64_t b = group.first_block; b < group.end_block; ++b) {
      Block& block = blocks_[static_cast<size_t>(b)];
      block.out = out;
      block.ties = std::min(ties, block.equal);
      ties -= block.ties;
      out += block.greater + block.ties;
    }
  }
}

// All candidates of the block are selected, and `block.ties` of its zero entries, lowest index first.
void CompensateSelect::emit_with_zeros(Block& block, int64_t b) {
  const int64_t end = block.out + block.greater + block.ties;
  int64_t zeros = block.ties, candidate = 0, out = block.out;
  for (int64_t i = 0; i < block.numel && out < end; ++i) {
    float value;
    if (candidate < block.filtered.count && candidate_indices(b)[candidate] == i) {
      value = candidate_values(b)[candidate++];
    } else if (zeros > 0) {
      --zeros;
      // The entry is +0 or -0. With a residual, acc lies there by now, and what stays behind is acc - acc = +0.
      float* residual = residual_of(block);
      if (block.unused) {
        value = 0;
      } else if (residual != nullptr) {
        value = residual[i];
        residual[i] = 0;
      } else {
        value = acc_at(block, i);
      }
    } else {
      continue;
    }
    const uint32_t key = selection_key(value);
    arguments_.values[out] = key == kNanKey ? std::bit_cast<float>(kCanonicalNanBits) : value;
    arguments_.indices[out++] = static_cast<int32_t>(block.offset + i);
    if (is_finite_key(key)) block.sent_sq += static_cast<double>(value) * value;
  }
}

void CompensateSelect::emit_blocks(int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Block& block = blocks_[static_cast<size_t>(b)];
    const uint32_t threshold = groups_[static_cast<size_t>(block.group)].threshold;
    if (threshold == 0 && block.ties > 0) {
      emit_with_zeros(block, b);
      continue;
    }
    const EmitResult result =
        emit_({candidate_values(b), candidate_indices(b), block.filtered.count, block.greater + block.ties, block.ties, threshold,
               static_cast<int32_t>(block.offset), residual_of(block), arguments_.values + block.out, arguments_.indices + block.out});
    block.sent_sq = result.sent_sq;
    block.rejected_sq = result.rejected_sq;
  }
}

CompensateSelectStatistics CompensateSelect::statistics() const {
  CompensateSelectStatistics sum;
  for (const Block& block : blocks_) {
    sum.gradient_sq += static_cast<double>(block.filtered.gradient_sq);
    sum.residual_sq += static_cast<double>(block.filtered.residual_sq) + block.rejected_sq;
    sum.sent_sq += block.sent_sq;
    sum.non_finite += block.filtered.non_finite;
  }
  return sum;
}

} // namespace compressed_ddp
