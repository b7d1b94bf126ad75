// Stage 1, compensate_select_: error feedback fused into exact Top-K selection. Torch-free.
//
// For every group of the layout, over its entries in bucket order:
//   acc = gradient + residual                                   (fp32, one rounding)
//   select exactly k entries by key(|acc|), larger key first, then lower index  (float_types.h defines the key)
//   residual = acc where not selected, 0 where selected; a non-finite acc is never stored: the residual keeps its old value
//   (in a layout with bf16 values: what the rounding loses of acc, where selected; encode then has nothing to give back)
// Selected entries come out in ascending index order, values as fp32 (every NaN as 0x7fc00000).
// The result is a function of the inputs alone: not of the number of threads, the instruction set or the guess below.
//
// Method (one pass over all entries, then work on candidates; EF-SGD of Karimireddy et al. 2019 with Stich's k-contraction):
//   guess    a low key per group from a sample, so that a few more than k entries lie above it
//   filter   compensate, keep what is below, append what is above to the block's candidates (compensate_select_filter.h)
//   refine   exact k-th key T and the number of ties to take, from the candidates alone
//   emit     selected candidates to the output in order; the others go back to the residual (compensate_select_emit.h)
// A guess that was too high (fewer than k candidates) is detected in refine and mended there; too low only costs time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../layout.h"
#include "compensate_select_emit.h"
#include "compensate_select_filter.h"
#include "float_types.h"

namespace compressed_ddp {

// What one call works on. Pointers may change from call to call; the layout may not.
struct CompensateSelectArguments {
  const void* gradient; // [numel] flat bucket
  GradientType type;
  float* const* residuals; // per segment: [segment numel], ignored for dense segments; nullptr = no error feedback
  const uint8_t* unused;   // per segment: 1 = this rank has no gradient there, treat acc as 0 and leave the residual alone; or nullptr
  int32_t* indices;        // out [selected_numel]
  float* values;           // out [selected_numel]
};

struct CompensateSelectStatistics { // over the compressed segments; summed block by block in bucket order
  double gradient_sq = 0;           // |gradient|^2
  double residual_sq = 0;           // |acc - sent|^2, whether or not it is kept
  double sent_sq = 0;               // |sent|^2 of the finite entries
  int64_t non_finite = 0;           // entries whose acc is Inf or NaN
};

// The plan for one layout and the scratch of one call. Not thread-safe; phases are called in the order of `compensate_select`.
class CompensateSelect {
 public:
  explicit CompensateSelect(const Layout& layout, const FilterKernels& kernels = best_filter(), EmitKernel emit = best_emit());
  CompensateSelect(const CompensateSelect&) = delete; // nor moved: scratch_ may point into the object itself
  CompensateSelect& operator=(const CompensateSelect&) = delete;

  int64_t num_groups() const { return static_cast<int64_t>(groups_.size()); }
  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }

  void begin(const CompensateSelectArguments& arguments);
  void guess_groups(int64_t begin, int64_t end);  // parallel over groups
  void filter_blocks(int64_t begin, int64_t end); // parallel over blocks
  void refine_groups(int64_t begin, int64_t end); // parallel over groups
  void count_blocks(int64_t begin, int64_t end);  // parallel over blocks
  void place_blocks();                            // serial: output position of every block
  void emit_blocks(int64_t begin, int64_t end);   // parallel over blocks
  CompensateSelectStatistics statistics() const;

  // Candidates are scratch: all plans of one engine share it, since selections never overlap in time.
  struct Scratch {
    std::unique_ptr<float[]> values;
    std::unique_ptr<int32_t[]> indices;
    int64_t numel = 0;
  };
  void use_scratch(Scratch& scratch) { scratch_ = &scratch; }

 private:
  struct Block {            // at most kBlockNumel entries of one segment
    int64_t offset;         // in the bucket
    int64_t segment_offset; // in its segment
    int32_t numel;
    int32_t segment;
    int32_t group;
    bool unused = false;
    int64_t scratch_offset = 0; // of its candidates
    FilterResult filtered;      // of this call
    int64_t greater = 0;        // candidates above the threshold
    int64_t equal = 0;          // candidates at it
    int64_t out = 0;            // where its first selected entry goes
    int64_t ties = 0;           // of `equal`, how many are selected
    double sent_sq = 0;
    double rejected_sq = 0;
  };
  struct GroupState {
    int64_t first_block, end_block;
    int64_t k, entry_offset, numel;
    uint32_t low_key = 1;
    uint32_t threshold = 0; // key of the k-th entry; 0 = zeros have to be sent
    int64_t ties = 0;       // entries at the threshold to take, lowest index first
  };

  FilterArguments filter_arguments(int64_t block) const;
  float* residual_of(const Block& block) const;
  float* candidate_values(int64_t block) const;
  int32_t* candidate_indices(int64_t block) const;
  float acc_at(const Block& block, int64_t i) const;
  uint32_t guess(const GroupState& group) const;
  void filter_again(GroupState& group);
  void set_threshold(GroupState& group, int64_t num_candidates);
  void emit_with_zeros(Block& block, int64_t index);

  std::vector<Block> blocks_;
  std::vector<GroupState> groups_;
  const FilterKernels& kernels_;
  EmitKernel emit_;
  Kept kept_;
  CompensateSelectArguments arguments_{};
  int64_t scratch_numel_ = 0;
  Scratch own_scratch_;
  Scratch* scratch_ = &own_scratch_;
};

// How many cache lines the guess samples of a group of `numel` entries of which k are selected.
int64_t sample_lines(int64_t numel, int64_t k);

// Where sampled line `line` of `num_lines` begins in a group of `numel` entries: spread evenly, moved by a fixed hash so that
// periodic data is not hit in step. Here so that a test can aim at the sample and make the guess fail.
int64_t sample_position(int64_t line, int64_t num_lines, int64_t numel);

// Runs all phases. parallel_for(count, function(begin, end)) covers [0, count) with disjoint ranges, in any order.
template <typename ParallelFor>
CompensateSelectStatistics compensate_select(CompensateSelect& plan, const CompensateSelectArguments& arguments,
                                             ParallelFor&& parallel_for) {
  plan.begin(arguments);
  parallel_for(plan.num_groups(), [&](int64_t begin, int64_t end) { plan.guess_groups(begin, end); });
  parallel_for(plan.num_blocks(), [&](int64_t begin, int64_t end) { plan.filter_blocks(begin, end); });
  parallel_for(plan.num_groups(), [&](int64_t begin, int64_t end) { plan.refine_groups(begin, end); });
  parallel_for(plan.num_blocks(), [&](int64_t begin, int64_t end) { plan.count_blocks(begin, end); });
  plan.place_blocks();
  parallel_for(plan.num_blocks(), [&](int64_t begin, int64_t end) { plan.emit_blocks(begin, end); });
  return plan.statistics();
}

} // namespace compressed_ddp
