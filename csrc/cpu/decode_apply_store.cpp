#include "decode_apply_store.h"

namespace compressed_ddp {
namespace {

constexpr int64_t kLanes = 8; // sums that do not wait for each other: so the compiler may use vectors

template <typename gradient_t>
float store(float* sums, int64_t numel, float scale, gradient_t* out, bool) {
  float lane[kLanes] = {};
  const auto one = [&](int64_t i, float& zero) {
    from_float(sums[i] * scale, out[i]);
    zero += to_float(out[i]) * 0.0f;
    sums[i] = 0;
  };
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) one(i + l, lane[l]);
  for (; i < numel; ++i) one(i, lane[0]);
  float zero = 0;
  for (const float of_lane : lane) zero += of_lane;
  return zero;
}

} // namespace

const StoreKernels kPortableStore = {store<float>, store<Float16>, store<BFloat16>};

const StoreKernels& best_store() {
#if COMPRESSED_DDP_X86
  static const StoreKernels& best = [&]() -> const StoreKernels& {
    __builtin_cpu_init(); // F16C: as in compensate_select_filter_portable.cpp
    return __builtin_cpu_supports("avx2") ? kAvx2Store : kPortableStore;
  }();
  return best;
#else
  return kPortableStore;
#endif
}

} // namespace compressed_ddp
