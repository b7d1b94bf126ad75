// The last phase of compensate_select on one block: selected candidates go to the output, the others back to the residual.
//
// A candidate is selected if its key is above the threshold, or equal to it and among the first `ties` of those. Values are written
// as they are, every NaN as 0x7fc00000. A finite candidate that is not selected is stored in the residual; a non-finite one is not,
// since the residual still holds its old value (architecture.md, contract 6).
#pragma once

#include <cstdint>

#include "float_types.h"

namespace compressed_ddp {

struct EmitArguments {
  float* values;       // [count + kFilterSlack] candidates of compensate_select_filter.h; overwritten
  int32_t* indices;    // same; position in the block
  int64_t count;       // candidates
  int64_t selected;    // of them: those above the threshold, and `ties`
  int64_t ties;        // selected at the threshold, lowest index first
  uint32_t threshold;  // selection_key of the k-th entry
  int32_t first_index; // of the block in the bucket
  float* residual;     // of the block; nullptr = none
  float* out_values;   // [selected]; nothing is written beyond
  int32_t* out_indices;
};

struct EmitResult {
  double sent_sq = 0;     // sum of value^2 over the finite selected entries, in an order fixed by the kernel
  double rejected_sq = 0; // over the finite others
};

using EmitKernel = EmitResult (*)(const EmitArguments&);

EmitResult emit_portable(const EmitArguments& arguments);
#if COMPRESSED_DDP_X86
EmitResult emit_avx2(const EmitArguments& arguments);
#endif

// The widest kernel that this processor runs; decided once per process.
EmitKernel best_emit();

// Where one kernel stands; the vector kernel goes on from it entry by entry.
struct EmitProgress {
  int64_t candidate = 0; // read so far
  int64_t out = 0;       // selected so far
  int64_t rejected = 0;  // kept at the front of the candidates, packed: never beyond what was read
  int64_t ties;          // left to select
};

// Static, so that each object has its own: an AVX object's copy must not serve the others.
// Entries up to `end`. Every candidate is written to both lists and one of the two counters moves: no branch to mispredict. Stops
// at the last selected entry, so that nothing is written beyond this block's share of the output.
static inline void emit_scalar(const EmitArguments& a, int64_t end, EmitProgress& at, double& sent_sq) {
  for (; at.candidate < end && at.out < a.selected; ++at.candidate) {
    const float value = a.values[at.candidate];
    const int32_t index = a.indices[at.candidate];
    const uint32_t key = selection_key(value);
    const bool tie = (key == a.threshold) & (at.ties > 0);
    const bool selected = (key > a.threshold) | tie;
    at.ties -= tie;
    if (is_finite_key(key)) [[likely]]
      sent_sq += selected ? static_cast<double>(value) * value : 0.0;
    a.out_values[at.out] = key == kNanKey ? std::bit_cast<float>(kCanonicalNanBits) : value;
    a.out_indices[at.out] = a.first_index + index;
    a.values[at.rejected] = value;
    a.indices[at.rejected] = index;
    at.out += selected;
    at.rejected += !selected;
  }
}

// The rest: what follows the last selected entry is rejected, and all rejected entries are stored.
static inline double emit_rejected(const EmitArguments& a, EmitProgress& at) {
  double rejected_sq = 0;
  const auto store = [&](int64_t candidate) {
    const float value = a.values[candidate];
    if (!is_finite_key(selection_key(value))) return;
    if (a.residual != nullptr) a.residual[a.indices[candidate]] = value;
    rejected_sq += static_cast<double>(value) * value;
  };
  for (int64_t r = 0; r < at.rejected; ++r) store(r);
  for (; at.candidate < a.count; ++at.candidate) store(at.candidate);
  return rejected_sq;
}

} // namespace compressed_ddp
