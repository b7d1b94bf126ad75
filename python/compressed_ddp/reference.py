"""The whole path in plain PyTorch: the oracle of the tests, the shortest description of the contracts, and what runs where there is
no engine for a device. Same signatures and, bit for bit, the same results as `torch.ops.compressed_ddp.*`.

A bucket is cut into `segments` (numels). groups[i] is the selection that segment i belongs to, -1 = it travels dense; k[j] is the
number of entries that selection j sends. `value_format` says how a selected value is sent: "fp32", rounded to "bf16", or as its
"sign" and one mean magnitude per group.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import arguments
from .arguments import number_of

_HEADER = struct.Struct("<BBHHH")  # docs/wire_format.md
_VERSION, _NON_FINITE = 3, 1
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
    who = "compensate_select_: "
    arguments.check_layout(segments, groups, k, who)
    for name, tensor in (("gradient", gradient), ("residual", residual)):
        arguments.check_flat(who, name, tensor, sum(segments))
    arguments.check_dtype(who, "residual", residual, torch.float32)
    arguments.check_gradient_dtype(gradient)
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
    value_format: str = "bf16",
    residual: Tensor | None = None,
    rank: int,
    step: int = 0,
    non_finite: bool = False,
) -> Tensor:
    """One uint8 tensor of a size known from (segments, groups, k, value_format); residual += what rounding takes from the values."""
    who = "encode: "
    number_of(value_format, who)
    arguments.check_layout(segments, groups, k, who)
    arguments.check_flat(who, "gradient", gradient, sum(segments))
    arguments.check_entries(who, values, indices, sum(k))
    arguments.check_rank(who, rank)
    arguments.check_indices(who, indices, segments, groups, k)
    if residual is not None:
        arguments.check_flat(who, "residual", residual, sum(segments))
        arguments.check_dtype(who, "residual", residual, torch.float32)
    arguments.check_gradient_dtype(gradient)
    slices = _section_slices(segments, groups, k, value_format)
    device = gradient.device
    dense = torch.cat(
        [gradient.new_zeros(0), *(gradient[at] for at in _dense_slices(segments, groups))]
    ).float()
    dense = torch.where(torch.isnan(dense), torch.nan, dense)  # every NaN is written as 0x7fc00000
    finite = torch.isfinite(dense).all() and torch.isfinite(values).all()
    flags = _NON_FINITE if non_finite or not finite else 0
    header = _HEADER.pack(
        _VERSION, flags, *_header_fields(segments, groups, k, value_format, rank, step)
    )

    index = indices.long()
    high = index >> 8
    high_bits = torch.zeros(8 * (slices[1].stop - slices[1].start), dtype=torch.bool, device=device)
    high_bits[high + torch.arange(len(high), device=device)] = True
    scales = _scales(values, k) if value_format == "sign" else values[:0]
    if flags != 0:  # the step will not count: nothing is sent, and all of it stays in the residual
        scales = torch.zeros_like(scales)
    sections = (
        torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device),
        _bytes_of(high_bits),
        high[::256].int(),
        scales,
        dense,
        _written(values, value_format),
        (index & 255).to(torch.uint8),
    )
    size = payload_bytes(segments, groups, k, value_format)
    payload = torch.zeros(size, dtype=torch.uint8, device=device)
    for at, section in zip(slices, sections):
        payload[at].view(section.dtype).copy_(section)

    if residual is not None:
        lost = values - _decoded(payload, segments, groups, k, value_format)[1]
        keep = torch.isfinite(values) & (lost != 0)
        residual[index[keep]] += lost[keep]
    return payload


def decode_apply_(
    bucket: Tensor,
    gathered: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    value_format: str = "bf16",
    step: int = 0,
) -> None:
    """bucket = (what rank 0 sent + what rank 1 sent + ..) * fp32(1 / world_size), in rank order; NaN if any rank was non-finite."""
    who = "decode_apply_: "
    number_of(value_format, who)
    arguments.check_layout(segments, groups, k, who)
    arguments.check_flat(who, "bucket", bucket, sum(segments))
    layout = (segments, groups, k, value_format)
    arguments.check_gathered(who, gathered, payload_bytes(*layout))
    arguments.check_gradient_dtype(bucket)
    world_size = gathered.shape[0]
    any_non_finite = False
    for rank, payload in enumerate(gathered):
        if not _is_expected(payload, *layout, rank, step):
            raise ValueError(
                f"{who}the payload of rank {rank} is not what this rank expects; the bucket is unchanged"
            )
        any_non_finite |= _header_of(payload)[1] != 0
    if any_non_finite:
        bucket.fill_(torch.nan)
        return
    sums = torch.zeros(bucket.numel(), device=bucket.device)
    for payload in gathered:
        index, values, dense = _decoded(payload, *layout)
        sums[index] += values  # indices are unique within one rank
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
    *,
    value_format: str = "bf16",
) -> None:
    """Puts this rank's own payload back: after a failed exchange or a skipped step nothing is lost."""
    who = "restore_: "
    number_of(value_format, who)
    arguments.check_layout(segments, groups, k, who)
    arguments.check_flat(who, "residual", residual, sum(segments))
    arguments.check_dtype(who, "residual", residual, torch.float32)
    layout = (segments, groups, k, value_format)
    arguments.check_payload(who, payload, payload_bytes(*layout))
    _, _, rank, step, _ = _header_of(payload)  # whichever it says
    if not _is_expected(payload, *layout, rank, step):
        raise ValueError(f"{who}the payload does not fit the layout; the residual is unchanged")
    index, values, _ = _decoded(payload, *layout)
    back = torch.isfinite(values) & (values != 0)
    back &= arguments.is_grouped(segments, groups, index.device)[
        index
    ]  # dense ones have no residual
    residual[index[back]] += values[back]


def average(
    gradients: Sequence[Tensor],
    residuals: Sequence[Tensor],
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    value_format: str = "bf16",
) -> Tensor:
    """One step of all ranks in one process: residuals[r] is updated, the result is what every rank's bucket would hold."""
    payloads = []
    layout = (segments, groups, k)
    for rank, (gradient, residual) in enumerate(zip(gradients, residuals)):
        values, indices, statistics = compensate_select_(gradient, residual, *layout)
        payloads.append(
            encode(
                values,
                indices,
                gradient,
                *layout,
                value_format=value_format,
                residual=residual,
                rank=rank,
                non_finite=bool(statistics[3] > 0),
            )
        )
    bucket = torch.empty_like(gradients[0])
    decode_apply_(bucket, torch.stack(payloads), *layout, value_format=value_format)
    return bucket


def payload_bytes(
    segments: Sequence[int], groups: Sequence[int], k: Sequence[int], value_format: str = "bf16"
) -> int:
    """Size of a payload (docs/wire_format.md): its sections, rounded up to a multiple of 8."""
    number_of(value_format)
    arguments.check_layout(segments, groups, k)
    used: int = _section_slices(segments, groups, k, value_format)[-1].stop
    return (used + 7) // 8 * 8


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


def _section_slices(
    segments: Sequence[int], groups: Sequence[int], k: Sequence[int], value_format: str
) -> list[slice]:
    """Where header, high bits, directory, scales, dense entries, values and low bytes lie in a payload."""
    entries = sum(k)
    num_high_bits = entries + (sum(segments) - 1) // 256 if entries else 0
    value_bytes = (4 * entries, 2 * entries, (entries + 31) // 32 * 4)[number_of(value_format)]
    sizes = (
        _HEADER.size,
        (num_high_bits + 63) // 64 * 8,
        (entries + 255) // 256 * 4,
        4 * len(k) if value_format == "sign" else 0,
        4 * _dense_numel(segments, groups),
        value_bytes,
        entries,
    )
    slices, begin = [], 0
    for size in sizes:
        slices.append(slice(begin, begin + size))
        begin += size
    return slices


def _written(values: Tensor, value_format: str) -> Tensor:
    """The values section, as a tensor of any dtype."""
    nan = torch.isnan(values)
    if value_format == "fp32":
        return torch.where(nan, torch.nan, values)
    if value_format == "bf16":
        bits = values.bfloat16().view(torch.int16)  # to nearest even
        overflow = torch.isfinite(values) & ((bits & 0x7FFF) == 0x7F80)
        return torch.where(nan, 0x7FC0, bits - overflow.short())  # one below Inf: largest finite
    negative = torch.zeros((len(values) + 31) // 32 * 32, dtype=torch.bool, device=values.device)
    negative[: len(values)] = torch.signbit(values) & ~nan
    return _bytes_of(negative)


def _scales(values: Tensor, k: Sequence[int]) -> Tensor:
    """The mean magnitude of each group's values, fp32, in one order of additions: exact sums per exponent, then a tree over them."""
    bits = values.view(torch.int32).long() & 0x7FFFFFFF
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    significand = torch.where(exponent > 0, mantissa + 2**23, mantissa)
    counts = torch.tensor(k, dtype=torch.int64, device=values.device)
    group = torch.repeat_interleave(torch.arange(len(k), device=values.device), counts)
    sums = significand.new_zeros(256 * len(k)).index_add_(0, 256 * group + exponent, significand)
    sums = sums.view(-1, 256)
    sums[:, 255] = 0  # Inf and NaN have no magnitude
    unit = torch.tensor([2.0 ** (max(e, 1) - 150) for e in range(255)] + [0.0], dtype=torch.float64)
    parts = (sums.double() * unit.to(values.device)).view(-1, 32, 8)
    partial = parts.new_zeros(len(k), 32)
    for part in parts.unbind(2):
        partial = partial + part
    lane = torch.arange(32, device=values.device)
    for distance in (1, 2, 4, 8, 16):
        partial = partial + partial[:, lane ^ distance]
    return (partial[:, 0] * (1.0 / counts.double())).float()


def _decoded(
    payload: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    value_format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (int64), values and dense entries (fp32)."""
    slices = _section_slices(segments, groups, k, value_format)
    _, high_bits, _, scales, dense, values, low = (payload[at].clone() for at in slices)
    at = _bits_of(high_bits).nonzero().view(-1)
    index = (at - torch.arange(len(at), device=at.device)) * 256 + low
    if value_format == "fp32":
        decoded = values.view(torch.float32)
    elif value_format == "bf16":
        decoded = values.view(torch.bfloat16).float()
    else:
        counts = torch.tensor(k, dtype=torch.int64, device=payload.device)
        magnitude = torch.repeat_interleave(scales.view(torch.float32), counts)
        decoded = torch.where(_bits_of(values)[: len(magnitude)], -magnitude, magnitude)
    return index, decoded, dense.view(torch.float32)


def _header_of(payload: Tensor) -> tuple[int, ...]:
    """version, flags, rank, step, layout"""
    return _HEADER.unpack(bytes(payload[: _HEADER.size].tolist()))


def _is_expected(
    payload: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    value_format: str,
    rank: int,
    step: int,
) -> bool:
    """A payload of this layout by that rank in that step."""
    layout = (segments, groups, k, value_format)
    version, flags, *fields = _header_of(payload)
    got = (version, flags & ~_NON_FINITE, *fields)
    expected = (_VERSION, 0, *_header_fields(*layout, rank, step))
    return got == expected and _has_good_indices(payload, *layout)


def _has_good_indices(
    payload: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    value_format: str,
) -> bool:
    """A high bit for every entry, indices that ascend inside their groups, and the directory that belongs to them."""
    slices = _section_slices(segments, groups, k, value_format)
    if int(_bits_of(payload[slices[1]]).sum()) != sum(k):
        return False
    index, *_ = _decoded(payload, segments, groups, k, value_format)
    positions = _group_positions(segments, groups, payload.device)
    for inside, its_positions in zip(index.split(list(k)), positions):
        if inside[0] < its_positions[0] or inside[-1] > its_positions[-1]:
            return False
    directory = payload[slices[2]].clone().view(torch.int32)
    return bool(
        (index[1:] > index[:-1]).all() and torch.equal(directory, (index[::256] >> 8).int())
    )


def _bytes_of(bits: Tensor) -> Tensor:
    """bool [8 n] -> uint8 [n], the lowest bit first."""
    place = torch.arange(8, device=bits.device)
    return (bits.view(-1, 8).long() << place).sum(1).to(torch.uint8)


def _bits_of(section: Tensor) -> Tensor:
    """uint8 [n] -> bool [8 n], the lowest bit first."""
    place = torch.arange(8, device=section.device)
    return ((section.long()[:, None] >> place) & 1).bool().view(-1)


def _header_fields(
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    value_format: str,
    rank: int,
    step: int,
) -> tuple[int, int, int]:
    """rank, step and layout, 16 bits of each."""
    layout_hash = _FNV_SEED
    pairs = (part for pair in zip(segments, groups) for part in pair)
    for number in (len(segments), *pairs, *k, number_of(value_format)):
        for byte in (number % 2**64).to_bytes(8, "little"):
            layout_hash = (layout_hash ^ byte) * _FNV_PRIME % 2**64
    layout = layout_hash ^ layout_hash >> 16 ^ layout_hash >> 32 ^ layout_hash >> 48
    return rank % 2**16, step % 2**16, layout % 2**16
