"""The bytes of a payload: golden files for C++ and Python, sections, and a size that depends on (layout, k, value_format) alone."""

from __future__ import annotations

import pathlib
import re
import struct

import pytest
import ranks
import torch
from stage_cases import (
    BUCKET,
    GOLDEN,
    GRADIENTS,
    LAYOUTS,
    VALUE_FORMATS,
    WIDE,
    assert_same_bits,
    bits_of,
    each_value_format,
    encoded_by,
    indices_of,
    inputs_of,
    sections_of,
    write_indices,
)

from compressed_ddp import TopKEFState, all_reduce_, ops, reference
from compressed_ddp._native import _C

DATA = pathlib.Path(__file__).parents[1] / "cpp" / "data"
STAGES = [pytest.param(ops, id="native"), pytest.param(reference, id="reference")]
GOLDEN_INDICES = [1, 255, 256, 302, 599]
SCALES = [0x3FC02AAB, 0x3EA00000]  # 4.50390625 / 3 and 0.625 / 2
GOLDEN_DECODED = {
    "fp32": [1.5, -2.0, 1.00390625, -0.375, 0.25],
    "bf16": [1.5, -2.0, 1.0, -0.375, 0.25],
    "sign": [1.5013021, -1.5013021, 1.5013021, -0.3125, 0.3125],
}


def golden_payload(value_format: str) -> torch.Tensor:
    text = (DATA / f"payload_v3_{value_format}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return torch.tensor(list(bytes.fromhex(" ".join(lines))), dtype=torch.uint8)


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, indices, gradient"""
    gradient = torch.full((600,), 99.0)
    gradient[300], gradient[301] = 3.0, -0.0
    values = torch.tensor(GOLDEN_DECODED["fp32"])
    return values, torch.tensor(GOLDEN_INDICES, dtype=torch.int32), gradient


@each_value_format
@pytest.mark.parametrize("stages", STAGES)
def test_encode_writes_the_golden_payload(stages, value_format):
    options = {"value_format": value_format, "rank": 1, "step": 5}
    payload = stages.encode(*golden_inputs(), *GOLDEN.arguments, **options)
    assert_same_bits(payload, golden_payload(value_format))


@each_value_format
@pytest.mark.parametrize("stages", STAGES)
def test_decode_apply_reads_the_golden_payload(stages, value_format):
    _, indices, _ = golden_inputs()
    options = {"value_format": value_format, "step": 5}
    other = stages.encode(
        torch.zeros(5),
        indices,
        torch.zeros(600),
        *GOLDEN.arguments,
        rank=0,
        **options,
    )
    bucket = torch.empty(600)
    gathered = torch.stack([other, golden_payload(value_format)])
    stages.decode_apply_(bucket, gathered, *GOLDEN.arguments, **options)
    expected = torch.zeros(600)
    expected[indices.long()] = torch.tensor(GOLDEN_DECODED[value_format]) / 2
    expected[300] = 1.5
    torch.testing.assert_close(bucket, expected, rtol=0, atol=0)


@each_value_format
@pytest.mark.parametrize("stages", STAGES)
def test_restore_reads_the_golden_payload(stages, value_format):
    residual = torch.zeros(600)
    stages.restore_(
        residual, golden_payload(value_format), *GOLDEN.arguments, value_format=value_format
    )
    expected = torch.zeros(600)
    expected[GOLDEN_INDICES] = torch.tensor(GOLDEN_DECODED[value_format])
    assert_same_bits(residual, expected)


@each_value_format
def test_the_header_says_what_the_document_says(value_format):
    options = {"rank": 1, "step": 5, "non_finite": True}
    payload = ops.encode(*golden_inputs(), *GOLDEN.arguments, value_format=value_format, **options)
    header = bytes(payload.tolist())[: _C.payload_header_bytes]
    assert len(header) == 8
    assert header[0] == _C.wire_version
    assert header[1] == 1, "flags: bit 0 = non-finite"
    assert struct.unpack_from("<H", header, 2) == (1,), "rank"
    assert struct.unpack_from("<H", header, 4) == (5,), "step"
    assert header[6:] == bytes(golden_payload(value_format)[6:8].tolist()), "layout"


@each_value_format
def test_the_sections_lie_where_the_document_says(value_format):
    payload = ops.encode(
        *golden_inputs(), *GOLDEN.arguments, value_format=value_format, rank=1, step=5
    )
    sections = sections_of(payload, GOLDEN, value_format)
    written = {name: bytes(section.tolist()) for name, section in sections.items()}
    assert struct.unpack("<I", written["directory"]) == (0,)
    assert bits_of(sections["high"]) == [0 + 0, 0 + 1, 1 + 2, 1 + 3, 2 + 4]
    assert written["scales"] == (struct.pack("<2I", *SCALES) if value_format == "sign" else b"")
    assert struct.unpack("<2f", written["dense"]) == (3.0, -0.0)
    assert (
        written["values"]
        == {
            "fp32": struct.pack("<5f", *GOLDEN_DECODED["fp32"]),
            "bf16": struct.pack("<5H", 0x3FC0, 0xC000, 0x3F80, 0xBEC0, 0x3E80),
            "sign": struct.pack("<I", 0b01010),
        }[value_format]
    )
    assert written["low"] == bytes([1, 255, 0, 302 - 256, 599 - 512])
    for section in sections.values():
        section.zero_()
    assert not payload.any(), "zeros between the sections and behind them"


@each_value_format
@pytest.mark.parametrize("layout", [pytest.param(v, id=k) for k, v in LAYOUTS.items()])
def test_indices_can_be_read_back_and_the_directory_names_every_256th(layout, value_format, seed):
    (payload,) = encoded_by(ops, layout, 1, value_format=value_format, seed=seed)
    gradient, residual = inputs_of("normal", layout, torch.float32, seed)
    _, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
    assert indices_of(payload, layout, value_format) == indices.tolist()
    directory = sections_of(payload, layout, value_format)["directory"].view(torch.int32)
    assert directory.tolist() == [index >> 8 for index in indices.tolist()[::256]]
    again = payload.clone()
    write_indices(again, layout, indices.tolist(), value_format)
    assert_same_bits(again, payload)


def test_a_version_never_changes_its_golden_files():
    assert _C.wire_version == 3, "a new version of the format needs golden files of its own"
    assert sorted(file.name for file in DATA.glob("payload_v3_*.txt")) == [
        f"payload_v3_{value_format}.txt" for value_format in sorted(VALUE_FORMATS)
    ]
    for value_format in VALUE_FORMATS:
        assert golden_payload(value_format)[:6].tolist() == [3, 0, 1, 0, 5, 0]


@each_value_format
@pytest.mark.parametrize("layout", [pytest.param(v, id=k) for k, v in LAYOUTS.items()])
def test_the_size_follows_from_layout_k_and_value_format_alone(layout, value_format, seed):
    expected = _C.payload_bytes(*layout.arguments, value_format)
    assert expected % 8 == 0
    sizes = set()
    for kind in GRADIENTS:
        gradient, residual = inputs_of(kind, layout, torch.float32, seed)
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
        payload = ops.encode(
            values,
            indices,
            gradient,
            *layout.arguments,
            value_format=value_format,
            rank=0,
        )
        sizes.add(payload.numel())
        sections_of(payload, layout, value_format)  # asserts the same size
    assert sizes == {expected}


NO_LAYOUTS = {
    "groups-missing": ([6, 2], [0], [2]),
    "negative-numel": ([6, -2], [0, -1], [2]),
    "too-many-entries": ([2**31 - 1, 1], [0, -1], [2]),
    "group-left-out": ([6, 2], [0, 2], [2, 1]),
    "group-comes-back": ([6, 2, 4], [0, 1, 0], [2, 1]),
    "negative-group": ([6, 2], [0, -2], [2]),
    "k-missing": ([6, 2], [0, 1], [2]),
    "k-too-many": ([6, 2], [0, -1], [2, 1]),
    "k-of-zero": ([6], [0], [0]),
    "k-beyond": ([6], [0], [7]),
    "empty-group": ([0], [0], [1]),
}


@pytest.mark.parametrize("layout", NO_LAYOUTS.values(), ids=NO_LAYOUTS.keys())
def test_no_size_is_told_of_what_the_stages_refuse(layout):
    with pytest.raises(ValueError, match=r"^layout: ") as native:
        _C.payload_bytes(*layout, "bf16")
    with pytest.raises(ValueError, match=r"^layout: ") as in_python:
        ops.payload_bytes(*layout)
    assert str(in_python.value) == str(native.value)
    gradient = torch.zeros(8)
    for stages in (ops, reference):
        with pytest.raises(ValueError, match=r"^compensate_select_: layout: ") as of_stage:
            stages.compensate_select_(gradient, gradient.clone(), *layout)
        assert str(of_stage.value) == f"compensate_select_: {native.value}"


def test_no_size_is_told_of_a_value_format_that_does_not_exist():
    words = re.escape("value_format must be one of ('fp32', 'bf16', 'sign'), got 'fp16'")
    for payload_bytes in (_C.payload_bytes, ops.payload_bytes):
        with pytest.raises(ValueError, match=f"^{words}$"):
            payload_bytes(*BUCKET.arguments, "fp16")


def test_an_entry_costs_9_bits_and_its_value():
    layout = [2**20], [0], [2**14]  # one of 64: numel / (256 * k) is a quarter of a bit
    for value_format, bits in (("fp32", 32), ("bf16", 16), ("sign", 1)):
        size = _C.payload_bytes(*layout, value_format)
        assert size * 8 / 2**14 == pytest.approx(bits + 9 + 0.25 + 32 / 256, abs=0.1)


def test_the_header_tells_layouts_and_value_formats_apart():
    layouts = [
        ([6, 6], [0, 1], [2, 1]),
        ([6, 6], [0, 1], [1, 2]),
        ([6, 6], [0, 0], [3]),
        ([12], [0], [3]),
        ([5, 7], [0, 1], [2, 1]),
        ([6, 0, 6], [0, -1, 1], [2, 1]),
    ]
    hashes = set()
    ones = torch.ones(12)
    for value_format in VALUE_FORMATS:
        for segments, groups, k in layouts:
            values, indices, _ = ops.compensate_select_(ones, torch.zeros(12), segments, groups, k)
            payload = ops.encode(
                values,
                indices,
                ones,
                segments,
                groups,
                k,
                value_format=value_format,
                rank=0,
            )
            hashes.add(bytes(payload[6:8].tolist()))
    assert len(hashes) == len(VALUE_FORMATS) * len(layouts)


@each_value_format
@pytest.mark.parametrize("layout", [BUCKET, WIDE], ids=["bucket", "wide"])
def test_payloads_of_the_same_inputs_are_the_same_bytes(layout, value_format, seed):
    options = {"value_format": value_format, "seed": seed}
    first = encoded_by(ops, layout, 2, **options)
    assert_same_bits(encoded_by(ops, layout, 2, **options), first)
    assert_same_bits(encoded_by(reference, layout, 2, **options), first)


# ---- bytes on the network

AGREEMENT_RECORD_BYTES = 224


def bytes_of_each_step(rank: int, world_size: int, value_format: str) -> list[float]:
    state = TopKEFState(
        exchange="allgather",
        density=0.01,
        dense_steps=0,
        min_compress_numel=100,
        value_format=value_format,
    )
    sent = []
    for _ in range(3):
        all_reduce_(torch.randn(5050), state, name="w", segments=[5000, 50])
        sent.append(state.metrics()["compressed_ddp/bytes_sent"])
    return sent


@each_value_format
@pytest.mark.parametrize("world_size", [1, 2, 3], ids="ranks={}".format)
def test_every_byte_that_a_rank_sends_is_counted(world_size, value_format):
    payload_bytes = _C.payload_bytes([5000, 50], [0, -1], [50], value_format)
    first, *later = ranks.run(world_size, bytes_of_each_step, value_format)[0]
    assert later == [(world_size - 1) * payload_bytes] * 2
    assert first == (world_size - 1) * (payload_bytes + AGREEMENT_RECORD_BYTES)
