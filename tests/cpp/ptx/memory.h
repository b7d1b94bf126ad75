// The memory that kernels may touch: device allocations with guard zones, and host memory that was registered.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// `bytes` of device memory, 256-byte aligned, filled with 0xEE, with a guard zone of at least 256 bytes behind it. A pointer is an
// ordinary host pointer. `initialized` = false: reading a byte before it is written is kUninitialized (cudaMalloc promises nothing).
void* allocate(size_t bytes, bool initialized = false);
void release(void* p); // throws std::invalid_argument if p was not allocated; nullptr is fine
bool is_allocated(const void* p, size_t bytes);
// Host side copies and sets: mark what they write as initialised.
void mark_initialized(const void* p, size_t bytes);
// Forgets which thread of which launch touched what; done at every launch boundary by itself.

} // namespace simt
