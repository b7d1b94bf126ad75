#include "compensate_select_filter.h"

namespace compressed_ddp {
namespace {

template <typename gradient_t, FilterSource source, Kept kept>
struct Portable {
  static FilterResult run(const FilterArguments& a) {
    FilterResult result;
    filter_scalar<gradient_t, source, kept>(a, 0, result);
    return result;
  }
};

} // namespace

const FilterKernels kPortableFilter = make_filter_kernels<Portable>("portable");

const FilterKernels& best_filter() {
#if COMPRESSED_DDP_X86
  static const FilterKernels& best = []() -> const FilterKernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return kAvx512Filter;
    // F16C came before AVX2 on every x86-64 processor; Clang 14 has no name for it in __builtin_cpu_supports.
    if (__builtin_cpu_supports("avx2")) return kAvx2Filter;
    return kPortableFilter;
  }();
  return best;
#else
  return kPortableFilter;
#endif
}

} // namespace compressed_ddp
