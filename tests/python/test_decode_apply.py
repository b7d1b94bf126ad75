"""decode_apply_ against reference.py, bit for bit; a payload from a peer is untrusted input."""

from __future__ import annotations

import re

import pytest
import torch
from stage_cases import (
    BUCKET,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    SMALL,
    Layout,
    assert_same_bits,
    encoded_by,
    with_threads,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_ddp import ops, reference

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8], ids="ranks={}".format)
def test_the_average_equals_the_reference(world_size, layout, dtype, seed):
    gathered = encoded_by(ops, layout, world_size, seed=seed, step=4)
    bucket = torch.full((layout.numel,), 7.0, dtype=dtype)
    expected = bucket.clone()
    ops.decode_apply_(bucket, gathered, *layout.arguments, step=4)
    reference.decode_apply_(expected, gathered, *layout.arguments, step=4)
    assert_same_bits(bucket, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_average_of_adversarial_gradients_equals_the_reference(kind, dtype, seed):
    gathered = encoded_by(ops, BUCKET, 3, kind=kind, seed=seed)
    bucket, expected = torch.ones(BUCKET.numel, dtype=dtype), torch.ones(BUCKET.numel, dtype=dtype)
    ops.decode_apply_(bucket, gathered, *BUCKET.arguments)
    reference.decode_apply_(expected, gathered, *BUCKET.arguments)
    assert_same_bits(bucket, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flag_turns_the_whole_bucket_into_nan(dtype, seed):
    gathered = encoded_by(ops, BUCKET, 3, seed=seed)
    gathered[1, 6] = 1
    bucket = torch.zeros(BUCKET.numel, dtype=dtype)
    ops.decode_apply_(bucket, gathered, *BUCKET.arguments)
    assert torch.isnan(bucket).all()


def test_ranks_are_added_in_order_and_scaled_once(seed):
    layout = Layout([1], [0], [1])
    parts = [1e8, 1.0, -1e8]  # another order of addition gives another sum
    one = torch.tensor([0], dtype=torch.int32)
    payloads = [
        ops.encode(
            torch.tensor([part]), one, torch.ones(1), *layout.arguments, rank=r, world_size=3
        )
        for r, part in enumerate(parts)
    ]
    bucket = torch.empty(1)
    ops.decode_apply_(bucket, torch.stack(payloads), *layout.arguments)
    in_order = torch.tensor(1e8) + 1.0 - torch.tensor(1e8)
    assert_same_bits(bucket, (in_order * torch.tensor(1 / 3)).reshape(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, seed):
    layout = Layout([150_001, 999, 70_000], [0, -1, 1], [1500, 700])
    gathered = encoded_by(ops, layout, 2, seed=seed)
    buckets = []
    for threads in (1, 2):
        buckets.append(torch.empty(layout.numel, dtype=dtype))
        with with_threads(threads):
            ops.decode_apply_(buckets[-1], gathered, *layout.arguments)
    assert_same_bits(*buckets)


# ---- hostile payloads


def refused(gathered, words, layout=SMALL, step=0):
    bucket = torch.full((layout.numel,), 7.0)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ops.decode_apply_(bucket, gathered, *layout.arguments, step=step)
    assert str(caught.value).startswith("decode_apply_: the payload of rank ")
    assert str(caught.value).endswith("the bucket is unchanged")
    assert_same_bits(bucket, torch.full((layout.numel,), 7.0))


HEADER_FIELDS = {  # offset, what the error calls it
    "magic": (0, "magic: expected "),
    "version": (4, "wire format version: expected 1, got "),
    "rank": (8, "rank: expected 1, got "),
    "world_size": (12, "world_size: expected 3, got "),
    "layout_hash": (16, "layout_hash differs: other segments, groups or k"),
    "step": (24, "step: expected 9, got "),
    "numel": (32, "numel: expected 12, got "),
    "selected_numel": (40, "selected entries: expected 3, got "),
    "dense_numel": (48, "dense entries: expected 2, got "),
    "payload_bytes": (56, "payload_bytes: expected 128, got "),
}
HEADER_BYTES = [
    (name, at)
    for (name, (offset, _)), end in zip(
        HEADER_FIELDS.items(), [4, 6, 12, 16, 24, 32, 40, 48, 56, 64]
    )
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


@pytest.mark.parametrize(("at", "bit"), [(6, 2), (6, 0x80), (7, 1), (7, 0x80)])
def test_an_unknown_flag_is_refused(at, bit):
    gathered = encoded_by(ops, SMALL, 3)
    gathered[2, at] ^= bit
    refused(gathered, "the payload of rank 2 is not what this rank expects (flags beyond the")


@pytest.mark.parametrize(
    ("indices", "group"),
    [
        pytest.param([1, 0, 8], "group 0", id="descending"),
        pytest.param([3, 3, 8], "group 0", id="duplicate"),
        pytest.param([-1, 3, 8], "group 0", id="negative"),
        pytest.param([-(2**31), 3, 8], "group 0", id="most-negative"),
        pytest.param([3, 6, 8], "group 0", id="in-the-dense-segment"),
        pytest.param([3, 9, 8], "group 0", id="in-another-group"),
        pytest.param([0, 5, 12], "group 1", id="one-beyond-the-end"),
        pytest.param([0, 5, 2**31 - 1], "group 1", id="far-beyond-the-end"),
        pytest.param([0, 5, -8], "group 1", id="negative-later"),
        pytest.param([0, 5, 7], "group 1", id="below-its-group"),
    ],
)
def test_impossible_indices_are_refused(indices, group):
    for rank in range(3):
        gathered = encoded_by(ops, SMALL, 3)
        gathered[rank, 64:76] = torch.tensor(indices, dtype=torch.int32).view(torch.uint8)
        refused(
            gathered,
            f"the payload of rank {rank} is not what this rank expects (the indices of {group}",
        )


def test_shuffled_indices_are_refused(seed):
    layout = Layout([5000], [0], [200])
    gathered = encoded_by(ops, layout, 2, seed=seed)
    indices = gathered[1, 64 : 64 + 800].view(torch.int32)
    indices.copy_(indices[torch.randperm(200)])
    refused(gathered, "rank 1 is not what this rank expects (the indices of group 0", layout)


def test_swapped_payloads_are_refused():
    gathered = encoded_by(ops, SMALL, 2)
    refused(
        gathered.flip(0), "the payload of rank 0 is not what this rank expects (rank: expected 0"
    )


def test_random_bytes_are_refused(seed):
    for _ in range(50):
        noise = torch.randint(0, 256, (3, 128), dtype=torch.uint8)
        refused(noise, "the payload of rank 0 is not what this rank expects (magic")


# ---- refusals of the caller's own mistakes

GATHERED = "expected gathered to be contiguous [world_size, 128], got"
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
        {"gathered": torch.zeros(1, 128, dtype=torch.int8)},
    ),
    "gathered-flat": (ValueError, f"{GATHERED} [128]", {"gathered": torch.zeros(128).byte()}),
    "no-ranks": (ValueError, f"{GATHERED} [0, 128]", {"gathered": torch.zeros(0, 128).byte()}),
    "size": (ValueError, f"{GATHERED} [2, 64]", {"gathered": torch.zeros(2, 64).byte()}),
    "gathered-stride": (
        ValueError,
        f"{GATHERED} [2, 128]",
        {"gathered": torch.zeros(2, 256).byte()[:, ::2]},
    ),
    "unaligned": (
        ValueError,
        "expected gathered to be aligned to 4 bytes; clone() it",
        {"gathered": torch.zeros(130).byte()[1:129].view(1, 128)},
    ),
}


@pytest.mark.parametrize(("error", "words", "changes"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_are_refused_in_words(error, words, changes):
    arguments = {
        "bucket": torch.ones(12),
        "gathered": encoded_by(ops, SMALL, 1),
        "segments": SMALL.segments,
        "groups": SMALL.groups,
        "k": SMALL.k,
    }
    with pytest.raises(error, match=re.escape(words)):
        ops.decode_apply_(**(arguments | changes))


# ---- as a citizen of torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_finds_nothing(dtype, seed):
    for layout in (BUCKET, LAYOUTS["empty"]):
        bucket = torch.ones(layout.numel, dtype=dtype)
        torch.library.opcheck(
            torch.ops.compressed_ddp.decode_apply_.default,
            (bucket, encoded_by(ops, layout, 2, seed=seed, step=3), *layout.arguments),
            {"step": 3},
        )


def test_the_fake_kernel_returns_nothing():
    gathered = encoded_by(ops, BUCKET, 2)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(torch.ones(BUCKET.numel)), mode.from_tensor(gathered)
        assert ops.decode_apply_(*fakes, *BUCKET.arguments) is None
