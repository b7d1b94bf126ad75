"""Parameters by name. How a model is wrapped is no part of its parameters' names: checkpoints and `exempt` go by the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

_DDP = "module."
_COMPILED = "_orig_mod"  # torch.compile's, of the whole model or, in the middle of a name, of one of its modules


def unwrapped(names: Sequence[str]) -> list[str]:
    """The names without torch.compile's `_orig_mod.`, and without DDP's `module.` where all of them begin with it.

    All: a model may have a child `module` of its own, and beside it others.
    """
    own = [_without_compiled(name) for name in names]
    while own and all(name.startswith(_DDP) for name in own):
        own = [name.removeprefix(_DDP) for name in own]
    return own


def _without_compiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def trained_parameters(
    who: str, named: object, *, takes_module: bool = False
) -> list[tuple[str, torch.Tensor]]:
    """(name in the unwrapped model, parameter) of those with gradients; a tied one comes once, under its first name.

    Args:
        who: begins the error messages.
        named: `model.named_parameters()`, or the model itself with `takes_module`.
    """
    expected = f"{who}: expected {'a module or ' if takes_module else ''}pairs (name, parameter)"
    remedy = "pass model.named_parameters()"
    if isinstance(named, nn.Module) and takes_module:
        named = named.named_parameters()
    if isinstance(named, Mapping):
        raise TypeError(f"{expected}, got a {type(named).__name__}; pass its .items()")
    if isinstance(named, (nn.Module, torch.Tensor)) or not isinstance(named, Iterable):
        raise TypeError(f"{expected}, got {type(named).__name__}; {remedy}")
    names: list[str] = []
    parameters: list[torch.Tensor] = []
    for pair in named:
        if isinstance(pair, torch.Tensor):
            raise TypeError(
                f"{expected}, got a {type(pair).__name__} without a name; {remedy}, not model.parameters()"
            )
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{expected}, got {pair!r}; {remedy}")
        name, parameter = pair
        if not isinstance(name, str) or not isinstance(parameter, torch.Tensor):
            raise TypeError(
                f"{expected}, got a pair of {type(name).__name__} and {type(parameter).__name__}; {remedy}"
            )
        names.append(name)
        parameters.append(parameter)
    first_names: dict[int, tuple[str, torch.Tensor]] = {}
    for name, parameter in zip(unwrapped(names), parameters):
        if parameter.requires_grad:
            first_names.setdefault(id(parameter), (name, parameter))
    return list(first_names.values())
