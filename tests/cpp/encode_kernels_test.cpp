#include "cpu/encode_kernels.h"

#include <cmath>

#include "testing.h"

namespace compressed_ddp {
namespace {

using testing::bits_of;
using testing::float_of;
using testing::Random;

std::vector<const EncodeKernels*> all_kernels() {
  std::vector<const EncodeKernels*> kernels{&kPortableEncode};
#if COMPRESSED_DDP_X86
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&kAvx2Encode);
#endif
  return kernels;
}

// Every kind of number, those where rounding to bfloat16 turns among them.
std::vector<float> difficult_values(int64_t count, Random& random) {
  const std::vector<uint32_t> odd = {0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc12345u,
                                     0x7f812345u, 0x7f7fffffu, 0xff7fffffu, 0x7f7f7fffu, 0x7f7f8000u, 0x00000001u,
                                     0x807fffffu, 0x3f808000u, 0x3f818000u, 0xbf808001u};
  std::vector<float> values;
  for (int64_t i = 0; i < count; ++i)
    values.push_back(random.one_in(3)   ? float_of(odd[static_cast<size_t>(random.integer(0, static_cast<int64_t>(odd.size())))])
                     : random.one_in(2) ? float_of(static_cast<uint32_t>(random.bits()))
                                        : random.normal());
  return values;
}

// In eight lanes, as encode_kernels.h says.
double sum_of_squares(const std::vector<float>& lost) {
  double lane[8] = {};
  for (size_t i = 0; i < lost.size(); ++i) lane[i % 8] += static_cast<double>(lost[i]) * lost[i];
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

TEST(EncodeKernels, BFloat16ValuesAreTheSameBitsInEveryKernel) {
  constexpr uint64_t kSeed = 1;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  for (int64_t count = 0; count < 70; ++count) {
    const std::vector<float> values = difficult_values(count, random);
    std::vector<uint16_t> coded;
    std::vector<float> lost;
    for (const float value : values) {
      coded.push_back(wire_bfloat16(value));
      lost.push_back(std::isfinite(value) ? value - to_float(BFloat16{coded.back()}) : 0.0f);
    }
    for (const EncodeKernels* kernels : all_kernels()) {
      std::vector<uint16_t> found(values.size()), without_lost = found;
      std::vector<float> found_lost(values.size(), 7.0f);
      const double sum = kernels->bfloat16(values.data(), count, found.data(), found_lost.data());
      EXPECT_EQ(found, coded);
      EXPECT_TRUE(testing::same_bits(lost, found_lost));
      EXPECT_EQ(sum, sum_of_squares(lost));
      EXPECT_EQ(kernels->bfloat16(values.data(), count, without_lost.data(), nullptr), sum);
      EXPECT_EQ(without_lost, coded);
    }
  }
}

TEST(EncodeKernels, SignsAreTheSameBitsInEveryKernel) {
  constexpr uint64_t kSeed = 2;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  for (int64_t count = 0; count < 140; ++count) {
    const std::vector<float> values = difficult_values(count, random);
    const float scale = random.one_in(5) ? 0.0f : std::abs(random.normal());
    std::vector<uint32_t> words(static_cast<size_t>((count + 31) / 32));
    std::vector<float> lost;
    for (size_t i = 0; i < values.size(); ++i) {
      if (!std::isnan(values[i]) && std::signbit(values[i])) words[i / 32] |= 1u << (i % 32);
      lost.push_back(std::isfinite(values[i]) ? values[i] - (std::signbit(values[i]) ? -scale : scale) : 0.0f);
    }
    for (const EncodeKernels* kernels : all_kernels()) {
      std::vector<uint32_t> found(words.size(), 0xffffffffu);
      kernels->signs(values.data(), count, found.data());
      EXPECT_EQ(found, words);
      std::vector<float> found_lost(values.size(), 7.0f);
      EXPECT_EQ(kernels->lost_by_signs(values.data(), count, scale, found_lost.data()), sum_of_squares(lost));
      EXPECT_TRUE(testing::same_bits(lost, found_lost));
    }
  }
}

TEST(EncodeKernels, MagnitudesAreTheSameSumsInEveryKernel) {
  constexpr uint64_t kSeed = 4;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  const std::vector<float> sources[] = {
      difficult_values(5000, random),
      std::vector<float>(5000, float_of(0x3fffffffu)), // the largest significand: a lane holds 255 of them and no more than 256
      std::vector<float>(5000, float_of(0x007fffffu)), // denormal
      std::vector<float>(5000, float_of(0xff7fffffu)), // the largest magnitude
      std::vector<float>(5000, float_of(0x7fffffffu)), // NaN
  };
  for (const std::vector<float>& values : sources)
    for (const int64_t count : {0, 1, 7, 8, 9, 100, 2039, 2040, 2041, 2047, 2048, 2049, 4080, 4999, 5000}) {
      ExponentSums expected{};
      expected[3] = 11; // what is there stays
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t magnitude = bits_of(values[static_cast<size_t>(i)]) & 0x7fffffffu;
        expected[magnitude >> 23] += magnitude < 0x800000u ? magnitude : (magnitude & 0x7fffffu) + 0x800000u;
      }
      for (const EncodeKernels* kernels : all_kernels()) {
        ExponentSums found{};
        found[3] = 11;
        kernels->add_magnitudes(values.data(), count, found);
        EXPECT_EQ(found, expected) << count;
      }
    }
}

TEST(EncodeKernels, HighBitsAreWrittenBetweenTheEndsOfAPieceAndNowhereElse) {
  constexpr uint64_t kSeed = 3;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  constexpr uint64_t kUntouched = 0xa5a5a5a5a5a5a5a5u;
  for (const int64_t count : {1, 2, 7, 8, 9, 64, 65, 1000})
    for (const int64_t step : {1, 2, 20, 300, 5000, 100000})   // how far entries lie apart at most
      for (const int64_t begin : {int64_t{0}, int64_t{256}}) { // entries before
        std::vector<int32_t> indices(static_cast<size_t>(begin + count));
        int64_t index = begin; // one of each before
        for (int64_t e = begin; e < begin + count; ++e, index += random.integer(1, step + 1))
          indices[static_cast<size_t>(e)] = static_cast<int32_t>(index);
        const int64_t num_words = ((indices.back() >> 8) + begin + count) / 64 + 1;
        std::vector<uint64_t> expected(static_cast<size_t>(num_words));
        for (int64_t e = begin; e < begin + count; ++e) {
          const int64_t bit = (indices[static_cast<size_t>(e)] >> 8) + e;
          expected[static_cast<size_t>(bit / 64)] |= uint64_t{1} << (bit % 64);
        }
        const int64_t first = ((indices[static_cast<size_t>(begin)] >> 8) + begin) / 64;
        const int64_t last = ((indices.back() >> 8) + begin + count - 1) / 64;
        for (const EncodeKernels* kernels : all_kernels()) {
          std::vector<uint64_t> words(expected.size()); // cleared, but for what is not this piece's alone
          words[static_cast<size_t>(first)] = words[static_cast<size_t>(last)] = kUntouched;
          const PieceEnds ends = kernels->high_bits(indices.data(), begin, begin + count, words.data());
          ASSERT_EQ(ends.first.at, first);
          ASSERT_EQ(ends.last.at, last);
          ASSERT_EQ(words[static_cast<size_t>(first)], kUntouched);
          ASSERT_EQ(words[static_cast<size_t>(last)], kUntouched);
          words[static_cast<size_t>(first)] = words[static_cast<size_t>(last)] = 0;
          words[static_cast<size_t>(first)] |= ends.first.bits;
          words[static_cast<size_t>(last)] |= ends.last.bits;
          ASSERT_EQ(words, expected);
        }
      }
}

} // namespace
} // namespace compressed_ddp
