// The indices of a payload as Elias-Fano code (wire_format.h), written and read in pieces that do not depend on each other.
// Torch-free.
#pragma once

#include <algorithm>

#include "../wire_format.h"

namespace compressed_ddp {

inline constexpr int64_t kPieceNumel = 64 * kDirectoryStride; // entries that one task takes: 64 KiB of indices

inline int64_t num_pieces(const Layout& layout) { return (layout.selected_numel + kPieceNumel - 1) / kPieceNumel; }
struct Piece {
  int64_t begin, end; // entries
};
inline Piece piece_of(const Layout& layout, int64_t piece) {
  return {piece * kPieceNumel, std::min((piece + 1) * kPieceNumel, layout.selected_numel)};
}

// Before the first piece: the high bits are or-ed in.
void clear_high_bits(const PayloadSections& sections, uint8_t* payload);

// Writes entries [piece.begin, piece.end) of `indices` [selected_numel] to the directory, the high bits and the low bytes. Pieces may
// be written at the same time.
void encode_indices(const PayloadSections& sections, const int32_t* indices, Piece piece, uint8_t* payload);

// Reads them back into `indices` [selected_numel]. Whatever the bytes: reads the payload alone and writes this piece alone. False when
// they are no code of so many strictly ascending indices; when all pieces are true, so is every step from one piece to the next, if
// the first index of a piece is above the last one of the piece before.
bool decode_indices(const PayloadSections& sections, const uint8_t* payload, int64_t selected_numel, Piece piece, int32_t* indices);

} // namespace compressed_ddp
