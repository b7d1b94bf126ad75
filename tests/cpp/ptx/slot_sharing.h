// Lets registers whose values are never needed at the same time share a slot.
//
// nvcc names a new register for nearly every result, thousands in a large kernel, and leaves it to ptxas to find room for them. With a
// slot for each, the frames of the threads in flight would fit into no cache.
//
// Every read still gives what it would from a slot of its own, garbage included where nothing was written before.
#pragma once

#include "code.h"
#include "module.h"

namespace simt::ptx {

// `code`: all of `function`, its registers numbered one after the other from kTrue + 1 on.
void share_slots(Code& code, const Function& function);

} // namespace simt::ptx
