#include "payload_v1.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace compressed_ddp::v1 {
namespace {

constexpr int64_t kTileNumel = 8192;
constexpr int64_t kHeaderBytes = 64, kAlignment = 64;
using Header = std::array<uint8_t, kHeaderBytes>;

int64_t values_offset(const Layout& layout) { return kHeaderBytes + 4 * layout.selected_numel; }
int64_t dense_offset(const Layout& layout) { return values_offset(layout) + 4 * layout.selected_numel; }

const int32_t* indices_of(const uint8_t* payload) { return reinterpret_cast<const int32_t*>(payload + kHeaderBytes); }
const float* values_of(const Layout& layout, const uint8_t* payload) {
  return reinterpret_cast<const float*>(payload + values_offset(layout));
}

// As long as it was; what it said costs nothing.
Header header_of(const Layout& layout, int64_t rank, int64_t step, bool non_finite) {
  PayloadHeader fields = make_header(layout, rank, step, non_finite);
  fields.version = 1;
  Header header{};
  std::memcpy(header.data(), &fields, sizeof fields);
  return header;
}

// One sweep without branches: the compiler turns it into vector code.
bool ascending_within(const int32_t* indices, int64_t count, int64_t first, int64_t last) {
  if (count == 0) return true;
  if (indices[0] < first || indices[count - 1] > last) return false;
  bool ascending = true;
  for (int64_t i = 1; i < count; ++i) ascending &= indices[i - 1] < indices[i];
  return ascending;
}

bool check_indices(const Layout& layout, const int32_t* indices) {
  for (const Group& group : layout.groups) {
    const Segment& last = layout.segments[static_cast<size_t>(group.last_segment)];
    const int64_t first_index = layout.segments[static_cast<size_t>(group.first_segment)].offset;
    if (!ascending_within(indices + group.entry_offset, group.k, first_index, last.offset + last.numel - 1)) return false;
  }
  return true;
}

// Scales a tile, stores it and clears the sums. Returns 0 when every result is finite, NaN otherwise.
float scale_and_store(float* sums, int64_t numel, float scale, float* out) {
  int64_t i = 0;
  float zero = 0;
#if defined(__SSE2__)
  const __m128 factor = _mm_set1_ps(scale);
  __m128 zeros = _mm_setzero_ps();
  for (; i + 4 <= numel; i += 4) {
    const __m128 result = _mm_mul_ps(_mm_loadu_ps(sums + i), factor);
    zeros = _mm_add_ps(zeros, _mm_mul_ps(result, _mm_setzero_ps()));
    _mm_storeu_ps(sums + i, _mm_setzero_ps());
    _mm_storeu_ps(out + i, result);
  }
  alignas(16) float lane[4];
  _mm_store_ps(lane, zeros);
  zero += lane[0] + lane[1] + lane[2] + lane[3];
#endif
  for (; i < numel; ++i) {
    out[i] = sums[i] * scale;
    zero += out[i] * 0.0f;
    sums[i] = 0;
  }
  return zero;
}

} // namespace

int64_t num_payload_bytes(const Layout& layout) {
  return (dense_offset(layout) + 4 * layout.dense_numel + kAlignment - 1) / kAlignment * kAlignment;
}

PayloadEntries payload_entries(const Layout& layout, uint8_t* payload) {
  return {reinterpret_cast<int32_t*>(payload + kHeaderBytes), reinterpret_cast<float*>(payload + values_offset(layout))};
}

void encode_header(const Layout& layout, int64_t rank, int64_t step, bool non_finite, uint8_t* payload) {
  const Header header = header_of(layout, rank, step, non_finite);
  std::memcpy(payload, header.data(), header.size());
  const int64_t used_bytes = dense_offset(layout) + 4 * layout.dense_numel;
  std::memset(payload + used_bytes, 0, static_cast<size_t>(num_payload_bytes(layout) - used_bytes));
}

bool check_gathered(const Layout& layout, const uint8_t* gathered, int64_t world_size, int64_t step) {
  for (int64_t rank = 0; rank < world_size; ++rank) {
    const uint8_t* payload = gathered + rank * num_payload_bytes(layout);
    const Header expected = header_of(layout, rank, step, false);
    if (std::memcmp(payload, expected.data(), expected.size()) != 0 || !check_indices(layout, indices_of(payload))) return false;
  }
  return true;
}

bool decode_apply(const Layout& layout, const uint8_t* gathered, int64_t world_size, float* bucket) {
  const int64_t stride_bytes = num_payload_bytes(layout), num_tiles = (layout.numel + kTileNumel - 1) / kTileNumel;
  const float scale = 1.0f / static_cast<float>(world_size);
  std::vector<int64_t> cursor(static_cast<size_t>(world_size)); // next entry of each rank
  std::vector<const Segment*> dense;
  for (const Segment& segment : layout.segments)
    if (segment.group == kDenseGroup && segment.numel > 0) dense.push_back(&segment);

  size_t first_dense = 0;
  float zero = 0;
  alignas(64) float sums[kTileNumel] = {};
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t tile_begin = tile * kTileNumel;
    const int64_t tile_end = std::min(tile_begin + kTileNumel, layout.numel);
    while (first_dense < dense.size() && dense[first_dense]->offset + dense[first_dense]->numel <= tile_begin) ++first_dense;
    for (int64_t rank = 0; rank < world_size; ++rank) {
      const uint8_t* payload = gathered + rank * stride_bytes;
      const int32_t* indices = indices_of(payload);
      const float* values = values_of(layout, payload);
      int64_t entry = cursor[static_cast<size_t>(rank)];
      for (; entry < layout.selected_numel && indices[entry] < tile_end; ++entry) sums[indices[entry] - tile_begin] += values[entry];
      cursor[static_cast<size_t>(rank)] = entry;
      const auto* dense_values = reinterpret_cast<const float*>(payload + dense_offset(layout));
      for (size_t s = first_dense; s < dense.size() && dense[s]->offset < tile_end; ++s) {
        const int64_t from = std::max(dense[s]->offset, tile_begin);
        const int64_t to = std::min(dense[s]->offset + dense[s]->numel, tile_end);
        const float* in = dense_values + dense[s]->dense_offset + (from - dense[s]->offset);
        for (int64_t i = 0; i < to - from; ++i) sums[from - tile_begin + i] += in[i];
      }
    }
    zero += scale_and_store(sums, tile_end - tile_begin, scale, bucket + tile_begin);
  }
  return zero == 0;
}

} // namespace compressed_ddp::v1
