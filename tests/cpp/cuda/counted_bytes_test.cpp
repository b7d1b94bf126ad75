// What the CUDA stages move, counted in simulation: a bound that a change of the kernels cannot pass unnoticed, without a clock.
#include "counted_bytes.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using cuda::Method;

constexpr int64_t kNumel = (25 << 20) / 4; // DDP's bucket: what is paid per bucket and group is small in it
const Layout kLayout = one_group(kNumel, selection_k(0.01, kNumel));

TEST(CountedBytes, OnePassStaysNearItsFloor) { // 12.08: read gradient and residual, write the residual, write 8 bytes per selected entry
  const Counted counted = count_select(kLayout, GradientType::kFloat32, Method::kOnePass);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 12.08);
  EXPECT_LE(counted.bytes_per_element, 12.8);
  EXPECT_LE(counted.launches, 6u);
}

TEST(CountedBytes, TwoPassesReadTheResidualOnceMore) {
  const Counted counted = count_select(kLayout, GradientType::kFloat32, Method::kTwoPasses);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 16.08);
  EXPECT_LE(counted.bytes_per_element, 16.8);
  EXPECT_LE(counted.launches, 6u);
}

TEST(CountedBytes, DecodingEightPayloadsStaysNearItsFloor) { // 4.64: write the bucket, read 8 bytes per entry of 8 ranks
  const Counted counted = count_decode(kLayout, 8, GradientType::kFloat32);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 4.64);
  EXPECT_LE(counted.bytes_per_element, 4.8);
}

} // namespace
} // namespace compressed_ddp
