"""What the stages accept, in Python: the checks of csrc/ops.cpp for reference.py and for the fake kernels.

Each raises ValueError or TypeError with the words of the native check, `who` in front. (Dtypes go by torch's names here.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VALUE_FORMATS = {"fp32": 0, "bf16": 1, "sign": 2}  # and their numbers in a header

_GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_NUMEL = 2**31 - 1


def number_of(value_format: Any, who: str = "") -> int:
    """The number of a value format in a header."""
    if not isinstance(value_format, str) or value_format not in VALUE_FORMATS:
        raise ValueError(
            f"{who}value_format must be one of {tuple(VALUE_FORMATS)}, got {value_format!r}"
        )
    return VALUE_FORMATS[value_format]


def check_layout(
    segments: Sequence[int], groups: Sequence[int], k: Sequence[int], who: str = ""
) -> None:
    """Layout::make of csrc/layout.cpp."""

    def refuse(what: str) -> None:
        raise ValueError(f"{who}layout: {what}")

    if len(segments) != len(groups):
        refuse(
            f"expected one group per segment but got {len(segments)} segments and {len(groups)} groups"
        )
    group_numels: list[int] = []
    total = 0
    for s, (numel, group) in enumerate(zip(segments, groups)):
        if numel < 0:
            refuse(f"segment {s} has a negative numel {numel}")
        if numel > _MAX_NUMEL - total:
            refuse(
                f"a bucket holds at most {_MAX_NUMEL} entries, segment {s} goes beyond; use dense_steps >= 1 (the first DDP "
                "bucket holds the whole model) or a smaller bucket_cap_mb"
            )
        total += numel
        if group == -1:
            continue
        if group not in (len(group_numels), len(group_numels) - 1):
            refuse(
                f"groups must be numbered 0, 1, 2, .. in bucket order (-1 = dense), segment {s} has group {group}"
            )
        if group == len(group_numels):
            group_numels.append(0)
        group_numels[-1] += numel
    if len(group_numels) != len(k):
        refuse(f"expected one k per group but got {len(group_numels)} groups and {len(k)} k")
    for g, (group_k, numel) in enumerate(zip(k, group_numels)):
        if group_k < 1 or group_k > numel:
            refuse(f"k of group {g} must be in [1, {numel}], got {group_k}")


def check_flat(who: str, argument: str, tensor: Tensor, numel: int) -> None:
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != numel:
        raise ValueError(
            f"{who}expected {argument} to be flat and contiguous with {numel} entries (the sum of segments), got shape "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}"
        )


def check_dtype(who: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(
            f"{who}expected {argument} to have dtype {_name_of(dtype)}, got {_name_of(tensor.dtype)}"
        )


def check_gradient_dtype(gradient: Tensor) -> None:
    if gradient.dtype not in _GRADIENT_DTYPES:
        raise ValueError(
            f"compressed_ddp: expected gradients of dtype float32, float16 or bfloat16, got {_name_of(gradient.dtype)}; leave such "
            "a model to DDP's own all-reduce"
        )


def check_entries(who: str, values: Tensor, indices: Tensor, numel: int) -> None:
    check_dtype(who, "values", values, torch.float32)
    check_dtype(who, "indices", indices, torch.int32)
    for tensor in (values, indices):
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != numel:
            raise ValueError(
                f"{who}expected flat contiguous values and indices with {numel} entries (the sum of k), got shapes "
                f"{list(values.shape)} and {list(indices.shape)}"
            )


def check_rank(who: str, rank: int) -> None:
    if rank < 0:
        raise ValueError(f"{who}expected rank >= 0, got {rank}")


def check_indices(
    who: str, indices: Tensor, segments: Sequence[int], groups: Sequence[int], k: Sequence[int]
) -> None:
    """That they ascend strictly, each inside a segment of its own group."""
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(
            f"{who}expected indices to ascend strictly, as compensate_select_ returns them"
        )
    bounds = _spans(segments, groups)
    for g, (inside, (first, last)) in enumerate(zip(indices.split(list(k)), bounds)):
        if int(inside[0]) < first or int(inside[-1]) > last:
            raise ValueError(
                f"{who}the indices of group {g} are not in [{first}, {last}]; expected what compensate_select_ returned"
            )
    in_dense = indices[~is_grouped(segments, groups, indices.device)[indices.long()]]
    if in_dense.numel() > 0:
        raise ValueError(
            f"{who}index {int(in_dense[0])} lies in a dense segment; expected what compensate_select_ returned"
        )


def check_payload(who: str, payload: Tensor, size: int) -> None:
    check_dtype(who, "payload", payload, torch.uint8)
    if payload.dim() != 1 or not payload.is_contiguous() or payload.numel() != size:
        raise ValueError(
            f"{who}expected payload to be flat and contiguous with {size} bytes, got {list(payload.shape)}"
        )


def check_gathered(who: str, gathered: Tensor, size: int) -> None:
    check_dtype(who, "gathered", gathered, torch.uint8)
    fits = gathered.dim() == 2 and gathered.shape[0] >= 1 and gathered.shape[1] == size
    if not fits or not gathered.is_contiguous():
        raise ValueError(
            f"{who}expected gathered to be contiguous [world_size, {size}], got {list(gathered.shape)}"
        )


def is_grouped(segments: Sequence[int], groups: Sequence[int], device: torch.device) -> Tensor:
    """bool [numel]: which entries of the bucket belong to a group."""
    of_segment = torch.tensor([group >= 0 for group in groups], dtype=torch.bool, device=device)
    numels = torch.tensor(list(segments), dtype=torch.int64, device=device)
    return torch.repeat_interleave(of_segment, numels)


def _spans(segments: Sequence[int], groups: Sequence[int]) -> list[tuple[int, int]]:
    """First and last entry of each group's first and last segment; dense segments may lie between."""
    spans: list[tuple[int, int]] = []
    begin = 0
    for numel, group in zip(segments, groups):
        if group == len(spans):
            spans.append((begin, begin + numel - 1))
        elif group >= 0:
            spans[group] = (spans[group][0], begin + numel - 1)
        begin += numel
    return spans


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
