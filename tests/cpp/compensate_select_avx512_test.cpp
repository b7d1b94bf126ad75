// The logic of compensate_select_filter_avx512.cpp on any x86-64 processor: this executable builds that file with SIMDe in place of
// the compiler's intrinsics (tests/cpp/CMakeLists.txt), and its kAvx512Filter takes the place of the one in the library.
#include "selection_reference.h"

namespace compressed_ddp {
namespace {

using namespace testing;

TEST(Avx512Filter, KeepsTheContractForAllDataTypesSourcesAndTails) { expect_filter_contract_everywhere(kAvx512Filter); }

TEST(Avx512Filter, GivesWhatThePortableFilterGivesOnAWholeBlock) {
  constexpr int64_t kNumel = 65536 - 3;
  constexpr uint64_t kSeed = 1;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  const GradientAndResidual made = make_data(Data::kNormal, kNumel, kSeed);
  for (const GradientType type : kGradientTypes) {
    SCOPED_TRACE(name_of(type));
    const TypedBuffer gradient(type, made.gradient);
    std::vector<float> residuals[2] = {made.residual, made.residual};
    std::vector<float> values[2];
    std::vector<int32_t> indices[2];
    FilterResult results[2];
    for (int i = 0; i < 2; ++i) {
      values[i].resize(static_cast<size_t>(kNumel + kFilterSlack));
      indices[i].resize(static_cast<size_t>(kNumel + kFilterSlack));
      const FilterKernels& kernels = i == 0 ? kPortableFilter : kAvx512Filter;
      results[i] = kernels.of(type, FilterSource::kCompensate, Kept::kLostByBFloat16)(
          {gradient.data(), residuals[i].data(), kNumel, selection_key(1.5f), values[i].data(), indices[i].data()});
      values[i].resize(static_cast<size_t>(results[i].count));
      indices[i].resize(static_cast<size_t>(results[i].count));
    }
    EXPECT_GT(results[0].count, 1000);
    EXPECT_TRUE(same_bits(values[0], values[1]));
    EXPECT_TRUE(same_integers(indices[0], indices[1]));
    EXPECT_TRUE(same_bits(residuals[0], residuals[1]));
    EXPECT_TRUE(sums_near("gradient_sq", results[0].gradient_sq, results[1].gradient_sq, 1e-4));
    EXPECT_TRUE(sums_near("residual_sq", results[0].residual_sq, results[1].residual_sq, 1e-4));
  }
}

TEST(Avx512Filter, SelectsLikeTheReferenceInTheWholeStage) {
  const FilterKernels* const kernels[] = {&kAvx512Filter};
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE("random_case of seed " + std::to_string(seed));
    expect_reference(random_case(seed), kernels);
    if (HasFatalFailure()) return;
  }
}

} // namespace
} // namespace compressed_ddp
