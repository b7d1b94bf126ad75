// libFuzzer: whatever the bytes, decoding stays inside its buffers (AddressSanitizer watches vectors of the exact size), and what it lets
// pass is what somebody could have encoded: its indices ascend inside their groups, and encoding them gives the same bytes again.
#include <cstdio>
#include <cstdlib>

#include "cpu/decode_apply.h"
#include "cpu/encode.h"
#include "cpu/restore.h"
#include "payload_input.h"

using namespace compressed_ddp;

namespace {

constexpr auto in_one_go = [](int64_t count, auto&& run) { run(int64_t{0}, count); };
constexpr auto one_by_one = [](int64_t count, auto&& run) {
  for (int64_t i = count; i > 0; --i) run(i - 1, i);
};

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "a payload was let pass although %s\n", what);
  std::abort();
}

bool same_section(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, int64_t begin, int64_t bytes) {
  return std::equal(a.begin() + begin, a.begin() + begin + bytes, b.begin() + begin);
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::PayloadInput input = fuzz::payload_input({data, size});
  const Layout& layout = input.layout;
  Entries entries, in_pieces;
  const std::string problem = check_payloads(layout, input.payload.data(), fuzz::kWorldSize, {fuzz::kRank}, fuzz::kStep, in_one_go);
  require(problem == check_payloads(layout, input.payload.data(), fuzz::kWorldSize, {fuzz::kRank}, fuzz::kStep, one_by_one),
          "it depends on how the work is cut");
  if (!problem.empty()) return 0;
  require(decode_own(layout, input.payload.data(), entries, in_one_go).empty() &&
              decode_own(layout, input.payload.data(), in_pieces, one_by_one).empty(),
          "its rank would refuse it");
  require(entries.indices == in_pieces.indices, "it depends on how the work is cut");

  for (size_t e = 1; e < entries.indices.size(); ++e) require(entries.indices[e - 1] < entries.indices[e], "its indices do not ascend");
  require(check_groups(layout, entries.indices.data()).empty(), "an index is outside its group");
  require(entries.indices.empty() || (entries.indices.front() >= 0 && entries.indices.back() < layout.numel),
          "an index is out of the bucket");

  std::vector<uint8_t> again(input.payload.size());
  encode_selected(layout, {entries.values.data(), entries.indices.data(), nullptr, false, again.data()}, in_one_go);
  const PayloadSections s = payload_sections(layout);
  require(same_section(input.payload, again, s.directory, 4 * s.directory_numel) &&
              same_section(input.payload, again, s.high, 8 * s.high_words()) &&
              same_section(input.payload, again, s.low, layout.selected_numel),
          "its indices have another code");

  for (const GradientType type : {GradientType::kFloat32, GradientType::kFloat16, GradientType::kBFloat16}) {
    std::vector<uint8_t> bucket(static_cast<size_t>(layout.numel * element_bytes(type))), tile_by_tile = bucket;
    decode_apply(layout, {input.payload.data(), fuzz::kWorldSize, bucket.data(), type}, in_one_go);
    decode_apply(layout, {input.payload.data(), fuzz::kWorldSize, tile_by_tile.data(), type}, one_by_one);
    require(bucket == tile_by_tile, "its sum depends on how the work is cut");
  }
  std::vector<std::vector<float>> residual;
  std::vector<float*> residuals;
  for (const Segment& segment : layout.segments) residual.emplace_back(static_cast<size_t>(segment.numel));
  for (size_t i = 0; i < residual.size(); ++i) residuals.push_back(layout.segments[i].group == kDenseGroup ? nullptr : residual[i].data());
  restore(layout, entries, residuals.data());
  return 0;
}
