#include "elias_fano.h"

#include <array>
#include <atomic>
#include <cstring>

#include "encode_kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace compressed_ddp {
namespace {

uint64_t* high_words(const PayloadSections& sections, uint8_t* payload) { return reinterpret_cast<uint64_t*>(payload + sections.high); }
const uint64_t* high_words(const PayloadSections& sections, const uint8_t* payload) {
  return reinterpret_cast<const uint64_t*>(payload + sections.high);
}

uint64_t bits_below(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Bit i is set when low[i] is not above low[i - 1], for i < count <= 64; `readable` bytes lie there. Bits from `count` on mean nothing.
uint64_t not_ascending(const uint8_t* low, int64_t count, [[maybe_unused]] int64_t readable) {
  uint64_t bits = 0;
#if defined(__SSE2__)
  if (readable >= 64) {
    for (int i = 0; i < 64; i += 16) {
      const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i));
      const __m128i before = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low + i - 1));
      const auto mask = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_max_epu8(before, here), before)));
      bits |= static_cast<uint64_t>(mask) << i;
    }
    return bits;
  }
#endif
  for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>(low[i - 1] >= low[i]) << i;
  return bits;
}

// What eight high bits say, for all values that they can have: a loop over set bits would mispredict its end once in every word.
struct HighByte {
  uint8_t high[8]; // of the entry of each set bit, where the byte begins at high part 0: zeros below it
  int64_t count;   // of set bits
};
constexpr auto kHighBytes = [] {
  std::array<HighByte, 256> bytes{};
  for (size_t value = 0; value < bytes.size(); ++value)
    for (int bit = 0; bit < 8; ++bit)
      if (value >> bit & 1) {
        HighByte& byte = bytes[value];
        byte.high[byte.count] = static_cast<uint8_t>(bit - byte.count);
        ++byte.count;
      }
  return bytes;
}();

// Bit i is set when set bit i of the byte does not follow another set bit directly. By the byte and, in bit 0, the bit before.
constexpr auto kFirstOfRun = [] {
  std::array<uint8_t, 512> firsts{};
  for (size_t value = 0; value < firsts.size(); ++value)
    for (int bit = 1, count = 0; bit <= 8; ++bit)
      if (value >> bit & 1) firsts[value] |= static_cast<uint8_t>((~value >> (bit - 1) & 1) << count++);
  return firsts;
}();

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

bool check_indices(const PayloadSections& sections, const uint8_t* payload, int64_t selected_numel, Piece piece) {
  const auto* directory = reinterpret_cast<const uint32_t*>(payload + sections.directory);
  // The bits of this piece: from where the directory says its first entry lies to where the next piece's does.
  const auto bit_of = [&](int64_t entry) { return static_cast<int64_t>(directory[entry / kDirectoryStride]) + entry; };
  const int64_t begin = bit_of(piece.begin), end = piece.end == selected_numel ? 64 * sections.high_words() : bit_of(piece.end);
  if (begin >= end || end > 64 * sections.high_words()) return false;

  const uint64_t* words = high_words(sections, payload);
  const uint8_t* low = payload + sections.low;
  if (piece.begin == 0) { // nothing may lie before the first entry
    for (int64_t w = 0; w < begin / 64; ++w)
      if (words[w] != 0) return false;
    if ((words[begin / 64] & bits_below(begin % 64)) != 0) return false;
  }
  int64_t entry = piece.begin;
  int64_t noted = piece.begin; // the next entry of which the directory says where it lies
  bool right = true;
  // Whether the bit before is set: then the next entry has the same high part, or is the first of another piece, which is then wrong.
  uint64_t previous = begin == 0 ? 0 : words[(begin - 1) / 64] >> ((begin - 1) % 64) & 1;
  for (int64_t w = begin / 64; w * 64 < end; ++w) {
    const int64_t first_bit = w == begin / 64 ? begin % 64 : 0;
    const uint64_t word = words[w] & ~bits_below(first_bit) & bits_below(end - w * 64);
    // A run of set bits is entries of one high part, of which only the first need not have a larger low byte than the one before.
    uint64_t first_of_run = 0;
    int64_t count = 0;
    for (int i = 0; i < 8; ++i) {
      first_of_run |= static_cast<uint64_t>(kFirstOfRun[(i == 0 ? word << 1 : word >> (8 * i - 1)) & 0x1ff]) << count;
      count += kHighBytes[word >> (8 * i) & 0xff].count;
    }
    first_of_run &= ~(previous & word >> first_bit); // both are one bit where it matters: bit 0
    if (entry + count > piece.end) return false;
    right &= (not_ascending(low + entry, count, selected_numel - entry) & ~first_of_run & bits_below(count)) == 0;
    for (; noted < entry + count; noted += kDirectoryStride) {
      const int64_t bit = bit_of(noted) - w * 64;
      if (bit < 0 || bit >= 64) return false;
      right &= (word >> bit & 1) != 0 && std::popcount(word & bits_below(bit)) == noted - entry;
    }
    previous = word >> 63;
    entry += count;
  }
  return right && entry == piece.end;
}

void IndexCursor::go_to_index(int64_t index) {
  if (numel_ == 0) return;
  const auto high = static_cast<uint32_t>(index >> kLowBits);
  // Entries before the last stride that begins below lie below themselves.
  const int64_t stride = std::lower_bound(directory_, directory_ + (numel_ - 1) / kDirectoryStride + 1, high) - directory_ - 1;
  if (stride * kDirectoryStride > entry_) go_to_stride(stride);
  walk(numel_, index, [](int64_t, int64_t) {});
}

int64_t IndexCursor::go_to_entry(int64_t entry) {
  if (entry / kDirectoryStride * kDirectoryStride > entry_) go_to_stride(entry / kDirectoryStride);
  for (int64_t count; entry_ + (count = kHighBytes[bits_].count) <= entry; bits_ = high_[++at_]) entry_ += count;
  while (entry_ < entry) pass_entry();
  return index_here();
}

int64_t IndexCursor::offsets_below(int64_t index_begin, int64_t index_end, uint16_t* offsets) {
  const int64_t high_begin = index_begin >> kLowBits, high_end = index_end >> kLowBits;
  const uint8_t *const high_bytes = high_, *const low_bytes = low_; // here, so that no store can change them
  const int64_t numel = numel_, first = entry_;
  int64_t entry = first, at = at_;
  uint32_t bits = bits_;
  for (;; bits = high_bytes[++at]) {
    const HighByte& byte = kHighBytes[bits];
    const int64_t high = 8 * at - entry; // of the byte's first bit
    uint16_t* out = offsets + (entry - first);
    if (high + 8 - byte.count < high_end && entry + 8 < numel) [[likely]] { // some entry follows, and so does some byte
#if defined(__SSE2__)
      const auto load = [](const uint8_t* bytes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)); };
      const __m128i high_of_eight = _mm_add_epi8(load(byte.high), _mm_set1_epi8(static_cast<char>(high - high_begin)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(load(low_bytes + entry), high_of_eight));
#else
      for (int i = 0; i < 8; ++i) out[i] = static_cast<uint16_t>((high - high_begin + byte.high[i]) << kLowBits | low_bytes[entry + i]);
#endif
      entry += byte.count;
      continue;
    }
    // At the end of the payload, or where entries of the byte may lie at index_end or behind.
    for (; bits != 0; bits &= bits - 1, ++entry) {
      const int64_t high_here = 8 * at + std::countr_zero(bits) - entry;
      if (high_here >= high_end) break;
      *out++ = static_cast<uint16_t>((high_here - high_begin) << kLowBits | low_bytes[entry]);
    }
    if (bits != 0 || entry == numel || 8 * (at + 1) - entry >= high_end) break;
  }
  entry_ = entry;
  at_ = at;
  bits_ = bits;
  return entry - first;
}

} // namespace compressed_ddp
