"""The stages as operators: `torch.ops.compressed_ddp.*`, here with types and documentation. Schemas may change until 1.0.

A bucket is a flat tensor cut into `segments` (numels, in order, adding up to its numel). groups[i] is the selection that segment i
belongs to: 0, 1, 2, .. in bucket order, or -1 for a segment that travels dense. k[j] is the number of entries that selection j sends.
`value_format` is how selected values travel: "fp32", "bf16", or "sign" (a bit each, and one mean magnitude per selection).

CPU tensors run in C++ (csrc/ops.cpp); other devices in plain PyTorch (reference.py), with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native as _native  # registers the operators
from . import arguments, reference
from .arguments import number_of

_OTHER_DEVICES = ["cuda", "mps", "xpu"]
_NAMESPACE = torch.ops.compressed_ddp


def compensate_select_(
    gradient: Tensor,
    residual: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    error_feedback: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Error feedback fused into exact Top-K selection (EF-SGD, Karimireddy et al. 2019, arXiv 1901.09847).

    acc = gradient + residual in fp32. Of each group exactly k entries are selected by |acc|, NaN > Inf > finite, ties to the lower
    index. residual becomes acc where not selected and 0 where selected; where acc is non-finite, it keeps its old value.

    Args:
        gradient: flat [numel], float32, float16 or bfloat16, contiguous. Not changed.
        residual: flat [numel], float32, contiguous. Changed in place in the grouped segments, untouched in dense ones.
        error_feedback: False = acc is the gradient alone, residual is not read or changed.

    Returns:
        values float32 [sum(k)], indices int32 [sum(k)] (positions in the bucket, strictly ascending), statistics float64 [4]:
        |gradient|^2, |acc - sent|^2, |sent|^2 (finite entries) and the number of non-finite entries, over the grouped segments.

    Raises ValueError or TypeError. Deterministic: independent of threads and instruction set (statistics: of threads only).
    """
    result: tuple[Tensor, Tensor, Tensor] = _NAMESPACE.compensate_select_(
        gradient, residual, segments, groups, k, error_feedback=error_feedback
    )
    return result


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
    """One payload: header, indices, values as `value_format` says, and the dense segments of `gradient` as fp32 (docs/wire_format.md).

    Args:
        values, indices: from `compensate_select_`: float32 and int32 [sum(k)]. Not changed.
        gradient: the same flat [numel] tensor. Not changed.
        value_format: "fp32", "bf16" or "sign".
        residual: flat [numel], float32, contiguous, as `compensate_select_` left it. What rounding takes from the finite values is
            added to it, in place at `indices`: value - decoded value. None: that is lost.
        rank, step: from 0; the header has both modulo 65536, and the receiver checks them.
        non_finite: some compensated entry is Inf or NaN; `values` and dense entries are looked at here. Of such a payload the
            scales of "sign" are 0.

    Returns:
        uint8 [payload_bytes(segments, groups, k, value_format)].

    Raises ValueError or TypeError; the residual is unchanged then.
    """
    number_of(
        value_format, "encode: "
    )  # what is no str at all, the dispatcher refuses without a name
    payload: Tensor = _NAMESPACE.encode(
        values,
        indices,
        gradient,
        segments,
        groups,
        k,
        value_format=value_format,
        residual=residual,
        rank=rank,
        step=step,
        non_finite=non_finite,
    )
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
    """The average of all ranks' payloads, written to the bucket in place.

    Sums the decoded values in fp32 in rank order 0 .. world_size-1 from +0, times float32(1 / world_size), rounded once to the
    bucket's dtype: bitwise the same on every rank. If any payload has the non-finite flag, the whole bucket becomes NaN.

    Args:
        bucket: flat [numel], float32, float16 or bfloat16, contiguous; overwritten.
        gathered: uint8 [world_size, payload_bytes], row r from rank r. Untrusted: checked before anything is written.
        value_format, step: what every header must say.

    Raises ValueError naming the rank and the field when a payload is not what it should be; the bucket is unchanged then.
    """
    number_of(value_format, "decode_apply_: ")
    _NAMESPACE.decode_apply_(
        bucket, gathered, segments, groups, k, value_format=value_format, step=step
    )


def restore_(
    residual: Tensor,
    payload: Tensor,
    segments: Sequence[int],
    groups: Sequence[int],
    k: Sequence[int],
    *,
    value_format: str = "bf16",
) -> None:
    """Adds this rank's own payload back to the residual (finite values only), in place: after a failed exchange or a skipped step.

    With "fp32" and "bf16" the residual is then bit for bit (but for -0) what it was before the selection, plus the gradient; with
    "sign" up to two roundings at the size of the scale.

    Args:
        residual: flat float32 [numel], as `compensate_select_` and `encode` left it.
        payload: uint8 [payload_bytes(segments, groups, k, value_format)], what `encode` returned. Not changed.

    Raises ValueError or TypeError; the residual is unchanged then.
    """
    number_of(value_format, "restore_: ")
    _NAMESPACE.restore_(residual, payload, segments, groups, k, value_format=value_format)


payload_bytes = reference.payload_bytes


@torch.library.register_fake("compressed_ddp::compensate_select_")
def _(gradient, residual, segments, groups, k, *, error_feedback=True):  # type: ignore[no-untyped-def]
    arguments.check_layout(segments, groups, k, "compensate_select_: ")
    entries = sum(k)
    return (
        gradient.new_empty(entries, dtype=torch.float32),
        gradient.new_empty(entries, dtype=torch.int32),
        gradient.new_empty(4, dtype=torch.float64),
    )


@torch.library.register_fake("compressed_ddp::encode")
def _(values, indices, gradient, segments, groups, k, *, value_format="bf16", **options):  # type: ignore[no-untyped-def]
    number_of(value_format, "encode: ")
    arguments.check_layout(segments, groups, k, "encode: ")
    size = payload_bytes(segments, groups, k, value_format)
    return gradient.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("compressed_ddp::decode_apply_")
def _(bucket, gathered, segments, groups, k, *, value_format="bf16", step=0):  # type: ignore[no-untyped-def]
    number_of(value_format, "decode_apply_: ")
    arguments.check_layout(segments, groups, k, "decode_apply_: ")


@torch.library.register_fake("compressed_ddp::restore_")
def _(residual, payload, segments, groups, k, *, value_format="bf16"):  # type: ignore[no-untyped-def]
    number_of(value_format, "restore_: ")
    arguments.check_layout(segments, groups, k, "restore_: ")


for _name in ("compensate_select_", "encode", "decode_apply_", "restore_"):
    torch.library.impl(f"compressed_ddp::{_name}", _OTHER_DEVICES, getattr(reference, _name))
