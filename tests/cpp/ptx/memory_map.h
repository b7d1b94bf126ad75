// What is known of every byte that kernels may touch. All device memory and all shared memory of blocks lies in one reserved range
// of addresses, so that the bits of a byte, and the race detector's cell of a word, are found by arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

// One bit per byte of the range.
class ByteBits {
 public:
  explicit ByteBits(size_t bytes);
  // `bytes` a power of two up to 32 and `offset` a multiple of it: within one word.
  bool all_set_aligned(size_t offset, size_t bytes) const {
    const uint64_t mask = ((uint64_t{1} << bytes) - 1) << (offset & 63);
    return (word(offset >> 6) & mask) == mask;
  }
  void set_aligned(size_t offset, size_t bytes) { word(offset >> 6) |= ((uint64_t{1} << bytes) - 1) << (offset & 63); }
  // Any range.
  bool all_set(size_t offset, size_t bytes) const;
  void fill(size_t offset, size_t bytes, bool value);

 private:
  // Words in the order of the bytes would put what a thread reads with a large power of two between, which is what kernels do, into one
  // set of the cache. So the cache lines of each page (512 words) are permuted by the number of the page.
  uint64_t& word(size_t i) const { return words_[i ^ ((i >> 9 ^ i >> 15) & 63) << 3]; }

  uint64_t* words_;
};

// An allocation of global memory.
struct GlobalRange {
  size_t offset = 0, bytes = 0;
  bool holds(size_t at, size_t count) const { return at - offset < bytes && count <= bytes - (at - offset); }
};

class MemoryMap {
 public:
  static constexpr size_t kBytes = size_t{16} << 30; // reserved; only what is used takes memory

  static MemoryMap& instance();

  // Offset in the range, or at least kBytes.
  size_t offset_of(const void* p) const { return reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(base_); }
  std::byte* at(size_t offset) const { return base_ + offset; }

  // Shared memory of a block: like an allocation, but global accesses to it are out of bounds.
  std::byte* allocate(size_t bytes, bool is_global);
  void release(void* p);
  // The allocation that the byte lies in; empty if none.
  GlobalRange global_range(const void* p) const;
  void mark_initialized(const void* p, size_t bytes);
  // The allocation nearest to p and how far p is from it, for reports.
  std::string describe(const void* p);

  ByteBits initialized; // bytes that were written

 private:
  MemoryMap();

  std::byte* base_;
};

// Zeroed address space that takes memory where it is touched; throws std::bad_alloc.
void* reserve(size_t bytes);
// Whole pages inside of the range read as zero again and take no memory; the rest is set to zero.
void forget(void* p, size_t bytes);

} // namespace simt
