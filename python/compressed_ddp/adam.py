"""Adam after error feedback: why its first momentum has to go for compressed parameters.

Error feedback already averages a coordinate over the ~1/density steps between two sends. Momentum after it adds a lag during which
the residual keeps growing, and the update overshoots. docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .names import trained_parameters

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
    for name, parameter in trained_parameters("adam_param_groups", model, takes_module=True):
        (compressed if state._travels_compressed(name, parameter) else dense).append(parameter)
    groups = [
        {"params": compressed, "betas": compressed_betas, "weight_decay": weight_decay},
        {"params": dense, "betas": betas, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


# A script may have more than one optimizer: they are looked at until every compressed parameter has been seen in one. Without names
# (`register_comm_hook` and no `bind`) nobody knows which those are, and these many optimizer steps have to do.
_MAX_STEPS = 100


class _Watch:
    """Waits for the optimizers of one state's compressed parameters."""

    def __init__(self, state: TopKEFState) -> None:
        self.state = weakref.ref(state)
        self.seen: set[int] = set()  # ids of compressed parameters
        self.num_steps = 0  # of any optimizer, since something was compressed

    def is_over(self, optimizer: torch.optim.Optimizer) -> bool:
        """Looks at `optimizer`, which is about to step. True: warned, nothing is left to be seen, or nobody is left to be warned."""
        state = self.state()
        if state is None:
            return True
        if not state._engine.has_compressed():
            return False
        self.num_steps += 1
        for group in optimizer.param_groups:
            compressed = [p for p in group["params"] if state._engine.is_compressed(p)]
            self.seen.update(map(id, compressed))
            beta1 = group["betas"][0] if isinstance(group.get("betas"), (tuple, list)) else 0.0
            if compressed and beta1 > 0.0:
                warnings.warn(
                    f"compressed_ddp: {type(optimizer).__name__} steps compressed parameters with beta1 = {float(beta1):g}; "
                    "momentum after error feedback overshoots and costs accuracy: build the optimizer from "
                    "compressed_ddp.adam_param_groups(model, state), or give the compressed parameters betas=(0.0, 0.99)",
                    stacklevel=4,
                )
                return True
        to_see = state._compressed_parameters()
        all_seen = to_see is not None and self.seen.issuperset(map(id, to_see))
        return all_seen or self.num_steps >= _MAX_STEPS


_watches: list[_Watch] = []
_handle: RemovableHandle | None = None  # of the global hook, while there is something to watch
_removal: RemovableHandle | None = None  # of the hook that removes it


def warn_about_momentum_once(state: TopKEFState) -> None:
    """Looks at the optimizers that step compressed parameters of `state`, and warns once if one is Adam-like with beta1 > 0.

    Through torch's global optimizer-step hook, which goes when no state has optimizers to wait for any more.
    """
    global _handle
    _watches.append(_Watch(state))
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_look)


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _removal
    still_watching = []
    for watch in _watches:
        if not watch.is_over(optimizer):
            still_watching.append(watch)
    _watches[:] = still_watching
    if _removal is not None:  # that step raised before it got to its post-hooks
        _removal.remove()
        _removal = None
    if not _watches:
        # torch is iterating over the pre-hooks: this one can only be removed behind them.
        _removal = optimizer.register_step_post_hook(_remove_hooks)


def _remove_hooks(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _handle, _removal
    if not _watches and _handle is not None:
        _handle.remove()
        _handle = None
    if _removal is not None:
        # torch is iterating over these hooks, too. The last one may go: the iteration is past its end then.
        hooks = _removal.hooks_dict_ref()
        if hooks is not None and next(reversed(hooks), None) == _removal.id:
            _removal.remove()
        _removal = None
