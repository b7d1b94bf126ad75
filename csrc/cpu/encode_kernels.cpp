#include "encode_kernels.h"

#include <cstddef>

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

void add_magnitudes(const float* values, int64_t count, ExponentSums& sums) {
  // Selected values share a few exponents. Four tables in turn: an addition need not wait for the one just before.
  constexpr int64_t kTables = 4;
  std::array<ExponentSums, kTables> tables{};
  int64_t i = 0;
  for (; i + kTables <= count; i += kTables)
    for (int64_t t = 0; t < kTables; ++t) add_magnitude(values[i + t], tables[static_cast<size_t>(t)]);
  for (; i < count; ++i) add_magnitude(values[i], sums);
  for (const ExponentSums& table : tables)
    for (size_t e = 0; e < sums.size(); ++e) sums[e] += table[e];
}

} // namespace

const EncodeKernels kPortableEncode = {high_bits, bfloat16, signs, lost_by_signs, add_magnitudes};

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
