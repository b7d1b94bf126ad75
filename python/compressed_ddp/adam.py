"""Adam after error feedback: why its first momentum has to go for compressed parameters.

Error feedback already averages a coordinate over the ~1/density steps between two sends. Momentum after it adds a lag during which
the residual keeps growing, and the update overshoots. docs/algorithm.md has the figures.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from .state import TopKEFState


def adam_param_groups(
    model: nn.Module,
    state: TopKEFState,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    compressed_betas: tuple[float, float] = (0.0, 0.99),
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """Two parameter groups for any Adam-like optimizer: `torch.optim.AdamW(adam_param_groups(model, state), lr=...)`.

    Args:
        model: wrapped or not; parameters without gradients are left out.
        state: its rules decide which parameters are compressed (`state.is_compressed`); it is not bound by this call.
        betas: for parameters that travel dense.
        compressed_betas: for compressed ones; no first momentum.
        weight_decay: for both.

    Returns:
        [compressed group, dense group], each a dict with "params", "betas", "weight_decay"; a group without parameters is left out.
        Warm the learning rate up over the first ten per cent of the steps or more.
    """
    compressed: list[torch.Tensor] = []
    dense: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (compressed if state.is_compressed(name, parameter) else dense).append(parameter)
    groups = [
        {"params": compressed, "betas": compressed_betas, "weight_decay": weight_decay},
        {"params": dense, "betas": betas, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


# States whose compressed parameters no optimizer has stepped yet, and the one global hook that waits for it.
_watched: list[weakref.ref[TopKEFState]] = []
_handle: RemovableHandle | None = None


def warn_about_momentum_once(state: TopKEFState) -> None:
    """Looks at the first optimizer that steps compressed parameters of `state`, and warns if it is Adam-like with beta1 > 0.

    Through torch's global optimizer-step hook, which goes when no state waits for its optimizer any more.
    """
    global _handle
    _watched.append(weakref.ref(state))
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_look)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    still_watched = []
    for state_ref in _watched:
        state = state_ref()
        if state is not None and not _look_at(optimizer, state):
            still_watched.append(state_ref)
    _watched[:] = still_watched
    if not _watched:
        # torch is iterating over the pre-hooks: the handle can only be removed behind them.
        optimizer.register_step_post_hook(_remove_hook)


def _remove_hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _handle
    if not _watched and _handle is not None:
        _handle.remove()
        _handle = None


def _look_at(optimizer: torch.optim.Optimizer, state: TopKEFState) -> bool:
    """Whether `optimizer` steps compressed parameters of `state`, so that it has been looked at."""
    if not state._engine.has_compressed():
        return False
    owns_compressed = False
    for group in optimizer.param_groups:
        if not any(state._engine.is_compressed(parameter) for parameter in group["params"]):
            continue
        owns_compressed = True
        beta1 = group["betas"][0] if isinstance(group.get("betas"), (tuple, list)) else 0.0
        if beta1 > 0.0:
            warnings.warn(
                f"compressed_ddp: {type(optimizer).__name__} steps compressed parameters with beta1 = {float(beta1):g}; "
                "momentum after error feedback overshoots and costs accuracy: build the optimizer from "
                "compressed_ddp.adam_param_groups(model, state), or give the compressed parameters betas=(0.0, 0.99)",
                stacklevel=4,
            )
            break
    return owns_compressed
