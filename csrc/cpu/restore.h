// restore_: adds this rank's own payload back to the residual, after a failed exchange, a skipped step or rollback(). Torch-free.
//
// After compensate_select the residual is 0 where an entry was selected, so 0 + value is the compensated value, bit for bit
// (but for -0, which comes back as +0): nothing is lost. Non-finite entries never left the residual and are passed over.
#pragma once

#include "../wire_format.h"

namespace compressed_ddp {

// residuals as in CompensateSelectArguments; segments with unused[s] != 0 sent zeros and are passed over. `payload` must have been
// written by this process for this layout, or checked: an index outside the compressed segments is passed over.
void restore(const Layout& layout, const uint8_t* payload, const uint8_t* unused, float* const* residuals);

} // namespace compressed_ddp
