// The selected entries of payloads as plain lists again, checked: what decode_apply and restore begin with. Torch-free.
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

struct Entries { // of world_size payloads, one after another
  std::vector<int32_t> indices;
  std::vector<float> values;
};

// Of indices [selected_numel] whose pieces ascend: that they ascend from piece to piece, and that every group's lie in the group's span.
// Empty, or one line that says where not.
std::string check_groups(const Layout& layout, const int32_t* indices);

struct Refusal {
  int64_t payload; // the first that is wrong
  std::string why; // empty: none is
};

// Of payloads whose headers are right. parallel_for as in compensate_select.h.
template <typename ParallelFor>
Refusal decode_entries(const Layout& layout, const uint8_t* payloads, int64_t num_payloads, Entries& entries, ParallelFor&& parallel_for) {
  const PayloadSections sections = payload_sections(layout);
  const auto numel = static_cast<size_t>(num_payloads * layout.selected_numel);
  entries.indices.resize(numel);
  entries.values.resize(numel);
  const int64_t pieces = num_pieces(layout);
  std::vector<uint8_t> wrong(static_cast<size_t>(num_payloads)); // some piece of it is
  parallel_for(num_payloads * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / pieces;
      const uint8_t* payload = payloads + p * sections.payload_bytes;
      const Piece piece = piece_of(layout, i % pieces);
      if (decode_indices(sections, payload, layout.selected_numel, piece, entries.indices.data() + p * layout.selected_numel))
        decode_values(layout, sections, payload, piece, entries.values.data() + p * layout.selected_numel);
      else
        std::atomic_ref(wrong[static_cast<size_t>(p)]).store(1, std::memory_order_relaxed);
    }
  });
  for (int64_t p = 0; p < num_payloads; ++p) {
    if (wrong[static_cast<size_t>(p)] != 0) return {p, "its index bits are no strictly ascending indices"};
    std::string problem = check_groups(layout, entries.indices.data() + p * layout.selected_numel);
    if (!problem.empty()) return {p, std::move(problem)};
  }
  return {0, {}};
}

struct Senders { // of payloads that lie one after another: ranks first_rank, first_rank + 1, ..
  int64_t first_rank;
  int64_t world_size; // of their group, as their headers have it
};

// `count` payloads [count, payload_bytes(layout)], aligned to 8. Empty, or one line that names the first rank whose payload is not what
// this rank expects, and why; `entries` mean nothing then.
template <typename ParallelFor>
std::string decode(const Layout& layout, const uint8_t* payloads, int64_t count, int64_t step, Entries& entries, ParallelFor&& parallel_for,
                   Senders senders) {
  Refusal refusal{0, {}};
  for (int64_t p = 0; p < count && refusal.why.empty(); ++p)
    refusal = {p, check_header(layout, payloads + p * payload_bytes(layout), static_cast<uint32_t>(senders.first_rank + p),
                               static_cast<uint32_t>(senders.world_size), step)};
  if (refusal.why.empty()) refusal = decode_entries(layout, payloads, count, entries, parallel_for);
  if (refusal.why.empty()) return {};
  return "the payload of rank " + std::to_string(senders.first_rank + refusal.payload) + " is not what this rank expects (" + refusal.why +
         ")";
}

// The payloads of all ranks of a group.
template <typename ParallelFor>
std::string decode(const Layout& layout, const uint8_t* gathered, int64_t world_size, int64_t step, Entries& entries,
                   ParallelFor&& parallel_for) {
  return decode(layout, gathered, world_size, step, entries, parallel_for, Senders{0, world_size});
}

// One payload, whichever rank and step it says it is of. Empty, or one line that says what is wrong with it.
template <typename ParallelFor>
std::string decode_own(const Layout& layout, const uint8_t* payload, Entries& entries, ParallelFor&& parallel_for) {
  const PayloadHeader header = read_header(payload);
  const std::string problem = check_header(layout, payload, header.rank, header.world_size, header.step);
  return problem.empty() ? decode_entries(layout, payload, 1, entries, parallel_for).why : problem;
}

} // namespace compressed_ddp
