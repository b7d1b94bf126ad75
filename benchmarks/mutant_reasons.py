"""Why nothing can notice some flipped comparisons of the CUDA kernels.

An entry holds for one kernel, for lines of the source that hold some words, and for comparisons that an expression finds: a line
has several comparisons, a comparison two sides, and what is harmless of one is not of the other. Each was read in the PTX.
"""

from __future__ import annotations

import re

UNROLLED = "code that so few rounds never reach: nvcc unrolls loops by four, and these have fewer rounds or a multiple of four"
NOT_THE_EDGE = "threads have 4 or 8 bins here, and `last` is one less than a multiple of that: only b = 7 meets the edge"
ZERO_MORE = "a zero more, written into what is zero or is written later"
OTHERS = "the same once more, by other threads or another block"
FOUR = "four entries one by one instead of at once"
LARGER_SEARCH = "one place more to search in; what is found is the same"
EMPTY_ROUND = "a round more, in which there is nothing to do"
BEHIND_BUCKET = "finds an index behind the bucket, which the check of the entry's group refuses"
NO_OVERLAP = "a dense tile that only touches this one adds nothing to it"
NO_SIGNS = "this kernel has no signs, and nobody asks"
NO_EDGES = "copies of whole units have no edges: neither the first thread nor the second has one"
BEHIND_LAST = "behind the last entry, where it counts only before entries that are behind it, too"
UNEXPLAINED = "none known"

HEADER = "in a header of CUB or CUDA"
OWN_ENTRIES = "encode_lost|(restore|return_dropped|add_lost) .*"

# Kernels, words of the source, comparisons, reason
REASONS: tuple[tuple[str, str, str, str], ...] = (
    # compensate_select
    ("guess", "high[w] = 0", ".*", ZERO_MORE),
    ("guess", "signs[w] = 0", ".*", ZERO_MORE),
    ("guess", "", ".*", "a guess is never wrong, only costly; counted_bytes_test holds the cost"),
    ("histogram .*", "high[w] = 0", ".*", ZERO_MORE),
    ("histogram .*", "signs[w] = 0", ".*", ZERO_MORE),
    (
        "histogram .*|small",
        "b < bins; b += kThreads",
        r"setp\.(ge\.s32 %, %, %|eq\.s32 %, %, [12]);",
        UNROLLED,
    ),
    (
        "histogram .*|small",
        "shift >= 0; shift -= 10",
        r"setp\.gt\.s32 %, %, 9;",
        "20, 10 and 0 are its values",
    ),
    (
        "histogram .*|small|filter .*|refine",
        "if (last - b >= 0",
        r"setp\.lt\.s32 %, %, [0-6];",
        NOT_THE_EDGE,
    ),
    (
        "histogram .*",
        "bits > kHistogramBits ?",
        r"setp\.gt\.u32 %, %, 11;",
        "at the edge the difference is 0 as well",
    ),
    (
        "histogram .*",
        "if (group.k > found[0].total)",
        r"setp\.gt\.s64 .*",
        "with exactly k entries that are not zero both ways select all of them",
    ),
    ("histogram .*|small", "+ j < group.numel) <<", r"setp\.lt\.s32 %, %, %;", BEHIND_LAST),
    ("histogram .*|small|filter .*", "first + 4 <= numel", r"setp\.gt\.s32 %, %, %;", FOUR),
    (
        "histogram .*|small",
        "if (__float_as_uint(canonical(value)) >> 31",
        r"setp\.gt\.s32 %, %, -1;",
        "the one number at this edge is a NaN that canonical() replaces",
    ),
    (
        "filter .*",
        "order.total > static_cast<uint32_t>(min(group.slot_numel",
        r"setp\.gt\.u32 .*",
        "a tile whose candidates just fill its slot is read as a whole: the same candidates",
    ),
    (
        r"filter \(first\)",
        "state.again = above",
        r"setp\.gt\.s64 .*",
        "a second pass that was not needed",
    ),
    (r"filter \(again\)", "state.again = above", r"setp\.le\.s64 .*", "nobody reads it any more"),
    ("emit .*", "const bool valid = c < count;", r"setp\.lt\.s32 .*", BEHIND_LAST),
    ("emit .*|refine", "first < count; first += 32", r"setp\.lt\.s32 .*", EMPTY_ROUND),
    (
        r"emit \(sign values\)",
        "const bool read_all =",
        r"setp\.ne\.s32 %, %, 0;",
        "the residual of signs keeps the whole value, which lies there already",
    ),
    (
        r"emit \(sign values\)",
        "const bool taken_out =",
        r"setp\.ge\.u32 .*",
        "the residual of signs keeps the whole value, which lies there already",
    ),
    (
        ".*",
        HEADER,
        r"setp\.gt\.s32 %, %, (29|27|23|15);",
        "a lane of a sum over a warp that does not reach lane 0, whose result is taken",
    ),
    # a rank's own entries
    (
        OWN_ENTRIES,
        "entry < end && word_index < 2 * plan.high_words",
        r"setp\.(ge|lt)\.s64 .*",
        "of a rank's own payload `entry < end` ends the loop before",
    ),
    (
        OWN_ENTRIES,
        "word_index + lane < 2 * plan.high_words) word",
        r"setp\.ge\.s64 .*",
        "a word more is read, inside the payload, and its bits lie behind `end`",
    ),
    # decode_apply
    ("nan_if_flagged", "threadIdx.x == 0) atomicOr", r"setp\.ne\.s32 %, %, 0;", OTHERS),
    ("decode_apply .*", "if (block < a.count && threadIdx.x == 0)", ".*", OTHERS),
    ("decode_apply .*", "if (threadIdx.x == 0) first_dense", r"setp\.ne\.s32 %, %, 0;", OTHERS),
    (
        "decode_apply .*",
        "if (word_index >= 2 * plan.high_words) return",
        r"setp\.ge\.s64 .*",
        "zeros of a good payload suffice to reach a tile; a bad one has too many ones then, and is refused for them",
    ),
    (
        "decode_apply .*|unpack_shards",
        "if (seen > mine) atomicMin",
        ".*",
        "the minimum of two equal ranks",
    ),
    ("decode_apply .*", "i < kDecodeTileNumel; i += kThreads", ".*", UNROLLED),
    (
        r"decode_apply \((fp32|bf16) values\)",
        "if (plan.value_format != ValueFormat::kSign) return groups",
        ".*",
        NO_SIGNS,
    ),
    (r"decode_apply \((fp32|bf16) values\)", "count = plan.num_groups; count > 0;", ".*", NO_SIGNS),
    (r"decode_apply \((fp32|bf16) values\)", "plan.group_ranges[groups", ".*", NO_SIGNS),
    (
        r"decode_apply \(sign values\)",
        "if (plan.value_format != ValueFormat::kSign) return groups",
        ".*",
        LARGER_SEARCH,
    ),
    (
        r"decode_apply \(sign values\)",
        "count = plan.num_groups; count > 0;",
        r"setp\.lt\.s32 %, %, 1;",
        LARGER_SEARCH,
    ),
    (
        r"decode_apply \(sign values\)",
        "plan.group_ranges[groups.end].first_index < tile_end",
        r"setp\.ge\.s64 .*",
        LARGER_SEARCH,
    ),
    ("decode_apply .*", "while (count > 0) {", r"setp\.lt\.s32 %, %, 1;", LARGER_SEARCH),
    (
        "decode_apply .*",
        "if (tile.offset + tile.numel <= index)",
        r"setp\.(ge|gt|le|lt)\.s64 .*",
        NO_OVERLAP,
    ),
    ("decode_apply .*", "const bool any_dense =", r"setp\.(ge|gt|le|lt)\.s64 .*", NO_OVERLAP),
    (
        "decode_apply .*",
        "plan.dense_tiles[t].offset < tile_end",
        r"setp\.(ge|gt|le|lt)\.s64 .*",
        NO_OVERLAP,
    ),
    (
        "decode_apply .*",
        "t < plan.num_dense_tiles && plan",
        r"setp\.ge\.s32 .*",
        "of the first tile any_dense knows already",
    ),
    (
        "decode_apply .*",
        "const bool last_tile =",
        r"setp\.ge\.s64 .*",
        "that an entry is missing, the check of its group notices",
    ),
    ("decode_apply .*", "index >= tile_numel || (bit_before", r"setp\.ge\.s32 .*", BEHIND_BUCKET),
    (
        "decode_apply .*",
        "word_index = bit / 32; word_index < 2 * plan.high_words",
        r"setp\.(ge|lt)\.s64 .*",
        BEHIND_BUCKET,
    ),
    (
        "decode_apply .*",
        "if (first_bit < bits.end && word_index",
        r"setp\.(le|gt)\.s64 .*",
        "every word in this branch begins before `bits.end`",
    ),
    (
        "decode_apply .*",
        "for (; i < numel; ++i) out[i]",
        r"setp\.(lt\.s32 %, %, %|lt\.u32 %, %, 3);",
        UNROLLED,
    ),
    ("decode_apply .*", "const bool is_last =", r"setp\.(ge|lt)\.s64 .*", EMPTY_ROUND),
    ("decode_apply .*", "const bool has_bits =", r"setp\.lt\.s64 .*", EMPTY_ROUND),
    ("decode_apply .*", "first += kRanksAtOnce", r"setp\.gt\.s32 .*", EMPTY_ROUND),
    ("decode_apply .*", "if (first_bit < bits.begin)", ".*", "a mask that takes nothing away"),
    (
        "decode_apply .*",
        "bits.end - first_bit < 32",
        r"setp\.lt\.s64 %, %, 32;",
        "PTX shifts by 32 to 0: the mask of a whole word",
    ),
    (
        "decode_apply .*",
        "here < plan.selected_numel",
        r"setp\.lt\.s64 .*",
        "bits_of_tile has refused payloads with more entries",
    ),
    (
        "decode_apply .*",
        "payload.directory[d] <= payload.directory[d + 1]",
        r"setp\.le\.u32 .*",
        "256 entries later index >> 8 is larger; where it seems to be equal, the tile refuses it",
    ),
    ("decode_apply .*", "i + 4 <= numel; i += 4 * kThreads", r"setp\.(gt|le)\.s32 .*", FOUR),
    # shards
    ("pack_shards|unpack_shards", "first += kThreads", r"setp\.lt\.s32 .*", EMPTY_ROUND),
    (
        "pack_shards|unpack_shards",
        "i < num_words; i += kWordsAtOnce * kThreads",
        r"setp\.(lt|ge)\.s32 .*",
        EMPTY_ROUND,
    ),
    (
        "pack_shards|unpack_shards",
        "for (int j = 0; j < kWordsAtOnce; ++j)",
        r"setp\.eq\.s32 %, %, 0;",
        EMPTY_ROUND,
    ),
    ("unpack_shards", "if (i + j * kThreads < num_words) words[j]", r"setp\.ge\.s32 .*", UNROLLED),
    ("pack_shards", "const int mine = first", r"setp\.lt\.s32 %, %, 1;", NO_EDGES),
    ("unpack_shards", "(of nvcc)", r"setp\.lt\.s32 %, %, 1;", NO_EDGES),
)


def _holds(entry: tuple[str, str, str, str], survivor: tuple[str, str, str]) -> bool:
    kernels, words, comparisons, _ = entry
    kernel, code, comparison = survivor
    return bool(
        re.fullmatch(kernels, kernel) and words in code and re.fullmatch(comparisons, comparison)
    )


def reason_of(kernel: str, code: str, comparison: str) -> str:
    """Return why its survivors are as good as the original."""
    found = (entry for entry in REASONS if _holds(entry, (kernel, code, comparison)))
    return next(found, ("", "", "", UNEXPLAINED))[3]


def unused_reasons(survivors: list[tuple[str, str, str]]) -> list[tuple[str, str, str, str]]:
    """Return the entries that none of the survivors (kernel, code, comparison) needs."""
    return [entry for entry in REASONS if not any(_holds(entry, one) for one in survivors)]
