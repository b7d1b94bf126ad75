// Kernels as nvcc compiles them (interpreter_test_kernels.cu, interpreter_test_cub.cu), for sm_80 and for sm_90, against the same
// computation in C++.
#include "interpreter.h"

#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <sstream>

#include "counters.h"
#include "program_testing.h"

namespace simt::ptx::testing {
namespace {

#ifdef PTX_OF_INTERPRETER_TEST
std::string read_ptx(const std::string& stem, const std::string& architecture) {
  const std::string path = std::string(PTX_OF_INTERPRETER_TEST) + "/" + stem + "." + architecture + ".ptx";
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}
#endif

template <typename T>
std::vector<T> random_values(size_t count, T begin, T end, uint64_t seed = 1) {
  std::mt19937_64 engine(seed);
  std::vector<T> values(count);
  for (T& value : values) {
    const double unit = static_cast<double>(engine() >> 11) * 0x1p-53;
    value = static_cast<T>(static_cast<double>(begin) + unit * (static_cast<double>(end) - static_cast<double>(begin)));
  }
  return values;
}

class CompiledKernels : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
#ifndef PTX_OF_INTERPRETER_TEST
    GTEST_SKIP() << "the build found no nvcc to compile the kernels with";
#endif
  }

  template <typename... Arguments>
  void run(const std::string& kernel, const Shape& shape, const Arguments&... arguments) {
    launch(program(), kernel, shape, options_, arguments...);
  }

  // Loading takes longer than most tests: once for each architecture.
  const Program& program() {
#ifdef PTX_OF_INTERPRETER_TEST
    static std::map<std::string, Program> loaded;
    const std::string key = stem_ + "." + GetParam();
    const auto found = loaded.find(key);
    if (found != loaded.end()) return found->second;
    return loaded.emplace(key, Program::from_ptx(read_ptx(stem_, GetParam()), key)).first->second;
#else
    throw std::logic_error("unreachable: the test is skipped");
#endif
  }

  std::string stem_ = "interpreter_test_kernels";
  LaunchOptions options_;
};

struct Float4 {
  float x, y, z, w;
};

TEST_P(CompiledKernels, AddVectorsOfFourFloatsWithATail) {
  constexpr int kCount = 1000 / 4;
  const auto a = random_values<float>(4 * kCount, -10, 10, 1), b = random_values<float>(4 * kCount, -10, 10, 2);
  const DeviceArray<float> device_a(a), device_b(b), sum(a.size());
  reset_counters();
  run("add_vectors", {{2}, {128}}, device_a.data(), device_b.data(), sum.data(), kCount);
  for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(sum[i], a[i] + b[i]) << i;
  const Counters& counted = counters().at("add_vectors");
  EXPECT_EQ(counted.global_bytes_read, 2 * 4 * a.size());
  EXPECT_EQ(counted.global_bytes_written, 4 * a.size());
  EXPECT_EQ(counted.accesses_of_16_bytes, 3u * kCount);
}

TEST_P(CompiledKernels, CopyThroughLoadsAndStoresWithCacheHints) {
  const auto values = random_values<uint32_t>(4 * 100, 0, 4e9);
  const DeviceArray<uint32_t> from(values), to(values.size());
  run("copy_with_cache_hints", {{1}, {128}}, from, to, 100);
  EXPECT_EQ(to.values(), values);
}

TEST_P(CompiledKernels, ReverseThroughDynamicSharedMemoryBehindAStaticVariable) {
  std::vector<int> values(3 * 96), expected;
  std::iota(values.begin(), values.end(), 0);
  for (int block = 0; block < 3; ++block)
    for (int i = 95; i >= 0; --i) expected.push_back(96 * block + i);
  const DeviceArray<int> device(values);
  run("reverse_blocks", {{3}, {96}, 96 * sizeof(int)}, device);
  EXPECT_EQ(device.values(), expected);
}

TEST_P(CompiledKernels, SeeThatDynamicSharedMemoryIsTooSmall) {
  const DeviceArray<int> device(std::vector<int>(96));
  const auto failure = failure_of([&] { run("reverse_blocks", {{1}, {96}, 95 * sizeof(int)}, device); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kOutOfBounds) << failure->what();
}

TEST_P(CompiledKernels, UseConstantAndGlobalVariablesWithInitialValues) {
  const auto values = random_values<float>(64, -1, 1);
  const DeviceArray<float> device(values);
  const DeviceArray<char> letters(64);
  unsigned calls = 0;
  const Program& p = program();
  ASSERT_EQ(p.variable_bytes("calls"), sizeof calls);
  const unsigned before = *static_cast<const unsigned*>(p.variable("calls"));
  run("use_globals", {{1}, {64}}, device, letters);
  std::memcpy(&calls, p.variable("calls"), sizeof calls);
  EXPECT_EQ(before, 5u);
  EXPECT_EQ(calls, 69u);
  *static_cast<unsigned*>(p.variable("calls")) = 5;
  constexpr float kWeights[] = {0.5f, -1.25f, 2.0f, 1e-3f};
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(device[i], values[i] * kWeights[i % 4]);
    EXPECT_EQ(letters[i], (i % 2 == 0 ? "one" : "two")[i % 3]);
  }
  EXPECT_THROW(p.variable("nothing"), std::out_of_range);
}

TEST_P(CompiledKernels, CallFunctionsThatReturnStructsOrCallThemselves) {
  std::vector<long long> values(10);
  for (size_t i = 0; i < values.size(); ++i) values[i] = 123456789012 * static_cast<long long>(i) - 5;
  const DeviceArray<long long> device(values);
  const DeviceArray<unsigned> factorials(10);
  run("call_functions", {{1}, {10}}, device, factorials);
  unsigned factorial = 1;
  for (size_t i = 0; i < values.size(); ++i) {
    factorial *= i == 0 ? 1 : static_cast<unsigned>(i);
    EXPECT_EQ(device[i], values[i] / 7 * 1000 + values[i] % 7);
    EXPECT_EQ(factorials[i], factorial);
  }
}

TEST_P(CompiledKernels, CallAFunctionWithASharedVariableOfItsOwn) {
  std::vector<int> values(64);
  std::iota(values.begin(), values.end(), 1);
  const DeviceArray<int> device(values);
  run("call_with_shared", {{1}, {64}}, device);
  EXPECT_EQ(device.values(), std::vector<int>(64, 64 * 65));
}

TEST_P(CompiledKernels, StopAtADeviceAssertWithItsText) {
  const DeviceArray<int> values(std::vector<int>{3, 2, 1, 0});
  const auto failure = failure_of([&] { run("assert_positive", {{1}, {4}}, values); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kTrap);
  EXPECT_NE(std::string(failure->what()).find("values[threadIdx.x] > 0"), std::string::npos) << failure->what();
  EXPECT_NE(std::string(failure->what()).find("interpreter_test_kernels.cu"), std::string::npos) << failure->what();
}

TEST_P(CompiledKernels, GoOnAfterPrintf) {
  const DeviceArray<int> values(std::vector<int>{3, 2});
  run("print_values", {{1}, {2}}, values);
  EXPECT_EQ(values.values(), (std::vector<int>{4, 3}));
}

TEST_P(CompiledKernels, BranchThroughATable) {
  std::vector<int> values(64), expected;
  std::iota(values.begin(), values.end(), 1000);
  for (const int v : values) {
    const int cases[] = {v * 7,
                         v / 3,
                         v ^ 0x55,
                         v - 9,
                         v << 3,
                         ~v,
                         v % 11,
                         42,
                         v * v,
                         std::popcount(static_cast<unsigned>(v)),
                         std::countl_zero(static_cast<unsigned>(v))};
    expected.push_back((v & 15) <= 10 ? cases[v & 15] : -1);
  }
  const DeviceArray<int> device(values);
  run("switch_over", {{1}, {64}}, device);
  EXPECT_EQ(device.values(), expected);
}

// Halves that are multiples of 1/8 below 16: every result below is exact.
float eighths(size_t i) { return static_cast<float>(i % 64) / 8 - 3; }
uint16_t half_bits(float value) { // of numbers that a half holds
  if (value == 0) return 0;
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}
uint16_t bfloat16_bits(float value) { // to nearest even, of finite numbers
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

TEST_P(CompiledKernels, ComputeWithHalves) {
  std::vector<uint16_t> a, b;
  for (size_t i = 0; i < 64; ++i) {
    a.push_back(half_bits(eighths(i)));
    b.push_back(half_bits(eighths(3 * i + 7)));
  }
  const DeviceArray<uint16_t> device_a(a), device_b(b), sums(64);
  const DeviceArray<uint32_t> products(64);
  const DeviceArray<float> widened(64);
  run("half_arithmetic", {{1}, {64}}, device_a, device_b, sums, products, widened);
  for (size_t i = 0; i < 64; ++i) {
    const float x = eighths(i), y = eighths(3 * i + 7);
    EXPECT_EQ(sums[i], half_bits(x + y)) << x << " " << y;
    EXPECT_EQ(products[i], uint32_t{half_bits(y * y + x)} << 16 | half_bits(x * y + x)) << x << " " << y;
    EXPECT_EQ(widened[i], x + (x < y ? 1.0f : 0.0f));
  }
}

TEST_P(CompiledKernels, ComputeWithBFloat16) {
  std::vector<uint16_t> a, b;
  for (size_t i = 0; i < 64; ++i) {
    a.push_back(bfloat16_bits(eighths(i)));
    b.push_back(bfloat16_bits(eighths(5 * i + 1)));
  }
  const DeviceArray<uint16_t> device_a(a), device_b(b), sums(64);
  const DeviceArray<uint32_t> packed(64);
  run("bfloat16_arithmetic", {{1}, {64}}, device_a, device_b, sums, packed);
  for (size_t i = 0; i < 64; ++i) {
    const float x = eighths(i), y = eighths(5 * i + 1);
    EXPECT_EQ(sums[i], bfloat16_bits(x + y));
    EXPECT_EQ(packed[i], uint32_t{bfloat16_bits(std::max(x, y))} << 16 | bfloat16_bits(x * 1.001f));
  }
}

TEST_P(CompiledKernels, UseCooperativeGroupsAndAtomicRef) {
  const auto values = random_values<unsigned>(64, 0, 1000);
  const DeviceArray<unsigned> device(values), ballots(64), tile_sums(8), total(std::vector<unsigned>{0});
  run("tiled_sum", {{1}, {64}}, device, ballots, tile_sums, total);
  EXPECT_EQ(total[0], std::accumulate(values.begin(), values.end(), 0u));
  for (size_t tile = 0; tile < 8; ++tile) {
    unsigned sum = 0, ballot = 0;
    for (size_t i = 0; i < 8; ++i) {
      sum += values[8 * tile + i];
      ballot |= (values[8 * tile + i] % 3 == 0 ? 1u : 0u) << i;
    }
    EXPECT_EQ(tile_sums[tile], sum);
    for (size_t i = 0; i < 8; ++i) EXPECT_EQ(ballots[8 * tile + i], ballot);
  }
}

TEST_P(CompiledKernels, LetTheLastBlockAddUpWhatTheOthersWroteInEveryOrder) {
  for (const BlockOrder order : {BlockOrder::kAscending, BlockOrder::kDescending, BlockOrder::kRandom})
    for (const bool fuzz : {false, true}) {
      options_.block_order = order;
      options_.fuzz = fuzz;
      const auto values = random_values<int>(32 * 20, -1000, 1000);
      const DeviceArray<int> device(values), partial(20), total(1);
      const DeviceArray<unsigned> ticket(std::vector<unsigned>{0});
      run("last_block_sums", {{20}, {32}}, device, partial, ticket, total);
      EXPECT_EQ(total[0], std::accumulate(values.begin(), values.end(), 0));
    }
}

TEST_P(CompiledKernels, CompareTheLanesOfAWarp) {
  std::vector<unsigned> values(32);
  for (size_t i = 0; i < 32; ++i) values[i] = 7 * (i % 5);
  const DeviceArray<unsigned> device(values), equal(32), largest(32);
  const DeviceArray<int> all_equal(32), counted(32);
  run("compare_lanes", {{1}, {32}}, device, equal, all_equal, largest, counted);
  const auto odd = std::count_if(values.begin(), values.end(), [](unsigned v) { return v % 2 == 1; });
  for (size_t lane = 0; lane < 32; ++lane) {
    unsigned same = 0;
    for (size_t i = 0; i < 32; ++i) same |= (values[i] == values[lane] ? 1u : 0u) << i;
    EXPECT_EQ(equal[lane], same);
    EXPECT_EQ(all_equal[lane], 1);
    EXPECT_EQ(largest[lane], 28u);
    EXPECT_EQ(counted[lane], odd + 100 + 0 + 10000);
  }
}

TEST_P(CompiledKernels, ComputeWithDoublesAndLongIntegers) {
  const auto values = random_values<double>(64, 0, 1e6);
  const auto integers = random_values<unsigned long long>(64, 0, 1e18);
  const DeviceArray<double> device(values);
  const DeviceArray<unsigned long long> device_integers(integers);
  run("doubles", {{1}, {64}}, device, device_integers);
  for (size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(device[i], std::sqrt(values[i]) / 3.0 + std::fma(values[i], 1e-9, -1.0));
    const auto high = static_cast<unsigned long long>((static_cast<unsigned __int128>(integers[i]) * 0x9e3779b97f4a7c15u) >> 64);
    EXPECT_EQ(device_integers[i], integers[i] / 10 + high + integers[i] % 1000);
  }
}

TEST_P(CompiledKernels, TakeAStructByValue) {
  struct alignas(16) Options {
    float scale[6];
    const float* from;
    int shift;
  };
  const auto values = random_values<float>(40, -1, 1);
  const DeviceArray<float> from(values), to(32);
  const Options passed{{1, 2, 3, 4, 5, 6}, from.data(), 5};
  run("use_struct", {{1}, {32}}, passed, to);
  for (size_t i = 0; i < 32; ++i) EXPECT_EQ(to[i], values[i + 5] * passed.scale[i % 6]);
}

TEST_P(CompiledKernels, IndexAnArrayInLocalMemory) {
  const auto indices = random_values<unsigned char>(32 * 8, 0, 255);
  const DeviceArray<unsigned char> device(indices);
  const DeviceArray<int> sums(8);
  run("local_array", {{1}, {8}}, device, sums);
  for (size_t thread = 0; thread < 8; ++thread) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += i * (indices[32 * thread + static_cast<size_t>(i)] % 16 + 1);
    EXPECT_EQ(sums[thread], sum);
  }
}

TEST_P(CompiledKernels, RefuseMoreThreadsThanTheirLaunchBounds) {
  const DeviceArray<int> values(128);
  run("bounded", {{1}, {64}}, values);
  EXPECT_EQ(values[63], 1);
  EXPECT_THROW(run("bounded", {{1}, {65}}, values), std::invalid_argument);
  EXPECT_THROW(program().launch("no_such_kernel", {1}, {1}, 0, nullptr), std::invalid_argument);
}

TEST_P(CompiledKernels, NameTheLineOfAReadBeyondTheEnd) {
  const DeviceArray<int> values(std::vector<int>(64)), out(64);
  const auto failure = failure_of([&] { run("read_beyond", {{1}, {64}}, values, out); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kOutOfBounds);
  EXPECT_NE(std::string(failure->what()).find("interpreter_test_kernels.cu:"), std::string::npos) << failure->what();
}

TEST_P(CompiledKernels, FailAtAMisalignedRead) {
  const DeviceArray<char> values(std::vector<char>(64));
  const DeviceArray<int> out(64);
  const auto failure = failure_of([&] { run("read_misaligned", {{1}, {4}}, values, out); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kMisaligned);
}

TEST_P(CompiledKernels, ReportADataRace) {
  const DeviceArray<int> out(1);
  const auto failure = failure_of([&] { run("write_same_word", {{1}, {64}}, out); });
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->kind, FailureKind::kDataRace);
}

TEST_P(CompiledKernels, ExecuteMillionsOfInstructionsPerSecond) {
  constexpr int kRounds = 500;
  std::vector<unsigned> values(256, 1);
  const DeviceArray<unsigned> device(values);
  reset_counters();
  const auto start = std::chrono::steady_clock::now();
  run("spin", {{4}, {64}}, device, kRounds);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  unsigned expected = 1;
  for (unsigned i = 0; i < kRounds; ++i) expected = (expected ^ (expected >> 3)) * 2654435761u + i;
  EXPECT_EQ(device[255], expected);
  const auto instructions = static_cast<double>(total().instructions);
  EXPECT_GE(instructions, 256.0 * kRounds * 4);
  RecordProperty("instructions_per_second", std::to_string(instructions / seconds));
}

class CompiledCub : public CompiledKernels {
 protected:
  CompiledCub() { stem_ = "interpreter_test_cub"; }
};

TEST_P(CompiledCub, ReducesBlocks) {
  const auto values = random_values<int>(3 * 128, -1000, 1000);
  const DeviceArray<int> device(values), sums(3);
  run("block_reduce", {{3}, {128}}, device, sums);
  for (int block = 0; block < 3; ++block)
    EXPECT_EQ(sums[static_cast<size_t>(block)], std::accumulate(values.begin() + 128 * block, values.begin() + 128 * (block + 1), 0));
}

TEST_P(CompiledCub, ScansBlocks) {
  const auto values = random_values<int>(2 * 512, -1000, 1000);
  const DeviceArray<int> device(values), sums(values.size()), total(2);
  run("block_scan", {{2}, {128}}, device, sums, total);
  for (int block = 0; block < 2; ++block) {
    std::vector<int> expected(512);
    std::exclusive_scan(values.begin() + 512 * block, values.begin() + 512 * (block + 1), expected.begin(), 0);
    const std::vector<int> all = sums.values();
    EXPECT_EQ(std::vector<int>(all.begin() + 512 * block, all.begin() + 512 * (block + 1)), expected);
    EXPECT_EQ(total[static_cast<size_t>(block)], expected.back() + values[static_cast<size_t>(512 * block + 511)]);
  }
}

TEST_P(CompiledCub, ScansWarps) {
  const auto values = random_values<int>(128, -1000, 1000);
  const DeviceArray<int> device(values), sums(128);
  run("warp_scan", {{1}, {128}}, device, sums);
  for (int warp = 0; warp < 4; ++warp) {
    std::vector<int> expected(32);
    std::inclusive_scan(values.begin() + 32 * warp, values.begin() + 32 * (warp + 1), expected.begin());
    const std::vector<int> all = sums.values();
    EXPECT_EQ(std::vector<int>(all.begin() + 32 * warp, all.begin() + 32 * (warp + 1)), expected);
  }
}

TEST_P(CompiledCub, SortsKeysInFuzzedOrder) {
  auto keys = random_values<unsigned>(512, 0, 4e9);
  keys[5] = keys[300] = 0xffffffff;
  keys[6] = keys[301] = 0;
  options_.fuzz = true;
  const DeviceArray<unsigned> device(keys), sorted(512);
  run("radix_sort", {{1}, {128}}, device, sorted);
  std::sort(keys.begin(), keys.end(), std::greater<>());
  EXPECT_EQ(sorted.values(), keys);
}

std::string architecture(const ::testing::TestParamInfo<std::string>& info) { return info.param; }
INSTANTIATE_TEST_SUITE_P(Nvcc, CompiledKernels, ::testing::Values("sm_80", "sm_90"), architecture);
INSTANTIATE_TEST_SUITE_P(Nvcc, CompiledCub, ::testing::Values("sm_80", "sm_90"), architecture);

} // namespace
} // namespace simt::ptx::testing
