// Prints, as JSON lines, what the CUDA stages move on a 25 MiB bucket: benchmarks/count_cuda.py runs it.
//
//   count_bytes SEGMENTS      numels of the compressed (positive) and dense (negative) segments, one per line on standard input
#include <cstdio>
#include <iostream>

#include "counted_bytes.h"

using namespace compressed_ddp;
using namespace compressed_ddp::testing;

namespace {

Layout layout_at(const std::vector<int64_t>& segments, double density) {
  std::vector<int64_t> numels, groups, k;
  for (const int64_t segment : segments) {
    numels.push_back(std::abs(segment));
    groups.push_back(segment < 0 ? kDenseGroup : static_cast<int64_t>(k.size()));
    if (segment > 0) k.push_back(selection_k(density, segment));
  }
  return Layout::make(numels, groups, k, ValueFormat::kBFloat16);
}

void print(const char* stage, const char* method, GradientType type, double density, const Counted& counted) {
  std::printf(
      "{\"stage\": \"%s\", \"method\": \"%s\", \"dtype\": \"%s\", \"density\": %g, \"bytes_per_element\": %.4f, "
      "\"sector_bytes_per_element\": %.4f, \"launches\": %llu}\n",
      stage, method, name_of(type), density, counted.bytes_per_element, counted.sectors_per_element,
      static_cast<unsigned long long>(counted.launches));
  std::fflush(stdout);
}

} // namespace

int main() {
  std::vector<int64_t> segments;
  for (int64_t numel; std::cin >> numel;) segments.push_back(numel);
  for (const double density : {0.001, 0.01, 0.1}) {
    const Layout layout = layout_at(segments, density);
    for (const GradientType type : {GradientType::kFloat32, GradientType::kBFloat16}) {
      print("compensate_select_ and encode", "one pass", type, density, count_select(layout, type, cuda::Method::kOnePass));
      print("compensate_select_ and encode", "two passes", type, density, count_select(layout, type, cuda::Method::kTwoPasses));
    }
    print("decode_apply_ of 8", "", GradientType::kFloat32, density, count_decode(layout, 8, GradientType::kFloat32));
  }
  return 0;
}
