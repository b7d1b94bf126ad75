// What an exchange that selects a second time (split) leaves out goes back to the residuals, so that nothing is lost. Torch-free.
//
// Owners of ranges sum what all ranks sent and select again. Two things are then missing from the result:
//   dropped   entries that the owner did not select: whoever sent them keeps them (sender keeps: Renggli et al. 2019, SparCML; Li and
//             Hoefler 2022, Ok-Topk; here at one merge level, so that no mass can leak)
//   lost      what the second rounding of a selected average takes away: its owner keeps it, for all ranks
// Both are done as soon as the result is there, and can be undone: a step that turns out to be bad, or rollback(), gives back the rest.
#pragma once

#include "decode.h"
#include "float_types.h"

namespace compressed_ddp {

// `entries`: of this rank's payload, from decode. An entry is dropped where the result `bucket` [numel] of `type` is 0: nothing was
// applied there, whatever the reason (a sum that cancels, an average below fp16's range). residual += its decoded value, and its bit in
// `returned` [ceil(selected_numel / 32)] is set; all other bits are cleared. Returns by how much the squares of the residual have grown.
double return_dropped(const Layout& layout, const Entries& entries, const void* bucket, GradientType type, float* const* residuals,
                      uint32_t* returned);

// residual += factor * lost[index] for every entry that is not 0 in a result of `type`: of the others all comes back by return_dropped.
// `entries`: of the payload that holds the averages of this range, `lost` [numel]: the average minus what it decodes to; factor =
// world_size, or -world_size to undo it. Returns the same.
double add_lost(const Layout& layout, const Entries& entries, const float* lost, float factor, GradientType type, float* const* residuals);

} // namespace compressed_ddp
