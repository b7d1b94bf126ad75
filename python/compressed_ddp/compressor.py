"""The parts alone, for people who debug them or put them into another loop: thin, over the stage operators, on any device."""

from __future__ import annotations

import numbers
import time
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._native import _C


class TopKCompressor:
    """Exact Top-K of a tensor, without error feedback (see ErrorFeedbackBuffer).

    Args:
        density: k/numel in (0, 1]; k = max(1, ceil(density * numel)).

    `stats`: dict of floats since construction: calls, dense_bytes, compressed_bytes (values and indices), time_ms (of the call
    on the host; a device may still be working).
    """

    def __init__(self, density: float) -> None:
        self.density = _checked_density(density)
        self.stats: dict[str, float] = {
            "calls": 0.0,
            "dense_bytes": 0.0,
            "compressed_bytes": 0.0,
            "time_ms": 0.0,
        }

    def compress(self, tensor: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
        """Returns (values float32 [k], indices int32 [k] into the row-major flat tensor, ascending; shape). `tensor`: float32,
        float16 or bfloat16, any shape and strides; not changed."""
        begin = time.perf_counter()
        flat = tensor.detach().contiguous().view(-1)
        numel = flat.numel()
        k = _C.selection_k(self.density, numel)
        segments, groups = [numel], [0 if numel else -1]
        no_residual = torch.empty_like(flat, dtype=torch.float32)
        values, indices, _ = ops.compensate_select_(
            flat, no_residual, segments, groups, [k] if numel else [], error_feedback=False
        )
        self.stats["calls"] += 1
        self.stats["dense_bytes"] += tensor.nbytes
        self.stats["compressed_bytes"] += values.nbytes + indices.nbytes
        self.stats["time_ms"] += (time.perf_counter() - begin) * 1e3
        return values, indices, tensor.shape

    def decompress(self, values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
        """Returns a new float32 tensor of `shape` with `values` at `indices` and zeros elsewhere."""
        dense = values.new_zeros(torch.Size(shape).numel())
        dense[indices.long()] = values
        return dense.view(shape)


def _checked_density(density: Any) -> float:
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise TypeError(
            f"TopKCompressor: density must be a number in (0, 1], 0.01 for 1 %, got {density!r}"
        )
    number = float(density)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"TopKCompressor: density must be in (0, 1], got {density!r}")
    return number


class ErrorFeedbackBuffer:
    """What was not sent, by name; added to the next gradient.

    compensated = buffer.compensate("w", gradient)
    values, indices, shape = compressor.compress(compensated)
    buffer.update("w", compensated, compressor.decompress(values, indices, shape))
    """

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}

    def compensate(self, name: str, gradient: Tensor) -> Tensor:
        """Returns gradient + residual as a new float32 tensor (the gradient alone for a new name)."""
        residual = self._residual_of(name, gradient, "compensate")
        if residual is None:
            return gradient.detach().to(torch.float32, copy=True)
        return gradient.detach().float() + residual

    def update(self, name: str, compensated: Tensor, sent: Tensor) -> None:
        """residual = compensated - sent, where `sent` is what this rank itself sent, decoded: never the average over the ranks.
        Where `compensated` is not finite, the old residual (or 0) stays."""
        if compensated.shape != sent.shape:
            raise ValueError(
                f"ErrorFeedbackBuffer.update: expected compensated and sent of one shape, got {tuple(compensated.shape)} and "
                f"{tuple(sent.shape)}"
            )
        old = self._residual_of(name, compensated, "update")
        if old is None:
            old = torch.zeros((), device=compensated.device)
        left = compensated.detach().float() - sent.detach().float()
        self._residuals[name] = torch.where(
            torch.isfinite(compensated) & torch.isfinite(left), left, old
        )

    def _residual_of(self, name: str, tensor: Tensor, method: str) -> Tensor | None:
        residual = self._residuals.get(name)
        if residual is not None and residual.shape != tensor.shape:
            raise ValueError(
                f"ErrorFeedbackBuffer.{method}: '{name}' stands for shape {tuple(residual.shape)}, got "
                f"{tuple(tensor.shape)}; use another name"
            )
        return residual

    def state_dict(self) -> dict[str, Any]:
        """{"version": 1, "residuals": {name: float32 tensor}}; copies."""
        return {
            "version": 1,
            "residuals": {name: residual.clone() for name, residual in self._residuals.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` returned; replaces everything."""
        if not isinstance(state_dict, dict):
            raise TypeError(
                "ErrorFeedbackBuffer.load_state_dict: expected what ErrorFeedbackBuffer.state_dict() returned, a dict, got "
                f"{type(state_dict).__name__}"
            )
        if state_dict.get("version") != 1:
            raise ValueError(
                f"ErrorFeedbackBuffer.load_state_dict: expected version 1, got {state_dict.get('version')!r}"
            )
        if not isinstance(state_dict.get("residuals"), dict):
            raise TypeError(
                "ErrorFeedbackBuffer.load_state_dict: expected residuals to be a dict of name to tensor, got "
                f"{type(state_dict.get('residuals')).__name__}; load what ErrorFeedbackBuffer.state_dict() returned"
            )
        self._residuals = {
            name: residual.clone() for name, residual in state_dict["residuals"].items()
        }
