"""Why nothing can notice some flipped comparisons of the CUDA kernels: of a line of the source that holds these words."""

from __future__ import annotations

CUB = "in CUB's header"
UNROLLED = (
    "nvcc's choice between a loop and the same loop unrolled by four, which differs beyond 768 rounds only, "
    "or a copy of the body that so few rounds never reach"
)
ZERO_MORE = "a zero more, written into what is zero or is written later"
MENDED = "what is a candidate is a guess: what it misses, a second pass finds, and what is too much, refine takes out"
OTHERS = "other threads do the same, with the same result"
FOUR = "the last four entries of a tile, one by one instead of at once"
LARGER_SEARCH = "one place more to search in; what is found is the same"
ZERO_BEHIND = "the value is 0 beyond the last entry, and zeros are taken only after all real ones"
EMPTY_ROUND = "a round more, in which there is nothing to do"
GROUP_CHECK = (
    "the bucket's last entries lie elsewhere or are missing, which the check of their group refuses"
)
NO_OVERLAP = "a dense tile that only touches this one adds nothing to it"

REASONS: tuple[tuple[str, str], ...] = (
    # compensate_select
    ("const bool valid = c < count;", ZERO_BEHIND),
    ("+ j < group.numel) <<", ZERO_BEHIND),
    ("first < count; first += 32", EMPTY_ROUND),
    ("plan.states[g] = GroupState{}", UNROLLED),
    ("plan.look_back[r] = 0", UNROLLED),
    ("high[w] = 0", ZERO_MORE),
    ("signs[w] = 0", ZERO_MORE),
    ("counts[b] = 0;", UNROLLED),
    ("i < num_sums; i += kThreads", UNROLLED),
    ("i < tile.numel; i += kThreads", UNROLLED),
    ("canonical(load_one(gradient + i))", UNROLLED),
    ("state.again = above", MENDED),
    ("(key >= low) <<", MENDED),
    ("if (key >= high)", MENDED),
    (
        "order.total > static_cast<uint32_t>(min(group.slot_numel",
        "a tile whose candidates just fill its slot is read as a whole: the same candidates",
    ),
    (
        "bits > kHistogramBits ? bits - kHistogramBits : 0",
        "at the edge the difference is 0 as well",
    ),
    (
        "if (last - b >= 0",
        "every thread has as many bins, and its last is one less than a multiple of their number: never the edge",
    ),
    ("__nanosleep(64)", "one sleep more or less before the same word is there"),
    (
        "shift >= 0; shift -= 10",
        "20, 10 and 0 are its only values, and 9 is where nvcc ends the loop",
    ),
    ("t < run.first_tile + run.num_tiles", "a run has at least one tile"),
    (
        "if (group.k > found[0].total)",
        "with exactly k entries that are not zero, both ways select all of them",
    ),
    (
        "if (__float_as_uint(canonical(value)) >> 31 != 0)",
        "the one number at this edge is a NaN that canonical() replaces",
    ),
    ("first + 4 <= numel) {", FOUR),
    # decode_apply, restore, return_dropped
    ("threadIdx.x == 0) atomicOr(&a.status->step_is_bad", OTHERS),
    ("if (block < a.count && threadIdx.x == 0)", OTHERS),
    ("if (threadIdx.x == 0) first_dense", OTHERS),
    ("if (threadIdx.x == 32) groups", OTHERS),
    ("if (seen > mine) atomicMin", "the minimum of two equal ranks"),
    ("i < a.numel; i += int64_t{gridDim.x} * kThreads", UNROLLED),
    ("p < a.count; p += kThreads", UNROLLED),
    ("i < kDecodeTileNumel; i += kThreads", UNROLLED),
    ("i < numel; i += kThreads) out[i]", UNROLLED),
    ("for (; i < numel; ++i) out[i]", UNROLLED),
    ("i + 4 <= numel; i += 4 * kThreads", FOUR),
    ("is_finite = is_finite && key_of(result)", UNROLLED),
    ("if (plan.value_format != ValueFormat::kSign) return groups", LARGER_SEARCH),
    ("count = plan.num_groups; count > 0;", LARGER_SEARCH),
    ("plan.group_ranges[groups.end].first_index < tile_end", LARGER_SEARCH),
    ("while (count > 0) {", LARGER_SEARCH),
    ("if (tile.offset + tile.numel <= index)", NO_OVERLAP),
    ("const bool any_dense =", NO_OVERLAP),
    ("plan.dense_tiles[t].offset < tile_end", NO_OVERLAP),
    ("const bool last_tile =", GROUP_CHECK),
    ("index >= tile_numel || (bit_before", GROUP_CHECK),
    ("word_index = bit / 32; word_index < 2 * plan.high_words", GROUP_CHECK),
    ("const bool is_last =", EMPTY_ROUND),
    ("const bool has_bits =", EMPTY_ROUND),
    ("first += kRanksAtOnce", EMPTY_ROUND),
    ("if (first_bit < bits.begin)", "a mask that takes nothing away"),
    ("bits.end - first_bit < 32", "PTX shifts by 32 to 0: the mask of a whole word"),
    ("here < plan.selected_numel", "bits_of_tile has refused payloads with more entries"),
    (
        "payload.directory[d] <= payload.directory[d + 1]",
        "256 entries later, index >> 8 is larger; where it seems to be equal, the tile refuses it",
    ),
    (
        "entry < end && word_index < 2 * plan.high_words",
        "of the rank's own payload the first condition ends the loop, and one round more finds nothing before `end`",
    ),
    (
        "word_index + lane < 2 * plan.high_words) word",
        "one word more is read, inside the payload, and its bits lie behind `end`",
    ),
    (CUB, "a lane whose sum nobody uses: the result is lane 0's"),
)
GUESS = "a guess is never wrong, only costly; counted_bytes_test holds the cost"
UNEXPLAINED = "none known"


def reason_of(kernel: str, code: str) -> str:
    """Return why its survivors are as good as the original."""
    if kernel == "guess":
        return GUESS
    return next((reason for words, reason in REASONS if words in code), UNEXPLAINED)
