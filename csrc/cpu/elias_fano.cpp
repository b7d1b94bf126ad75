#include "elias_fano.h"

#include <atomic>
#include <bit>
#include <cstring>

#include "encode_kernels.h"

namespace compressed_ddp {
namespace {

uint64_t* high_words(const PayloadSections& sections, uint8_t* payload) { return reinterpret_cast<uint64_t*>(payload + sections.high); }
const uint64_t* high_words(const PayloadSections& sections, const uint8_t* payload) {
  return reinterpret_cast<const uint64_t*>(payload + sections.high);
}

} // namespace

void clear_high_bits(const PayloadSections& sections, uint8_t* payload) {
  std::memset(payload + sections.high, 0, static_cast<size_t>(8 * sections.high_words()));
}

void encode_indices(const PayloadSections& sections, const int32_t* indices, Piece piece, uint8_t* payload) {
  if (piece.begin == piece.end) return;
  auto* directory = reinterpret_cast<uint32_t*>(payload + sections.directory);
  for (int64_t e = piece.begin; e < piece.end; e += kDirectoryStride)
    directory[e / kDirectoryStride] = static_cast<uint32_t>(indices[e]) >> kLowBits;
  uint8_t* low = payload + sections.low;
  for (int64_t e = piece.begin; e < piece.end; ++e) low[e] = static_cast<uint8_t>(indices[e]);
  const PieceEnds ends = best_encode().high_bits(indices, piece.begin, piece.end, high_words(sections, payload));
  // At its ends a piece shares a word with another one.
  for (const HighWord& end : {ends.first, ends.last})
    std::atomic_ref(high_words(sections, payload)[end.at]).fetch_or(end.bits, std::memory_order_relaxed);
}

bool decode_indices(const PayloadSections& sections, const uint8_t* payload, int64_t selected_numel, Piece piece, int32_t* indices) {
  const auto* directory = reinterpret_cast<const uint32_t*>(payload + sections.directory);
  // The bits of this piece: from where the directory says its first entry lies to where the next piece's does.
  const auto bit_of = [&](int64_t entry) { return static_cast<int64_t>(directory[entry / kDirectoryStride]) + entry; };
  const int64_t begin = bit_of(piece.begin), end = piece.end == selected_numel ? 64 * sections.high_words() : bit_of(piece.end);
  if (begin >= end || end > 64 * sections.high_words()) return false;

  const uint64_t* words = high_words(sections, payload);
  const uint8_t* low = payload + sections.low;
  int64_t entry = piece.begin;
  if (piece.begin == 0) { // nothing may lie before the first entry
    for (int64_t w = 0; w < begin / 64; ++w)
      if (words[w] != 0) return false;
    if (begin % 64 != 0 && words[begin / 64] << (64 - begin % 64) != 0) return false;
  }
  for (int64_t w = begin / 64; w * 64 < end; ++w) {
    uint64_t word = words[w];
    if (w == begin / 64) word &= ~uint64_t{0} << (begin % 64);
    if ((w + 1) * 64 > end) word &= ~uint64_t{0} >> (64 - end % 64);
    if (entry + std::popcount(word) > piece.end) return false;
    for (; word != 0; word &= word - 1, ++entry) {
      const auto high = static_cast<uint32_t>(w * 64 + std::countr_zero(word) - entry);
      indices[entry] = static_cast<int32_t>(high << kLowBits | low[entry]);
    }
  }
  if (entry != piece.end) return false;

  bool right = true; // no branches: the compiler turns both loops into vector code
  for (int64_t e = piece.begin; e < piece.end; e += kDirectoryStride)
    right &= static_cast<uint32_t>(indices[e]) >> kLowBits == directory[e / kDirectoryStride];
  for (int64_t e = piece.begin + 1; e < piece.end; ++e) right &= indices[e - 1] < indices[e];
  return right;
}

} // namespace compressed_ddp
