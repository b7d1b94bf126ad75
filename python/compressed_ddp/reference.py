"""The whole path in plain PyTorch: the oracle of the tests, the shortest description of the contracts, and what runs where there is
no engine for a device. Same signatures and, bit for bit, the same results as `torch.ops.compressed_ddp.*`.

A bucket is cut into `segments` (numels). groups[i] is the selection that segment i belongs to, -1 = it travels dense; k[j] is the
number of entries that selection j sends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_HEADER = struct.Struct("<IHHIIQqqqqq")  # docs/wire_format.md
_MAGIC, _VERSION, _NON_FINITE = 0x50444443, 1, 1
_FNV_SEED, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def compensate_select_(
    gradient: Tensor,
    residual: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    error_feedback: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """residual += gradient; take the k largest of each group out of it. A non-finite sum is sent, and never stored."""
    acc = gradient.float() + residual if error_feedback else gradient.float()
    finite = torch.isfinite(acc)
    key = acc.view(torch.int32) & 0x7FFFFFFF
    key = torch.where(torch.isnan(acc), 0x7FFFFFFF, key)
    chosen, members = [], []
    for positions, group_k in zip(_group_positions(segments, groups, gradient.device), k):
        by_magnitude = torch.sort(
            key[positions], descending=True, stable=True
        ).indices  # stable: ties -> lower index
        chosen.append(positions[by_magnitude[:group_k]].sort().values)
        members.append(positions)
    nothing = torch.empty(0, dtype=torch.int64, device=gradient.device)
    index = torch.cat(chosen) if chosen else nothing
    member = torch.cat(members) if members else nothing
    values = torch.where(
        torch.isnan(acc[index]), torch.nan, acc[index]
    )  # every NaN is written as 0x7fc00000
    kept = torch.where(finite, acc, 0.0)
    kept[index] = 0.0
    if error_feedback:
        stored = torch.where(finite, acc, residual)
        stored[index[finite[index]]] = 0.0
        residual[member] = stored[member]
    sums = (gradient[member], kept[member], values[torch.isfinite(values)])
    squares = [part.double().square().sum() for part in sums]
    statistics = torch.stack([*squares, (~finite[member]).sum().double()])
    return values, index.int(), statistics


def encode(
    values: Tensor,
    indices: Tensor,
    gradient: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    rank: int,
    world_size: int,
    step: int = 0,
    non_finite: bool = False,
) -> Tensor:
    """Header, indices, values, dense segments, padding: one uint8 tensor of a size known from (segments, groups, k)."""
    dense = torch.cat(
        [gradient.new_zeros(0), *(gradient[at] for at in _dense_slices(segments, groups))]
    ).float()
    dense = torch.where(torch.isnan(dense), torch.nan, dense)  # every NaN is written as 0x7fc00000
    flags = _NON_FINITE if non_finite or not torch.isfinite(dense).all() else 0
    fields = (rank, world_size, *_layout_fields(segments, groups, k, step))
    header = torch.frombuffer(
        bytearray(_HEADER.pack(_MAGIC, _VERSION, flags, *fields)), dtype=torch.uint8
    )
    parts = [
        header.to(gradient.device),
        *(part.contiguous().view(torch.uint8) for part in (indices, values, dense)),
    ]
    padding = payload_bytes(segments, groups, k) - sum(part.numel() for part in parts)
    return torch.cat([*parts, header.new_zeros(padding, device=gradient.device)])


def decode_apply_(
    bucket: Tensor,
    gathered: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    step: int = 0,
) -> None:
    """bucket = (what rank 0 sent + what rank 1 sent + ..) * fp32(1 / world_size), in rank order; NaN if any rank was non-finite."""
    world_size = gathered.shape[0]
    headers = [_HEADER.unpack(bytes(payload[: _HEADER.size].tolist())) for payload in gathered]
    for rank, (magic, version, flags, *fields) in enumerate(headers):
        if (magic, version, flags & ~_NON_FINITE, *fields) != (
            _MAGIC,
            _VERSION,
            0,
            rank,
            world_size,
            *_layout_fields(segments, groups, k, step),
        ):
            raise ValueError(
                f"decode_apply_: the payload of rank {rank} is not what this rank expects; the bucket is unchanged"
            )
    if any(flags & _NON_FINITE for _, _, flags, *_ in headers):
        bucket.fill_(torch.nan)
        return
    sums = torch.zeros(bucket.numel(), device=bucket.device)
    for payload in gathered:
        indices, values, dense = _sections(payload, segments, groups, k)
        sums[indices.long()] += values  # indices are unique within one rank
        for at in _dense_slices(segments, groups):
            sums[at] += dense[: at.stop - at.start]
            dense = dense[at.stop - at.start :]
    bucket.copy_(sums * torch.tensor(1.0 / world_size))


def restore_(
    residual: Tensor,
    payload: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
) -> None:
    """Puts this rank's own payload back: after a failed exchange or a skipped step nothing is lost."""
    indices, values, _ = _sections(payload, segments, groups, k)
    finite = torch.isfinite(values)
    residual[indices[finite].long()] += values[finite]


def average(
    gradients: Sequence[Tensor],
    residuals: Sequence[Tensor],
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
) -> Tensor:
    """One step of all ranks in one process: residuals[r] is updated, the result is what every rank's bucket would hold."""
    payloads = []
    for rank, (gradient, residual) in enumerate(zip(gradients, residuals)):
        values, indices, statistics = compensate_select_(gradient, residual, segments, groups, k)
        layout = (segments, groups, k)
        non_finite = bool(statistics[3] > 0)
        payloads.append(
            encode(
                values,
                indices,
                gradient,
                *layout,
                rank=rank,
                world_size=len(gradients),
                non_finite=non_finite,
            )
        )
    bucket = torch.empty_like(gradients[0])
    decode_apply_(bucket, torch.stack(payloads), segments, groups, k)
    return bucket


def payload_bytes(segments: Sequence[int], groups: Sequence[int], k: Sequence[int]) -> int:
    """Size of a payload: 64 bytes of header, 8 per selected entry, 4 per dense entry, rounded up to a multiple of 64."""
    used = _HEADER.size + 8 * sum(k) + 4 * _dense_numel(segments, groups)
    return (used + 63) // 64 * 64


def _dense_numel(segments: Sequence[int], groups: Sequence[int]) -> int:
    return sum(numel for numel, group in zip(segments, groups) if group < 0)


def _slices(segments: Sequence[int]) -> Iterator[slice]:
    begin = 0
    for numel in segments:
        yield slice(begin, begin + numel)
        begin += numel


def _dense_slices(segments: Sequence[int], groups: Sequence[int]) -> list[slice]:
    return [at for at, group in zip(_slices(segments), groups) if group < 0]


def _group_positions(
    segments: Sequence[int], groups: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Positions in the bucket of each group's entries, ascending."""
    positions: list[list[Tensor]] = [[] for _ in range(max(groups, default=-1) + 1)]
    for at, group in zip(_slices(segments), groups):
        if group >= 0:
            positions[group].append(torch.arange(at.start, at.stop, device=device))
    return [torch.cat(parts) for parts in positions]


def _sections(
    payload: Tensor, segments: Sequence[int], groups: Sequence[int], k: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [4 * sum(k), 4 * sum(k), 4 * _dense_numel(segments, groups)]
    begin = _HEADER.size
    indices, values, dense = payload[begin : begin + sum(sizes)].split(sizes)
    return (
        indices.clone().view(torch.int32),
        values.clone().view(torch.float32),
        dense.clone().view(torch.float32),
    )


def _layout_fields(
    segments: Sequence[int], groups: Sequence[int], k: Sequence[int], step: int
) -> tuple[int, ...]:
    layout_hash = _FNV_SEED
    for number in (len(segments), *(part for pair in zip(segments, groups) for part in pair), *k):
        for byte in (number % 2**64).to_bytes(8, "little"):
            layout_hash = (layout_hash ^ byte) * _FNV_PRIME % 2**64
    numbers = (
        sum(segments),
        sum(k),
        _dense_numel(segments, groups),
        payload_bytes(segments, groups, k),
    )
    return (layout_hash, step, *numbers)
