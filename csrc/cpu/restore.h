// restore_: adds this rank's own payload back to the residual, after a failed exchange, a skipped step or rollback(). Torch-free.
//
// After compensate_select and encode the residual is fl(value - decoded) where an entry was sent, so adding `decoded` gives the
// compensated value: bit for bit with fp32 and bf16 values (but for -0, which comes back as +0), to two roundings, at the size of the
// scale, with sign values. Non-finite entries never left the residual and are passed over.
#pragma once

#include "decode.h"

namespace compressed_ddp {

// `entries`: of this rank's payload alone, from decode. residuals as in CompensateSelectArguments; an entry in a dense segment is passed
// over, and so is entry e if bit e of `returned` is set (return_dropped.h); nullptr = none is.
void restore(const Layout& layout, const Entries& entries, float* const* residuals, const uint32_t* returned = nullptr);

} // namespace compressed_ddp
