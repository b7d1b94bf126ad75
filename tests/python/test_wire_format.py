"""The bytes of a payload: one golden file for C++ and Python, offsets, and a size that depends on (layout, k) alone."""

from __future__ import annotations

import pathlib
import struct

import pytest
import ranks
import torch
from stage_cases import (
    BUCKET,
    GRADIENTS,
    LAYOUTS,
    SMALL,
    assert_same_bits,
    encoded_by,
    inputs_of,
)

from compressed_ddp import TopKEFState, all_reduce_, ops, reference
from compressed_ddp._native import _C

GOLDEN = pathlib.Path(__file__).parents[1] / "cpp" / "data" / "payload_v1.txt"
STAGES = [pytest.param(ops, id="native"), pytest.param(reference, id="reference")]


def golden_payload() -> torch.Tensor:
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    return torch.tensor(list(bytes.fromhex(" ".join(lines))), dtype=torch.uint8)


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, indices, gradient"""
    gradient = torch.full((12,), 99.0)
    gradient[6], gradient[7] = 3.0, -0.0
    return torch.tensor([1.5, -2.0, 0.25]), torch.tensor([1, 4, 10], dtype=torch.int32), gradient


@pytest.mark.parametrize("stages", STAGES)
def test_encode_writes_the_golden_payload(stages):
    payload = stages.encode(*golden_inputs(), *SMALL.arguments, rank=1, world_size=2, step=5)
    assert_same_bits(payload, golden_payload())


@pytest.mark.parametrize("stages", STAGES)
def test_decode_apply_reads_the_golden_payload(stages):
    values, indices, _ = golden_inputs()
    other = stages.encode(
        torch.zeros(3), indices, torch.zeros(12), *SMALL.arguments, rank=0, world_size=2, step=5
    )
    bucket = torch.empty(12)
    stages.decode_apply_(bucket, torch.stack([other, golden_payload()]), *SMALL.arguments, step=5)
    expected = torch.zeros(12)
    expected[indices.long()] = values / 2
    expected[6] = 1.5
    torch.testing.assert_close(bucket, expected, rtol=0, atol=0)


def test_the_header_says_what_the_document_says():
    payload = bytes(
        ops.encode(
            *golden_inputs(), *SMALL.arguments, rank=1, world_size=2, step=5, non_finite=True
        ).tolist()
    )
    assert _C.payload_header_bytes == 64
    assert payload[0:4] == b"CDDP"
    assert struct.unpack_from("<H", payload, 4) == (_C.wire_version,)
    assert struct.unpack_from("<H", payload, 6) == (1,), "flags: bit 0 = non-finite"
    assert struct.unpack_from("<II", payload, 8) == (1, 2), "rank, world_size"
    assert struct.unpack_from("<q", payload, 24) == (5,), "step"
    assert struct.unpack_from("<qqqq", payload, 32) == (12, 3, 2, 128), "counts and size"
    assert struct.unpack_from("<3i", payload, 64) == (1, 4, 10), "indices"
    assert struct.unpack_from("<3f", payload, 76) == (1.5, -2.0, 0.25), "values"
    assert struct.unpack_from("<2f", payload, 88) == (3.0, -0.0), "dense entries"
    assert payload[96:] == bytes(32), "padding"


def test_a_version_never_changes_its_golden_file():
    assert _C.wire_version == 1, "a new version of the format needs a golden file of its own"
    assert golden_payload()[4] == 1


@pytest.mark.parametrize("layout", [pytest.param(v, id=k) for k, v in LAYOUTS.items()])
def test_the_size_follows_from_layout_and_k_alone(layout, seed):
    dense_numel = sum(n for n, group in zip(layout.segments, layout.groups) if group < 0)
    expected = -(-(64 + 8 * sum(layout.k) + 4 * dense_numel) // 64) * 64
    assert _C.payload_bytes(*layout.arguments) == expected
    sizes = set()
    for kind in GRADIENTS:
        gradient, residual = inputs_of(kind, layout, torch.float32, seed)
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
        payload = ops.encode(values, indices, gradient, *layout.arguments, rank=0, world_size=1)
        sizes.add(payload.numel())
    assert sizes == {expected}


def test_layout_hash_tells_layouts_of_one_size_apart():
    layouts = [
        ([6, 6], [0, 1], [2, 1]),
        ([6, 6], [0, 1], [1, 2]),
        ([6, 6], [0, 0], [3]),
        ([12], [0], [3]),
        ([5, 7], [0, 1], [2, 1]),
        ([6, 0, 6], [0, -1, 1], [2, 1]),
    ]
    hashes = set()
    for segments, groups, k in layouts:
        values, indices = torch.ones(3), torch.tensor([0, 1, 6], dtype=torch.int32)
        payload = ops.encode(
            values, indices, torch.ones(12), segments, groups, k, rank=0, world_size=1
        )
        assert payload.numel() == 128
        hashes.add(bytes(payload[16:24].tolist()))
    assert len(hashes) == len(layouts)


def test_payloads_of_the_same_inputs_are_the_same_bytes(seed):
    assert_same_bits(encoded_by(ops, BUCKET, 2, seed=seed), encoded_by(ops, BUCKET, 2, seed=seed))
    assert_same_bits(
        encoded_by(ops, BUCKET, 2, seed=seed), encoded_by(reference, BUCKET, 2, seed=seed)
    )


# ---- bytes on the network

AGREEMENT_RECORD_BYTES = 208


def bytes_of_each_step(rank: int, world_size: int) -> list[float]:
    state = TopKEFState(density=0.01, dense_steps=0, min_compress_numel=100)
    sent = []
    for _ in range(3):
        all_reduce_(torch.randn(5050), state, name="w", segments=[5000, 50])
        sent.append(state.metrics()["compressed_ddp/bytes_sent"])
    return sent


@pytest.mark.parametrize("world_size", [1, 2, 3], ids="ranks={}".format)
def test_every_byte_that_a_rank_sends_is_counted(world_size):
    payload_bytes = _C.payload_bytes([5000, 50], [0, -1], [50])
    first, *later = ranks.run(world_size, bytes_of_each_step)[0]
    assert later == [(world_size - 1) * payload_bytes] * 2
    assert first == (world_size - 1) * (payload_bytes + AGREEMENT_RECORD_BYTES)
