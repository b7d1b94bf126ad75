"""decode_apply_ against reference.py, bit for bit; a payload from a peer is untrusted input."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from stage_cases import (
    BUCKET,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    SMALL,
    WIDE,
    Layout,
    assert_same_bits,
    bits_of,
    each_value_format,
    encoded_by,
    indices_of,
    sections_of,
    with_threads,
    write_indices,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_ddp import ops, reference
from compressed_ddp._native import _C

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]


def assert_equals_reference(layout, world_size, dtype, value_format, seed, kind="normal"):
    options = {"value_format": value_format, "step": 4}
    gathered = encoded_by(ops, layout, world_size, kind=kind, seed=seed, **options)
    bucket = torch.full((layout.numel,), 7.0, dtype=dtype)
    expected = bucket.clone()
    ops.decode_apply_(bucket, gathered, *layout.arguments, **options)
    reference.decode_apply_(expected, gathered, *layout.arguments, **options)
    assert_same_bits(bucket, expected)


@each_value_format
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8], ids="ranks={}".format)
def test_the_average_equals_the_reference(world_size, layout, value_format, seed):
    assert_equals_reference(layout, world_size, torch.float32, value_format, seed)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_half_precision_averages_equal_the_reference(layout, dtype, seed):
    assert_equals_reference(layout, 2, dtype, "bf16", seed)


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_average_of_adversarial_gradients_equals_the_reference(kind, dtype, value_format, seed):
    assert_equals_reference(BUCKET, 3, dtype, value_format, seed, kind)


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flag_turns_the_whole_bucket_into_nan(dtype, value_format, seed):
    gathered = encoded_by(ops, BUCKET, 3, value_format=value_format, seed=seed)
    gathered[1, 1] = 1
    bucket = torch.zeros(BUCKET.numel, dtype=dtype)
    ops.decode_apply_(bucket, gathered, *BUCKET.arguments, value_format=value_format)
    assert torch.isnan(bucket).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_bucket_may_lie_between_the_addresses_of_its_type(dtype, seed):
    """A view of bytes: stores past the caches need an aligned address, which no entry of it has."""
    numel = (17 << 20) // dtype.itemsize
    layout = Layout([numel], [0], [5000])
    gathered = encoded_by(ops, layout, 2, seed=seed)
    expected = torch.empty(numel, dtype=dtype)
    ops.decode_apply_(expected, gathered, *layout.arguments)
    memory = bytearray(numel * dtype.itemsize + 64)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 32 + 1
    bucket = torch.frombuffer(memory, dtype=dtype, count=numel, offset=begin)
    assert bucket.data_ptr() % dtype.itemsize == 1
    ops.decode_apply_(bucket, gathered, *layout.arguments)
    assert_same_bits(bucket, expected)
    assert not any(memory[:begin]) and not any(memory[begin + numel * dtype.itemsize :])


def test_ranks_are_added_in_order_and_scaled_once(seed):
    layout = Layout([1], [0], [1])
    parts = [1e8, 1.0, -1e8]  # another order of addition gives another sum
    one = torch.tensor([0], dtype=torch.int32)
    payloads = [
        ops.encode(
            torch.tensor([part]), one, torch.ones(1), *layout.arguments,
            value_format="fp32", rank=r,
        )
        for r, part in enumerate(parts)
    ]  # fmt: skip
    bucket = torch.empty(1)
    ops.decode_apply_(bucket, torch.stack(payloads), *layout.arguments, value_format="fp32")
    in_order = torch.tensor(1e8) + 1.0 - torch.tensor(1e8)
    assert_same_bits(bucket, (in_order * torch.tensor(1 / 3)).reshape(1))


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, value_format, seed):
    layout = Layout([150_001, 999, 70_000], [0, -1, 1], [15_000, 7_000])
    gathered = encoded_by(ops, layout, 2, value_format=value_format, seed=seed)
    expected = torch.empty(layout.numel, dtype=dtype)
    reference.decode_apply_(expected, gathered, *layout.arguments, value_format=value_format)
    buckets = []
    for threads in (1, 2):
        buckets.append(torch.empty(layout.numel, dtype=dtype))
        with with_threads(threads):
            ops.decode_apply_(buckets[-1], gathered, *layout.arguments, value_format=value_format)
    for bucket in buckets:
        assert_same_bits(bucket, expected)


# ---- hostile payloads


def refused(gathered, words, layout=SMALL, **options):
    bucket = torch.full((layout.numel,), 7.0)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ops.decode_apply_(bucket, gathered, *layout.arguments, **options)
    assert str(caught.value).startswith("decode_apply_: the payload of rank ")
    assert str(caught.value).endswith("the bucket is unchanged")
    assert_same_bits(bucket, torch.full((layout.numel,), 7.0))
    return str(caught.value)


HEADER_FIELDS = {  # offset, what the error calls it
    "version": (0, "wire format version: expected 3, got "),
    "rank": (2, "rank: expected 1, got "),
    "step": (4, "step: expected 9, got "),
    "layout": (6, "layout differs: other segments, groups, k or value_format"),
}
HEADER_BYTES = [
    (name, at)
    for (name, (offset, _)), end in zip(HEADER_FIELDS.items(), [1, 4, 6, 8])
    for at in range(offset, end)
]


@pytest.mark.parametrize(
    ("field", "at"), HEADER_BYTES, ids=[f"{name}-byte={at}" for name, at in HEADER_BYTES]
)
def test_a_flipped_header_byte_is_refused_with_rank_and_field(field, at):
    good = encoded_by(ops, SMALL, 3, step=9)
    for bit in (1, 0x80):
        gathered = good.clone()
        gathered[1, at] ^= bit
        words = f"the payload of rank 1 is not what this rank expects ({HEADER_FIELDS[field][1]}"
        refused(gathered, words, step=9)


@pytest.mark.parametrize("bit", [4, 0x80])
def test_an_unknown_flag_is_refused(bit):
    gathered = encoded_by(ops, SMALL, 3)
    gathered[2, 1] ^= bit
    refused(gathered, "the payload of rank 2 is not what this rank expects (flags beyond the")


def test_a_header_in_place_of_a_payload_is_refused_and_says_where_to_look():
    gathered = encoded_by(ops, SMALL, 3)
    gathered[2, 1] ^= 2
    refused(
        gathered,
        "the payload of rank 2 is not what this rank expects (its rank had nothing to send: its own error says why",
    )


@pytest.mark.parametrize(
    ("value_formats", "k"),
    [(("fp32", "bf16"), 1), (("fp32", "sign"), 2), (("bf16", "sign"), 3)],
    ids=lambda what: "-".join(what) if isinstance(what, tuple) else "",
)
def test_a_payload_of_another_value_format_is_refused_although_its_size_is_right(value_formats, k):
    layout = Layout([6, 4], [0, 1], [k, k])
    for sent, expected in itertools.permutations(value_formats):
        gathered = encoded_by(ops, layout, 2, value_format=sent)
        assert gathered.shape[1] == _C.payload_bytes(*layout.arguments, expected)
        words = "the payload of rank 0 is not what this rank expects (layout differs: other segments, groups, k or value_format)"
        refused(gathered, words, layout, value_format=expected)


@each_value_format
@pytest.mark.parametrize(
    ("indices", "words"),
    [
        pytest.param([1, 0, 8], "strictly ascending", id="descending"),
        pytest.param([3, 3, 8], "strictly ascending", id="duplicate"),
        pytest.param([0, 5, 3], "strictly ascending", id="descending-later"),
        pytest.param([3, 6, 8], "the indices of group 0", id="in-the-dense-segment"),
        pytest.param([3, 9, 10], "the indices of group 0", id="in-another-group"),
        pytest.param([0, 5, 12], "the indices of group 1", id="one-beyond-the-end"),
        pytest.param([0, 5, 255], "the indices of group 1", id="far-beyond-the-end"),
        pytest.param([0, 5, 7], "the indices of group 1", id="below-its-group"),
    ],
)
def test_impossible_indices_are_refused(indices, words, value_format):
    for rank in range(3):
        gathered = encoded_by(ops, SMALL, 3, value_format=value_format)
        write_indices(gathered[rank], SMALL, indices, value_format)
        message = refused(gathered, words, value_format=value_format)
        assert f"the payload of rank {rank} is not what this rank expects (" in message


def first_bit(section):
    return min(bits_of(section))


def flip(section, bit):
    section[bit // 8] ^= 1 << bit % 8


def clear_a_high_bit(sections):
    flip(sections["high"], first_bit(sections["high"]))


def set_a_high_bit(sections):
    used = set(bits_of(sections["high"]))
    flip(sections["high"], min(set(range(300)) - used))


def move_the_last_high_bit_beyond_the_bucket(sections):
    flip(sections["high"], max(bits_of(sections["high"])))
    flip(sections["high"], 320 + (2039 >> 8))  # the first bit that no entry can have


def move_the_last_high_bit_to_the_end_of_its_word(sections):
    flip(sections["high"], max(bits_of(sections["high"])))
    flip(sections["high"], 8 * sections["high"].numel() - 1)


def clear_the_high_bits(sections):
    sections["high"].zero_()


def set_all_high_bits(sections):
    sections["high"].fill_(255)


def put_all_entries_at_the_end(sections):
    clear_the_high_bits(sections)
    for bit in range(8 * sections["high"].numel() - 320, 8 * sections["high"].numel()):
        flip(sections["high"], bit)


def move_the_directory_by_one(sections):
    sections["directory"][4] += 1


def begin_the_directory_late(sections):
    sections["directory"][0] = 1


def point_the_directory_far_away(sections):
    sections["directory"][4:] = 255


def point_the_whole_directory_far_away(sections):
    sections["directory"].fill_(255)


def equal_low_bytes(sections):
    sections["low"].fill_(7)


def descending_low_bytes(sections):
    sections["low"].copy_(sections["low"].flip(0))


@each_value_format
@pytest.mark.parametrize(
    "change",
    [
        clear_a_high_bit,
        set_a_high_bit,
        move_the_last_high_bit_beyond_the_bucket,
        move_the_last_high_bit_to_the_end_of_its_word,
        clear_the_high_bits,
        set_all_high_bits,
        put_all_entries_at_the_end,
        move_the_directory_by_one,
        begin_the_directory_late,
        point_the_directory_far_away,
        point_the_whole_directory_far_away,
        equal_low_bytes,
        descending_low_bytes,
    ],
)
def test_index_sections_that_contradict_themselves_are_refused(change, value_format, seed):
    for rank in range(2):
        gathered = encoded_by(ops, WIDE, 2, value_format=value_format, seed=seed)
        change(sections_of(gathered[rank], WIDE, value_format))
        words = f"the payload of rank {rank} is not what this rank expects ("
        refused(gathered, words, WIDE, value_format=value_format)


def test_shuffled_indices_are_refused(seed):
    layout = Layout([250], [0], [200])  # one high part: any order of the low bytes can be written
    gathered = encoded_by(ops, layout, 2, seed=seed)
    indices = torch.tensor(indices_of(gathered[1], layout))
    write_indices(gathered[1], layout, indices[torch.randperm(200)].tolist())
    refused(gathered, "rank 1 is not what this rank expects (", layout)


@each_value_format
def test_of_payloads_with_a_flipped_bit_the_reference_refuses_the_same_ones(value_format, seed):
    good = encoded_by(ops, WIDE, 2, value_format=value_format, seed=seed)
    options = {"value_format": value_format}
    taken = 0
    for _ in range(300):
        gathered = good.clone()
        flip(gathered[1], int(torch.randint(8 * 8, 8 * gathered.shape[1], ())))
        buckets = []
        for stages in (ops, reference):
            bucket = torch.full((WIDE.numel,), 7.0)
            try:
                stages.decode_apply_(bucket, gathered, *WIDE.arguments, **options)
            except ValueError:
                assert_same_bits(bucket, torch.full((WIDE.numel,), 7.0))
            buckets.append(bucket)
        assert_same_bits(*buckets)
        taken += int(not buckets[0].eq(7.0).all())
    assert 10 < taken < 290, (
        "some bits make another good payload: of values, dense entries, padding"
    )


def test_swapped_payloads_are_refused():
    gathered = encoded_by(ops, SMALL, 2)
    refused(
        gathered.flip(0), "the payload of rank 0 is not what this rank expects (rank: expected 0"
    )


def test_random_bytes_are_refused(seed):
    for _ in range(50):
        noise = torch.randint(0, 256, (3, 40), dtype=torch.uint8)
        refused(noise, "the payload of rank 0 is not what this rank expects (")


@each_value_format
def test_random_bytes_behind_a_good_header_are_refused(value_format, seed):
    for _ in range(50):
        gathered = encoded_by(ops, WIDE, 2, value_format=value_format)
        gathered[1, 8:] = torch.randint(0, 256, gathered[1, 8:].shape, dtype=torch.uint8)
        words = "the payload of rank 1 is not what this rank expects ("
        refused(gathered, words, WIDE, value_format=value_format)


# ---- refusals of the caller's own mistakes

GATHERED = "expected gathered to be contiguous [world_size, 40], got"
REFUSALS = {
    "layout": (ValueError, "layout: expected one k per group", {"k": [2]}),
    "bucket-numel": (
        ValueError,
        "expected bucket to be flat and contig",
        {"bucket": torch.ones(9)},
    ),
    "bucket-stride": (ValueError, "expected bucket to be flat", {"bucket": torch.ones(24)[::2]}),
    "bucket-dtype": (
        ValueError,
        "expected gradients of dtype float32, float16 or bfloat16, got Double",
        {"bucket": torch.ones(12).double()},
    ),
    "gathered-dtype": (
        TypeError,
        "expected gathered to have dtype Byte, got Char",
        {"gathered": torch.zeros(1, 40, dtype=torch.int8)},
    ),
    "gathered-flat": (ValueError, f"{GATHERED} [40]", {"gathered": torch.zeros(40).byte()}),
    "no-ranks": (ValueError, f"{GATHERED} [0, 40]", {"gathered": torch.zeros(0, 40).byte()}),
    "size": (ValueError, f"{GATHERED} [2, 64]", {"gathered": torch.zeros(2, 64).byte()}),
    "gathered-stride": (
        ValueError,
        f"{GATHERED} [2, 40]",
        {"gathered": torch.zeros(2, 80).byte()[:, ::2]},
    ),
    "unaligned": (
        ValueError,
        "expected gathered to be aligned to 8 bytes; clone() it",
        {"gathered": torch.zeros(48).byte()[4:44].view(1, 40)},
    ),
    "value-format": (
        ValueError,
        "decode_apply_: value_format must be one of ('fp32', 'bf16', 'sign'), got 'int8'",
        {"value_format": "int8"},
    ),
    "value-format-none": (
        ValueError,
        "decode_apply_: value_format must be one of ('fp32', 'bf16', 'sign'), got None",
        {"value_format": None},
    ),
}


def refusal_of(stages, error, changes):
    """The words with which `stages` refuse good arguments with these changes."""
    arguments = {
        "bucket": torch.ones(12),
        "gathered": encoded_by(ops, SMALL, 1),
        "segments": SMALL.segments,
        "groups": SMALL.groups,
        "k": SMALL.k,
    }
    with pytest.raises(error) as caught:
        stages.decode_apply_(**(arguments | changes))
    return str(caught.value)


@pytest.mark.parametrize(("error", "words", "changes"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_are_refused_in_words(error, words, changes):
    native = refusal_of(ops, error, changes)
    assert words in native
    if "aligned" not in words:  # the reference copies the bytes first
        of_reference = refusal_of(reference, error, changes)
        assert of_reference.split("dtype")[0] == native.split("dtype")[0]  # torch's C++ names


@each_value_format
def test_an_entry_in_a_dense_segment_between_those_of_a_group_is_added_like_any_other(value_format):
    gathered = encoded_by(ops, BUCKET, 2, value_format=value_format)
    indices = indices_of(gathered[1], BUCKET, value_format)
    at = max(e for e, index in enumerate(indices) if index < 300)
    indices[at] = 320  # of segment 1, which is dense; group 0 has segments 0 and 2
    write_indices(gathered[1], BUCKET, indices, value_format)
    buckets = [torch.empty(BUCKET.numel) for _ in range(2)]
    for stages, bucket in zip((ops, reference), buckets):
        stages.decode_apply_(bucket, gathered, *BUCKET.arguments, value_format=value_format)
    assert_same_bits(*buckets)


# ---- as a citizen of torch


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_finds_nothing(dtype, value_format, seed):
    options = {"value_format": value_format, "step": 3}
    for layout in (BUCKET, LAYOUTS["empty"]):
        bucket = torch.ones(layout.numel, dtype=dtype)
        torch.library.opcheck(
            torch.ops.compressed_ddp.decode_apply_.default,
            (bucket, encoded_by(ops, layout, 2, seed=seed, **options), *layout.arguments),
            options,
        )


def test_the_fake_kernel_refuses_what_the_real_one_refuses():
    decode_apply_ = torch.ops.compressed_ddp.decode_apply_.default  # not checked in Python first
    gathered = encoded_by(ops, BUCKET, 2)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(torch.ones(BUCKET.numel)), mode.from_tensor(gathered)
        with pytest.raises(ValueError, match="decode_apply_: value_format must be one of"):
            decode_apply_(*fakes, *BUCKET.arguments, value_format="fp64")
        with pytest.raises(ValueError, match="decode_apply_: layout: expected one k per group"):
            decode_apply_(*fakes, BUCKET.segments, BUCKET.groups, [2])


@each_value_format
def test_the_fake_kernel_returns_nothing(value_format):
    gathered = encoded_by(ops, BUCKET, 2, value_format=value_format)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(torch.ones(BUCKET.numel)), mode.from_tensor(gathered)
        assert ops.decode_apply_(*fakes, *BUCKET.arguments, value_format=value_format) is None
