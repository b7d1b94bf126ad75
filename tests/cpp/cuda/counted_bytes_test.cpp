// What the CUDA stages move, counted in simulation: a bound that a change of the kernels cannot pass unnoticed, without a clock.
#include "counted_bytes.h"

namespace compressed_ddp {
namespace {

using namespace testing;
using cuda::Method;

constexpr int64_t kNumel = (25 << 20) / 4; // DDP's bucket: what is paid per bucket and group is small in it
const Layout kLayout = Layout::make(std::vector<int64_t>{kNumel}, std::vector<int64_t>{0}, std::vector<int64_t>{selection_k(0.01, kNumel)},
                                    ValueFormat::kBFloat16);
const double kPayload = static_cast<double>(payload_bytes(kLayout)) / static_cast<double>(kNumel);

TEST(CountedBytes, OnePassStaysNearItsFloor) { // floor: read gradient and residual, write the residual, write the payload
  const Counted counted = count_select(kLayout, GradientType::kFloat32, Method::kOnePass);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 12 + kPayload);
  EXPECT_LE(counted.bytes_per_element, 12.8);
  EXPECT_LE(counted.launches, 6u);
}

TEST(CountedBytes, TwoPassesReadTheResidualOnceMore) {
  const Counted counted = count_select(kLayout, GradientType::kFloat32, Method::kTwoPasses);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 16 + kPayload);
  EXPECT_LE(counted.bytes_per_element, 16.8);
  EXPECT_LE(counted.launches, 6u);
}

TEST(CountedBytes, DecodingEightPayloadsStaysNearItsFloor) { // floor: write the bucket, read 8 payloads
  const Counted counted = count_decode(kLayout, 8, GradientType::kFloat32);
  RecordProperty("bytes_per_element", std::to_string(counted.bytes_per_element));
  EXPECT_GE(counted.bytes_per_element, 4 + 8 * kPayload);
  EXPECT_LE(counted.bytes_per_element, 4.4);
}

} // namespace
} // namespace compressed_ddp
