"""Layouts and gradients that the tests of the stages share: the ordinary ones, and those that break a careless selection."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.float16, id="f16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
VALUE_FORMATS = ["fp32", "bf16", "sign"]
each_value_format = pytest.mark.parametrize("value_format", VALUE_FORMATS)
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Layout:
    """segments: numels; groups: the selection of each segment, -1 = dense; k: entries of each selection."""

    segments: list[int]
    groups: list[int]
    k: list[int]

    @property
    def numel(self) -> int:
        return sum(self.segments)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int]]:
        return self.segments, self.groups, self.k


SMALL = Layout([6, 2, 4], [0, -1, 1], [2, 1])
GOLDEN = Layout([300, 2, 298], [0, -1, 1], [3, 2])  # of ../cpp/data/payload_v3_*.txt
WIDE = Layout([1000, 40, 1000], [0, -1, 1], [300, 20])  # more than one entry in the directory
BUCKET = Layout([300, 50, 200, 77], [0, -1, 0, 1], [20, 9])

LAYOUTS = {
    "empty": Layout([], [], []),
    "numel=1": Layout([1], [0], [1]),
    "k=1": Layout([1000], [0], [1]),
    "k=numel": Layout([777], [0], [777]),
    "tensors-with-dense-between": Layout([600, 33, 1, 500], [0, -1, 1, 2], [7, 1, 50]),
    "bucket-with-dense-between": BUCKET,
    "empty-segments": Layout([0, 64, 0, 0, 40], [-1, 0, 0, -1, 1], [5, 3]),
    "all-dense": Layout([5, 0, 90], [-1, -1, -1], []),
    "three-blocks": Layout([150_001, 10], [0, -1], [1500]),  # a block has 65,536 entries
    "two-in-the-directory": WIDE,
    "many-tensors": Layout(
        [31 + i for i in range(40)], list(range(40)), [1 + i % 5 for i in range(40)]
    ),
}


def _with(numel: int, generator: torch.Generator, values: list[float]) -> Tensor:
    """Normal values, with each of `values` at a few places."""
    tensor = torch.randn(numel, generator=generator)
    for value in values:
        at = torch.randint(0, max(numel, 1), (min(numel, 4),), generator=generator)
        tensor[at] = value
    return tensor


def gradient_of(kind: str, numel: int, generator: torch.Generator) -> Tensor:
    """A float32 gradient [numel] of one of GRADIENTS."""
    match kind:
        case "normal":
            return torch.randn(numel, generator=generator)
        case "heavy-tail":
            return torch.randn(numel, generator=generator) ** 5
        case "zeros":
            return torch.zeros(numel)
        case "negative-zeros":
            return -torch.zeros(numel)
        case "signed-zeros":
            return torch.where(torch.rand(numel, generator=generator) < 0.5, 0.0, -0.0)
        case "all-equal":
            return torch.full((numel,), -0.125)
        case "ties":
            return torch.randint(-2, 3, (numel,), generator=generator).float()
        case "one-spike":
            spike = torch.zeros(numel)
            spike[numel // 2 : numel // 2 + 1] = 3.0
            return spike
        case "descending":  # every sample sees another scale
            return torch.arange(numel, 0, -1).float() * 0.25
        case "denormals":
            return torch.randint(-500, 501, (numel,), generator=generator).float() * 2.0**-149
        case "inf":
            return _with(numel, generator, [torch.inf, -torch.inf])
        case "nan":
            return _with(numel, generator, [torch.nan, torch.inf])
        case (
            "nan-payloads"
        ):  # signalling, negative and full NaNs: all one key, all written as 0x7fc00000
            tensor = _with(numel, generator, [])
            at = torch.randperm(numel, generator=generator)[: min(numel, 6)]
            patterns = torch.tensor(
                [0x7F800001, -1, 0x7FFFFFFF, -0x7FFFFF, -0x400000, 0x7FC00000], dtype=torch.int32
            )
            tensor.view(torch.int32)[at] = patterns[: at.numel()]
            return tensor
        case "overflow":  # gradient + residual overflows although both are finite
            return torch.where(torch.rand(numel, generator=generator) < 0.1, 3e38, 1.0)
    raise KeyError(kind)


GRADIENTS = [
    "normal", "heavy-tail", "zeros", "negative-zeros", "signed-zeros", "all-equal", "ties", "one-spike", "descending", "denormals",
    "inf", "nan", "nan-payloads", "overflow",
]  # fmt: skip


def inputs_of(kind: str, layout: Layout, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """(gradient [numel] of dtype, residual [numel] float32), the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    gradient = gradient_of(kind, layout.numel, generator).to(dtype)
    residual_kind = (
        kind
        if kind in ("zeros", "negative-zeros", "ties", "denormals", "overflow", "all-equal")
        else "normal"
    )
    return gradient, gradient_of(residual_kind, layout.numel, generator)


def encoded_by(
    stages: Any,
    layout: Layout,
    world_size: int,
    *,
    value_format: str = "bf16",
    kind: str = "normal",
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """gathered [world_size, payload_bytes]: what `stages` (ops or reference) selects and encodes on each rank."""
    payloads = []
    for rank in range(world_size):
        gradient, residual = inputs_of(kind, layout, torch.float32, seed + rank)
        values, indices, statistics = stages.compensate_select_(
            gradient, residual, *layout.arguments
        )
        payloads.append(
            stages.encode(
                values, indices, gradient, *layout.arguments, value_format=value_format, residual=residual,
                rank=rank, step=step, non_finite=bool(statistics[3] > 0),
            )
        )  # fmt: skip
    return torch.stack(payloads)


# ---- the bytes of a payload, from docs/wire_format.md once more


def sections_of(payload: Tensor, layout: Layout, value_format: str = "bf16") -> dict[str, Tensor]:
    """Views of a payload's sections, uint8, by name; what is left is padding."""
    entries = sum(layout.k)
    high_bits = entries + ((layout.numel - 1) >> 8) if entries > 0 else 0
    dense_numel = sum(n for n, group in zip(layout.segments, layout.groups) if group < 0)
    sizes = {
        "header": 8,
        "high": 8 * -(-high_bits // 64),
        "directory": 4 * -(-entries // 256),
        "scales": 4 * len(layout.k) if value_format == "sign" else 0,
        "dense": 4 * dense_numel,
        "values": {"fp32": 4 * entries, "bf16": 2 * entries, "sign": 4 * -(-entries // 32)}[
            value_format
        ],
        "low": entries,
    }
    sections, begin = {}, 0
    for name, size in sizes.items():
        sections[name] = payload[begin : begin + size]
        begin += size
    assert payload.numel() == -(-begin // 8) * 8
    return sections


def bits_of(section: Tensor) -> list[int]:
    """Numbers of the bits that are set in a uint8 section."""
    return [
        8 * at + bit
        for at, byte in enumerate(section.tolist())
        for bit in range(8)
        if byte >> bit & 1
    ]


def indices_of(payload: Tensor, layout: Layout, value_format: str = "bf16") -> list[int]:
    sections = sections_of(payload, layout, value_format)
    high = [bit - entry for entry, bit in enumerate(bits_of(sections["high"]))]
    return [256 * h + low for h, low in zip(high, sections["low"].tolist(), strict=True)]


def write_indices(
    payload: Tensor, layout: Layout, indices: Sequence[int], value_format: str = "bf16"
) -> None:
    """Puts `indices` in place of those of a payload, possible ones or not."""
    sections = sections_of(payload, layout, value_format)
    sections["high"].zero_()
    for entry, index in enumerate(indices):
        if entry % 256 == 0:
            sections["directory"].view(torch.int32)[entry // 256] = index >> 8
        at = (index >> 8) + entry
        sections["high"][at // 8] |= 1 << at % 8
        sections["low"][entry] = index & 255


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits: -0 is not +0, and one NaN is not another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = _SAME_SIZE_INTEGER[actual.element_size()]
    differing = (
        (actual.contiguous().view(integer) != expected.contiguous().view(integer))
        .reshape(-1)
        .nonzero()
        .reshape(-1)
    )
    if differing.numel() > 0:
        at = int(differing[0])
        raise AssertionError(
            f"{differing.numel()} of {actual.numel()} entries differ, the first at {at}: "
            f"{actual.reshape(-1)[at].item()!r} instead of {expected.reshape(-1)[at].item()!r}"
        )


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
