// The indices of a payload as Elias-Fano code (wire_format.h), written and checked in pieces that do not depend on each other, and read
// by a cursor. Torch-free.
#pragma once

#include <algorithm>
#include <bit>

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

// Whatever the bytes: reads the payload alone. When all pieces are true, they are the code of selected_numel indices that ascend strictly,
// also from one piece to the next, and the directory is that of the indices: what IndexCursor builds upon.
bool check_indices(const PayloadSections& sections, const uint8_t* payload, int64_t selected_numel, Piece piece);

// Walks over the entries of a payload, all of whose pieces check_indices found right. Forward only.
class IndexCursor {
 public:
  IndexCursor(const PayloadSections& sections, const uint8_t* payload, int64_t selected_numel)
      : high_(payload + sections.high),
        low_(payload + sections.low),
        directory_(reinterpret_cast<const uint32_t*>(payload + sections.directory)),
        numel_(selected_numel) {
    if (numel_ > 0) go_to_stride(0);
  }

  int64_t entry() const { return entry_; } // the next one

  // To the first entry whose index is at least `index`, a multiple of 256.
  void go_to_index(int64_t index);
  // To `entry`, which is not behind the cursor. Returns its index.
  int64_t go_to_entry(int64_t entry);

  // Writes index - index_begin of the entries from here on whose index is below index_end, and stops behind them; returns how many. Both
  // are multiples of 256 and lie at most 65536 apart, and no entry from here on is below index_begin. `offsets` has room for
  // index_end - index_begin + kOffsetSlack: what lies behind the last one is overwritten, too.
  int64_t offsets_below(int64_t index_begin, int64_t index_end, uint16_t* offsets);
  static constexpr int64_t kOffsetSlack = 8;

  // Calls function(entry, index) for the entries before entry_end whose index is below index_end, a multiple of 256, and stops behind them.
  template <typename Function>
  void walk(int64_t entry_end, int64_t index_end, Function&& function) {
    for (; entry_ < entry_end; pass_entry()) {
      while (bits_ == 0) bits_ = high_[++at_]; // some bit is set: the check has counted them
      const int64_t index = index_here();
      if (index >= index_end) return;
      function(entry_, index);
    }
  }

 private:
  void go_to_stride(int64_t stride) {
    entry_ = stride * kDirectoryStride;
    const int64_t bit = static_cast<int64_t>(directory_[stride]) + entry_;
    at_ = bit / 8;
    bits_ = high_[at_] & 0xffu << (bit % 8);
  }
  int64_t index_here() const { return (8 * at_ + std::countr_zero(bits_) - entry_) << kLowBits | low_[entry_]; }
  void pass_entry() {
    bits_ &= bits_ - 1;
    ++entry_;
  }

  const uint8_t* high_; // the words by bytes: little-endian
  const uint8_t* low_;
  const uint32_t* directory_;
  int64_t numel_;
  int64_t entry_ = 0; // the next one
  int64_t at_ = 0;    // the byte that holds its high bit, or one before
  uint32_t bits_ = 0; // of that byte, the bits of this entry and those behind
};

} // namespace compressed_ddp
