// Sums do not depend on the thread that makes them.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace compressed_ddp {

// Denormals are summed as they are, whatever torch.set_flush_denormal says on this thread: which thread decodes is a matter of timing,
// and every rank must get the same bits.
class KeepDenormals {
#if defined(__SSE2__)
 public:
  KeepDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kFlushBits); }
  ~KeepDenormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushBits = 0x8040; // flush to zero, denormals are zero
  unsigned before_;
#endif
};

} // namespace compressed_ddp
