// Checks the payloads of all ranks before anything is made of them, and expands a checked one to plain lists. decode_apply needs no lists:
// it reads the checked bytes once more, tile by tile. Torch-free.
//
// Payloads are untrusted: no byte of one can make this read or write outside its buffers, and what it lets pass has strictly ascending
// indices, each inside the span of its group.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "../wire_format.h"
#include "elias_fano.h"
#include "value_format.h"

namespace compressed_ddp {

struct Entries { // of one payload
  std::vector<int32_t> indices;
  std::vector<float> values;
};

// Of strictly ascending indices [selected_numel]: that every group's lie in the group's span. Empty, or one line that says where not.
std::string check_groups(const Layout& layout, const int32_t* indices);
// The same of a payload whose indices check_indices has found right: the first group that is wrong, -1 when none is.
int64_t first_wrong_group(const Layout& layout, const uint8_t* payload);
std::string describe_wrong_group(const Layout& layout, int64_t group);

struct Refusal {
  int64_t payload; // the first that is wrong
  std::string why; // empty: none is
};

// Of payloads whose headers are right. parallel_for as in compensate_select.h.
template <typename ParallelFor>
Refusal check_entries(const Layout& layout, const uint8_t* payloads, int64_t num_payloads, ParallelFor&& parallel_for) {
  const PayloadSections sections = payload_sections(layout);
  const int64_t pieces = num_pieces(layout);
  constexpr int64_t kRight = -1, kWrongIndices = -2; // or the first group that is wrong
  std::vector<int64_t> found(static_cast<size_t>(num_payloads), kRight);
  parallel_for(num_payloads * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / pieces;
      if (!check_indices(sections, payloads + p * sections.payload_bytes, layout.selected_numel, piece_of(layout, i % pieces)))
        std::atomic_ref(found[static_cast<size_t>(p)]).store(kWrongIndices, std::memory_order_relaxed);
    }
  });
  parallel_for(num_payloads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      if (found[static_cast<size_t>(p)] == kRight)
        found[static_cast<size_t>(p)] = first_wrong_group(layout, payloads + p * sections.payload_bytes);
  });
  for (int64_t p = 0; p < num_payloads; ++p) {
    const int64_t result = found[static_cast<size_t>(p)];
    if (result == kWrongIndices) return {p, "its index bits are no strictly ascending indices"};
    if (result != kRight) return {p, describe_wrong_group(layout, result)};
  }
  return {0, {}};
}

struct Senders { // of payloads that lie one after another
  int64_t first_rank;
  int64_t rank_stride = 1; // from one to the next
  int64_t rank_of(int64_t payload) const { return first_rank + payload * rank_stride; }
};

// `count` payloads [count, payload_bytes(layout)], aligned to 8. Empty, or one line that names the first rank whose payload is not what
// this rank expects, and why. Then nothing may be made of any of them.
template <typename ParallelFor>
std::string check_payloads(const Layout& layout, const uint8_t* payloads, int64_t count, Senders senders, int64_t step,
                           ParallelFor&& parallel_for) {
  Refusal refusal{0, {}};
  for (int64_t p = 0; p < count && refusal.why.empty(); ++p)
    refusal = {p, check_header(layout, payloads + p * payload_bytes(layout), senders.rank_of(p), step)};
  if (refusal.why.empty()) refusal = check_entries(layout, payloads, count, parallel_for);
  if (refusal.why.empty()) return {};
  return "the payload of rank " + std::to_string(senders.rank_of(refusal.payload)) + " is not what this rank expects (" + refusal.why + ")";
}

// One piece of a checked payload to its place in the lists [selected_numel].
void expand_piece(const Layout& layout, const uint8_t* payload, Piece piece, Entries& entries);

// One payload, whichever rank and step it says it is of, as lists. Empty, or one line that says what is wrong with it; `entries` mean
// nothing then.
template <typename ParallelFor>
std::string decode_own(const Layout& layout, const uint8_t* payload, Entries& entries, ParallelFor&& parallel_for) {
  const PayloadHeader header = read_header(payload);
  std::string problem = check_header(layout, payload, header.rank, header.step);
  if (problem.empty()) problem = check_entries(layout, payload, 1, parallel_for).why;
  if (!problem.empty()) return problem;
  entries.indices.resize(static_cast<size_t>(layout.selected_numel));
  entries.values.resize(static_cast<size_t>(layout.selected_numel));
  parallel_for(num_pieces(layout), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) expand_piece(layout, payload, piece_of(layout, piece), entries);
  });
  return {};
}

} // namespace compressed_ddp
