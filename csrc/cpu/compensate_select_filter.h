// The one pass of compensate_select over gradient and residual: everything that touches all entries happens here.
//
// For i in [0, numel):  acc = gradient[i] + residual[i]  (or gradient[i] alone, or residual[i] alone: FilterSource)
//   key(acc) <  low_key  residual[i] = acc
//   key(acc) >= low_key  (acc, i) is appended to the candidates, in order, and residual[i] = 0;
//                        a non-finite acc is appended too, but residual[i] keeps its old value (architecture.md, contract 6)
// With values that travel as bf16, what the rounding loses of acc stays in residual[i] instead of 0: while the cache line is at hand.
// low_key must be in [1, kInfinityKey], so that zeros never are candidates and non-finite entries always are.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace compressed_ddp {

enum class FilterSource : uint8_t {
  kCompensate, // acc = gradient + residual, residual is written
  kGradient,   // acc = gradient; no residual exists (error_feedback=False)
  kResidual,   // acc = residual, which already holds acc: the second try after a wrong guess
};

enum class Kept : uint8_t { kZero, kLostByBFloat16 }; // in the residual of a candidate

struct FilterArguments {
  const void* gradient; // [numel] of the gradient's type; unused for kResidual
  float* residual;      // [numel]; unused for kGradient
  int64_t numel;
  uint32_t low_key;
  float* values;    // candidates: room for numel + kFilterSlack entries, garbage may be written beyond the count
  int32_t* indices; // same; position relative to this call
};

struct FilterResult {
  int64_t count = 0;      // candidates written
  int64_t non_finite = 0; // of them
  float gradient_sq = 0;  // sum of gradient^2, 0 for kResidual; partial sums in fp32, in an order fixed by the kernel
  float residual_sq = 0;  // sum of acc^2 over the entries that are no candidates
};

inline constexpr int64_t kFilterSlack = 16; // one 512-bit store may begin at the last candidate

using FilterKernel = FilterResult (*)(const FilterArguments&);

struct FilterKernels {
  FilterKernel table[2][3][3];
  const char* name;
  FilterKernel of(GradientType type, FilterSource source, Kept kept) const {
    return table[static_cast<int>(kept)][static_cast<int>(type)][static_cast<int>(source)];
  }
};

// Fills the table from a class template with a static member `run`.
template <template <typename, FilterSource, Kept> class Kernel>
constexpr FilterKernels make_filter_kernels(const char* name) {
  using enum FilterSource;
  using enum Kept;
  return {
      {{{&Kernel<float, kCompensate, kZero>::run, &Kernel<float, kGradient, kZero>::run, &Kernel<float, kResidual, kZero>::run},
        {&Kernel<Float16, kCompensate, kZero>::run, &Kernel<Float16, kGradient, kZero>::run, &Kernel<Float16, kResidual, kZero>::run},
        {&Kernel<BFloat16, kCompensate, kZero>::run, &Kernel<BFloat16, kGradient, kZero>::run, &Kernel<BFloat16, kResidual, kZero>::run}},
       {{&Kernel<float, kCompensate, kLostByBFloat16>::run, &Kernel<float, kGradient, kZero>::run,
         &Kernel<float, kResidual, kLostByBFloat16>::run},
        {&Kernel<Float16, kCompensate, kLostByBFloat16>::run, &Kernel<Float16, kGradient, kZero>::run,
         &Kernel<Float16, kResidual, kLostByBFloat16>::run},
        {&Kernel<BFloat16, kCompensate, kLostByBFloat16>::run, &Kernel<BFloat16, kGradient, kZero>::run,
         &Kernel<BFloat16, kResidual, kLostByBFloat16>::run}}},
      name};
}

extern const FilterKernels kPortableFilter;
#if COMPRESSED_DDP_X86
extern const FilterKernels kAvx2Filter;
extern const FilterKernels kAvx512Filter;
#endif

// The widest kernels that this processor runs; decided once per process.
const FilterKernels& best_filter();

// Shared by all kernels for the last entries of a block and for the portable kernel. Appends to `result`.
template <typename gradient_t, FilterSource source, Kept kept>
inline void filter_scalar(const FilterArguments& a, int64_t begin, FilterResult& result) {
  const auto* gradient = static_cast<const gradient_t*>(a.gradient);
  double gradient_sq = 0, residual_sq = 0; // one chain of up to 65,536 fp32 additions would lose too much
  for (int64_t i = begin; i < a.numel; ++i) {
    float acc = 0;
    if constexpr (source != FilterSource::kResidual) {
      const float g = to_float(gradient[i]);
      gradient_sq += static_cast<double>(g) * g;
      acc = g;
    }
    if constexpr (source == FilterSource::kCompensate) acc = acc + a.residual[i];
    if constexpr (source == FilterSource::kResidual) acc = a.residual[i];
    const uint32_t magnitude = std::bit_cast<uint32_t>(acc) & 0x7fffffffu;
    if (magnitude < a.low_key) {
      residual_sq += static_cast<double>(acc) * acc;
      if constexpr (source == FilterSource::kCompensate) a.residual[i] = acc;
      continue;
    }
    a.values[result.count] = acc;
    a.indices[result.count] = static_cast<int32_t>(i);
    ++result.count;
    if (magnitude >= kInfinityKey) {
      ++result.non_finite;
    } else if constexpr (source != FilterSource::kGradient) {
      a.residual[i] = kept == Kept::kZero ? 0.0f : acc - to_float(BFloat16{wire_bfloat16(acc)});
    }
  }
  result.gradient_sq += static_cast<float>(gradient_sq);
  result.residual_sq += static_cast<float>(residual_sq);
}

} // namespace compressed_ddp
