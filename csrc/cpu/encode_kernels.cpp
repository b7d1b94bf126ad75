#include "encode_kernels.h"

namespace compressed_ddp {
namespace {

PieceEnds high_bits(const int32_t* indices, int64_t begin, int64_t end, uint64_t* words) {
  const int64_t first = high_bit(indices[begin], begin) / 64;
  HighBits high{words, first, first};
  for (int64_t e = begin; e < end; ++e) put_high_bit(high, high_bit(indices[e], e));
  return ends_of(high);
}

double bfloat16(const float* values, int64_t count, uint16_t* coded, float* lost) {
  double lane[kSumLanes] = {};
  bfloat16_scalar(values, 0, count, coded, lost, lane);
  return sum_of_lanes(lane);
}

void signs(const float* values, int64_t count, uint32_t* words) { signs_scalar(values, 0, count, words); }

double lost_by_signs(const float* values, int64_t count, float scale, float* lost) {
  double lane[kSumLanes] = {};
  lost_by_signs_scalar(values, 0, count, scale, lost, lane);
  return sum_of_lanes(lane);
}

} // namespace

const EncodeKernels kPortableEncode = {high_bits, bfloat16, signs, lost_by_signs};

const EncodeKernels& best_encode() {
#if COMPRESSED_DDP_X86
  static const EncodeKernels& best = [&]() -> const EncodeKernels& {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? kAvx2Encode : kPortableEncode;
  }();
  return best;
#else
  return kPortableEncode;
#endif
}

} // namespace compressed_ddp
