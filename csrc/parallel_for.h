// The core's parallel_for, by torch's thread pool.
#pragma once

#include <ATen/Parallel.h>

namespace compressed_ddp {

inline constexpr auto torch_parallel_for = [](int64_t count, auto&& function) { at::parallel_for(0, count, 1, function); };

} // namespace compressed_ddp
