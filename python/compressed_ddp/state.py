"""TopKEFState: the options, the residuals and the step of one compressed model."""

from __future__ import annotations

import dataclasses
import numbers
import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import _native
from .adam import warn_about_momentum_once
from .arguments import number_of
from .auto_exchange import AutoExchange, ExchangeCosts
from .groups import ExchangeGroups
from .names import trained_parameters, unwrapped

Exempt = str | Iterable[str] | Callable[[str, torch.Tensor], bool]

_STATE_DICT_VERSION = 1
_SCOPES = ("tensor", "bucket", "chunk")
_EXCHANGES = (
    "allgather",
    "split",
    "hierarchical",
    "dense",
    "dense_fp32",
    "dense_bf16",
    "dense_fp16",
    "auto",
)
_FIXED_OPTIONS = frozenset(
    (
        "density",
        "scope",
        "value_format",
        "exchange",
        "ranks_per_node",
        "error_feedback",
        "dense_steps",
        "min_compress_numel",
        "exempt",
    )
)


class TopKEFState:
    """State of the Top-K hook with error feedback, for one model on one rank.

    Constructing it runs no collective and needs no process group yet.

    Args:
        process_group: the group to average over; None = the default group at the first step (with `register`: the model's).
        density: share k/numel of the entries that each rank sends, in (0, 1]; or a callable of the step (0, 1, 2, ..) that
            returns it, the same on every rank (which is checked in every step). k = max(1, ceil(density * numel)).
        scope: "tensor" selects in each parameter by itself, "bucket" in all compressed parameters of a bucket together,
            "chunk" in each 4096 consecutive entries of a parameter (k of the shorter last chunk: max(1, ceil(density * numel))).
        value_format: how selected values travel: "bf16" (2 bytes each), "fp32" (4 bytes), or "sign": 1 bit per value and one mean
            magnitude per group (what one selection spans). The residual absorbs what is lost. Not "sign" with scope="bucket"
            in models with parameters that may have no gradient: their zeros can be sent as signs, step after step, out of their
            residual. In every scope "sign" sends zeros of a selection that has fewer than k other entries (padding rows, pruned
            weights) as the mean, which the residual takes back later.
        exchange: how payloads travel. "allgather": every rank's to every rank; volume grows with the world size. "split": to the
            owners of ranges of the bucket, who average and select once more, and their result to every rank; about two payloads in
            all at any world size, and updates of k entries rather than of up to world_size * k. "hierarchical": whole gradients
            inside a node, payloads of their mean between nodes (by "allgather" up to 16 nodes, "split" above); each rank keeps the
            residual of its share of every parameter. "dense": not compressed, a plain average in the gradient's dtype; or in the
            one of "dense_fp32", "dense_bf16", "dense_fp16". "auto": for each bucket the sparse exchange of None or the dense one, by what
            they would cost, which is measured in the first compressed step; an `AutoExchange(...)` makes some of these choices
            itself. None: "allgather" up to 16 ranks, "split" above.
        ranks_per_node: of "hierarchical": how many consecutive ranks make a node. None: those on one machine, found out in the first
            compressed step.
        error_feedback: keep what is not sent and add it to the next gradient. False loses it: for comparisons.
        dense_steps: the first synchronised steps are averaged densely (default 2: in its first step DDP has the whole model
            in one bucket and rebuilds the buckets afterwards). 0 is correct, too.
        min_compress_numel: parameters with fewer entries travel dense, as 1-D parameters always do.
        exempt: parameters that travel dense as well: regular expressions, searched in the parameter's name, or a predicate
            `(name, parameter) -> bool`. Needs names.
        named_parameters: `model.named_parameters()`, when neither `register` nor `bind` is going to bring the names.

    All options but `process_group` are fixed here. A step begins when a parameter or name comes a second time. Memory: one fp32
    residual per compressed entry.

    Raises:
        ValueError, TypeError: an option is outside its accepted range.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        density: float | Callable[[int], float] = 0.01,
        *,
        scope: str = "tensor",
        value_format: str = "bf16",
        exchange: str | AutoExchange | None = None,
        ranks_per_node: int | None = None,
        error_feedback: bool = True,
        dense_steps: int = 2,
        min_compress_numel: int = 1024,
        exempt: Exempt = (),
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        if scope not in _SCOPES:
            raise ValueError(f"TopKEFState: scope must be one of {_SCOPES}, got {scope!r}")
        number_of(value_format, "TopKEFState: ")
        automatic = exchange if isinstance(exchange, AutoExchange) else AutoExchange()
        name = "auto" if isinstance(exchange, AutoExchange) else exchange
        if name is not None and name not in _EXCHANGES:
            raise ValueError(
                f"TopKEFState: exchange must be None, an AutoExchange or one of {_EXCHANGES}, got {exchange!r}"
            )
        if ranks_per_node is not None:
            ranks_per_node = _checked_ranks_per_node(ranks_per_node, name)
        if not isinstance(error_feedback, bool):
            raise TypeError(
                f"TopKEFState: error_feedback must be True or False, got {error_feedback!r}"
            )
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"TopKEFState: process_group must be a torch.distributed.ProcessGroup or None, got "
                f"{type(process_group).__name__}; the density is the second argument: TopKEFState(density=0.01)"
            )
        self.process_group = process_group
        self._density = density if callable(density) else _checked_density(density)
        self._scope = scope
        self._value_format = value_format
        self._exchange = exchange
        self._ranks_per_node = ranks_per_node
        self._automatic = automatic
        self._groups = ExchangeGroups(
            self._density if isinstance(self._density, float) else 0.01, value_format
        )
        self._error_feedback = error_feedback
        self._dense_steps = _checked_integer("dense_steps", dense_steps)
        self._min_compress_numel = _checked_integer("min_compress_numel", min_compress_numel)
        self._exempt = _exempt_rule(exempt)
        self._loaded_rank: tuple[int, int] | None = (
            None  # rank and world_size of a loaded state, until they are checked
        )
        self._bound: dict[str, weakref.ref[torch.Tensor]] | None = None  # by name
        self._loaded_names: list[str] = []  # of loaded residuals, until a model is bound
        self._used_rank: tuple[int, int] | None = None  # rank and world_size in the engine's group
        self._engine = _native._C.Engine(
            density=self.density,
            scope=scope,
            value_format=value_format,
            exchange=name or "",
            auto_sparse=automatic.sparse or "",
            auto_dense=automatic.dense,
            ranks_per_node=ranks_per_node or 0,
            groups=self._groups,
            error_feedback=error_feedback,
            dense_steps=self.dense_steps,
            min_compress_numel=self.min_compress_numel,
            exempt_needs_names=self._exempt is not None,
        )
        if automatic.costs is not None:
            self._engine.use_costs(automatic.costs.as_tuple())
        if named_parameters is not None:
            named = trained_parameters("TopKEFState", named_parameters, takes_module=True)
            self._bind(named, stacklevel=3)
        warn_about_momentum_once(self)

    def __repr__(self) -> str:
        options = {"density": self.density} | {
            name: value for name, value in self._options().items() if name != "density"
        }
        options |= {"exchange": self.exchange, "ranks_per_node": self.ranks_per_node}
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"TopKEFState({shown}, step={self.step})"

    def __setattr__(self, name: str, value: object) -> None:
        if name in _FIXED_OPTIONS:
            raise AttributeError(
                f"TopKEFState: {name} cannot be changed after construction, where the engine has taken it; go on with a new state: "
                f"new = TopKEFState({name}=..) and, for its residuals, new.load_state_dict(state.state_dict()), on every rank"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "TopKEFState cannot be pickled or copied: it belongs to one process and one model; save state.state_dict()"
        )

    # ---- options: fixed, but for process_group until the first step

    @property
    def density(self) -> float | Callable[[int], float]:
        """As given to the constructor."""
        return self._density

    @property
    def scope(self) -> str:
        """As given to the constructor."""
        return self._scope

    @property
    def value_format(self) -> str:
        """As given to the constructor."""
        return self._value_format

    @property
    def exchange(self) -> str | AutoExchange | None:
        """As given to the constructor."""
        return self._exchange

    @property
    def ranks_per_node(self) -> int | None:
        """As given to the constructor."""
        return self._ranks_per_node

    @property
    def error_feedback(self) -> bool:
        """As given to the constructor."""
        return self._error_feedback

    @property
    def dense_steps(self) -> int:
        """As given to the constructor."""
        return self._dense_steps

    @property
    def min_compress_numel(self) -> int:
        """As given to the constructor."""
        return self._min_compress_numel

    # ---- names

    def bind(self, model: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> TopKEFState:
        """Takes the parameters' names (and with them, `exempt` and a loaded state take effect). Returns the state itself.

        Args:
            model: the module that is trained, wrapped or not, or its named parameters. torch.compile's `_orig_mod.` is stripped from
                the names, and DDP's `module.` when all begin with it. Parameters without gradients are left out; of the names
                of a tied one, the first counts.

        Raises:
            TypeError: neither a module nor pairs (name, parameter).
            ValueError: the state is bound to other parameters, or has compressed others already.
        """
        self._bind(trained_parameters("TopKEFState.bind", model, takes_module=True), stacklevel=3)
        return self

    def _bind(self, named: list[tuple[str, torch.Tensor]], stacklevel: int) -> None:
        """`named` comes from `trained_parameters`; `stacklevel` is that of a warning from here."""
        self._check_joined_and_left(named)
        parameters = [(name, tensor, self._is_exempt(name, tensor)) for name, tensor in named]
        is_first = not self._engine.is_bound()
        self._engine.bind(parameters)
        if is_first:
            self._bound = {name: weakref.ref(tensor) for name, tensor in named}
        if is_first and self._exempt is not None and not any(exempt for _, _, exempt in parameters):
            warnings.warn(
                "TopKEFState: exempt matches none of the model's parameters; their names are, for example, "
                + _some_names([name for name, _ in named]),
                stacklevel=stacklevel,
            )
        self._warn_about_unmatched_names(stacklevel + 1)

    def _check_joined_and_left(self, named: list[tuple[str, torch.Tensor]]) -> None:
        """The bound model with other trained parameters than before. (Of another model the engine says so.)"""
        if self._bound is None:
            return
        given = dict(named)
        common = given.keys() & self._bound.keys()
        if not common or any(self._bound[name]() is not given[name] for name in common):
            return
        joined = [name for name in given if name not in common]
        left = [name for name in self._bound if name not in common]
        changes = [
            f"{_some_names(names)} {verb} the trained parameters"
            for names, verb in ((joined, "joined"), (left, "left"))
            if names
        ]
        if changes:
            raise ValueError(
                f"TopKEFState: {' and '.join(changes)} after this state was bound to the model (requires_grad was changed, or "
                "other parameters were passed), but a state keeps the parameters that it was bound to; go on with a new one: "
                "new = TopKEFState(...) with the same options and new.load_state_dict(state.state_dict()), on every rank"
            )

    def _warn_about_unmatched_names(self, stacklevel: int) -> None:
        """Once for each loaded state, as soon as it and the model's names are there."""
        if self._bound is None or not self._loaded_names:
            return
        unmatched = [name for name in self._loaded_names if name not in self._bound]
        self._loaded_names = []
        if unmatched:
            warnings.warn(
                f"TopKEFState: the loaded state has residuals of {_some_names(unmatched)}, but the bound model has no trained "
                f"parameters of these names; its names are, for example, {_some_names(list(self._bound))}; load a state of the "
                "same model, or rename the keys of state_dict['residuals'] (names given to all_reduce_ may ignore this)",
                stacklevel=stacklevel,
            )

    def _compressed_parameters(self) -> list[torch.Tensor] | None:
        """Those that some step has selected from; None when that is not known because they have no names."""
        if self._bound is None:
            return None
        parameters = [reference() for reference in self._bound.values()]
        return [p for p in parameters if p is not None and self._engine.is_compressed(p)]

    def is_compressed(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether a parameter of this name and shape travels compressed: more than one dimension, at least `min_compress_numel`
        entries, and not exempt. `name` is as in `model.named_parameters()`, wrapped or not."""
        bound_names = (n for n, bound in (self._bound or {}).items() if bound() is parameter)
        name = next(bound_names, None) or unwrapped([name])[0]
        return self._travels_compressed(name, parameter)

    def _travels_compressed(self, name: str, parameter: torch.Tensor) -> bool:
        """By the rules alone; `name` is that of the unwrapped model."""
        if parameter.dim() <= 1 or parameter.numel() < max(1, self.min_compress_numel):
            return False
        return not self._is_exempt(name, parameter)

    def _is_exempt(self, name: str, parameter: torch.Tensor) -> bool:
        return self._exempt is not None and bool(self._exempt(name, parameter))

    # ---- process group

    def _use_process_group(self, process_group: dist.ProcessGroup) -> None:
        world_size = process_group.size()
        if self._loaded_rank is not None:
            _check_same_rank(self._loaded_rank, (process_group.rank(), world_size))
            self._loaded_rank = None
        dense = (self._exchange_name() or "").startswith("dense")
        if world_size == 1 and not dense and self._exchange_name() != "auto":
            warnings.warn(
                "compressed_ddp: the process group has one rank: nothing is sent, but the gradient is still reduced to its "
                "largest entries; leave the hook out when training on one process",
                stacklevel=4,
            )
        self._groups.clear()  # of the process group before
        self._groups.logs = process_group.rank() == 0
        self._engine.set_process_group(process_group)
        self._used_rank = (process_group.rank(), world_size)

    def _engine_with_process_group(self) -> _native._C.Engine:
        if not self._engine.has_process_group():
            process_group = self._chosen_process_group()
            if process_group is None:
                raise RuntimeError(
                    "compressed_ddp: no process group to average over; call torch.distributed.init_process_group first, "
                    "or pass TopKEFState(process_group=...)"
                )
            self._use_process_group(process_group)
        return self._engine

    # ---- what "auto" has chosen

    def exchange_costs(self) -> ExchangeCosts | None:
        """What exchange="auto" goes by: as measured by rank 0, given, or loaded. None: not yet, or another exchange."""
        costs = self._engine.costs()
        return None if costs is None else ExchangeCosts(*costs)

    def exchange_choices(self) -> list[dict[str, Any]]:
        """How buckets travel with exchange="auto", of those that have come so far: "bucket" (its first parameter), "numel", "exchange",
        and the predicted "sparse_s" and "dense_s"."""
        names = ("bucket", "numel", "exchange", "sparse_s", "dense_s")
        return [dict(zip(names, choice)) for choice in self._engine.choices()]

    # ---- step, metrics, rollback

    @property
    def step(self) -> int:
        """Synchronised steps so far."""
        return int(self._engine.completed_steps())

    def metrics(self) -> dict[str, float]:
        """Figures of the last completed step on this rank; read them after `backward()`. With CPU tensors it waits for nothing, and in
        the middle of a backward pass tells of the step before. With CUDA tensors it waits once, until the stages of this rank's
        buckets are done (with NCCL, for the other ranks' payloads, too), and in the middle of a backward pass tells of the buckets so far.

        `compressed_ddp/` + `bytes_sent` (put on the network by this rank; of it `bytes_sent_all_gather`, `bytes_sent_all_to_all` and
        `bytes_sent_all_reduce` in the collectives of gradients, `bytes_sent_agreement` in comparisons of the ranks),
        `bytes_sent_in_node` (not counted there: with exchange="hierarchical", to the ranks of the same node; of it
        `bytes_sent_in_node_all_to_all` gradients and `bytes_sent_in_node_all_gather` averages),
        `dense_bytes` (what a ring all-reduce in the gradient's dtype would have put there), `compression_ratio` (gradient bytes /
        payload bytes), `wire_ratio` (dense_bytes / bytes_sent; nan when nothing was sent), `gradient_norm`, `residual_norm`,
        `captured_energy` (share of the squared norm of gradient + residual that left the residual), `step` (number of steps
        completed). Norms are fp32 sums per block of 65,536 entries (CUDA: at most 4,096). With CUDA and exchange="split" they do not
        count what came back because no owner selected it.
        """
        return dict(self._engine.metrics())

    def rollback(self) -> None:
        """Call it when `optimizer.step()` was skipped on all ranks: what the last step sent goes back into the residual.

        Steps with a non-finite gradient are rolled back without it.
        """
        self._engine.rollback()

    def reset(self) -> None:
        """Back to step 0 with zero residuals (dense steps included); names stay.

        Call it on every rank: a rank that resets alone takes part in other collectives than the rest, and the backend aborts or hangs.
        """
        self._loaded_rank = None
        self._loaded_names = []
        self._engine.reset()
        if self._automatic.costs is not None:
            self._engine.use_costs(self._automatic.costs.as_tuple())

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Residuals by parameter name and the options that matter: plain tensors and numbers, which `torch.load(weights_only=True)` reads.

        Every rank has its own residuals: save it on every rank. Waits for exchanges in flight. With exchange="hierarchical" a residual
        is this rank's shard, flat, and "shard" tells of it: its index, of how many, and where it lies in every parameter. With
        exchange="auto", "auto" holds its options, and as soon as there are any the costs and the choices.

        Raises:
            ValueError: the parameters have no names yet.
        """
        rank, world_size = self._rank_and_world_size()
        state_dict = {
            "version": _STATE_DICT_VERSION,
            "rank": rank,
            "world_size": world_size,
            "step": self.step,
            **self._options(),
            "residuals": dict(self._engine.export_residuals()),
        }
        costs = self.exchange_costs()
        if costs is not None:
            state_dict["auto"] |= {
                "costs": dataclasses.asdict(costs),
                "choices": self.exchange_choices(),
            }
        shard = self._engine.shard()
        if shard is not None:
            index, count = shard
            places = {
                name: {"begin": begin, "end": end, "shape": sizes, "strides": strides}
                for name, begin, end, sizes, strides in self._engine.shard_places()
            }
            node = [rank - index + other for other in range(count)]
            state_dict["shard"] = {"index": index, "count": count, "ranks": node, "places": places}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes residuals and step from `state_dict()` of the same rank and world size. Call it on every rank.

        Residuals wait until their parameter's name is known (`bind`, `register`, or a name given to `all_reduce_`). Options are
        not taken: a difference to this state's own options is warned about, and so are residuals whose names the bound model does
        not have. A parameter without a saved residual starts at zero. With exchange="auto" the saved costs are gone by, unless others were
        given to the constructor: so the same buckets have the same choices (with a callable density, by the step in which they come first).
        What travels dense, by a choice of "auto" or with exchange="dense", takes along the residual that its parameters still have.

        Raises:
            TypeError: not a dict of the types that `state_dict()` returned.
            ValueError: another version, rank, world size or shape, or a step that this state is already past.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                "TopKEFState.load_state_dict: expected what TopKEFState.state_dict() returned, a dict, got "
                f"{type(state_dict).__name__}"
            )
        version = state_dict.get("version")
        if version != _STATE_DICT_VERSION:
            raise ValueError(
                f"TopKEFState.load_state_dict: expected version {_STATE_DICT_VERSION}, got {version!r}; "
                "load it with the compressed_ddp that saved it"
            )
        missing = {"rank", "world_size", "step", "residuals"} - state_dict.keys()
        if missing:
            raise ValueError(
                f"TopKEFState.load_state_dict: {sorted(missing)} missing; expected what TopKEFState.state_dict() returned"
            )
        _check_state_dict_types(state_dict)
        loaded = (int(state_dict["rank"]), int(state_dict["world_size"]))
        if self.process_group is not None or dist.is_initialized():
            _check_same_rank(loaded, self._rank_and_world_size())
            loaded_rank = None
        else:
            loaded_rank = loaded
        step = int(state_dict["step"])
        if step < 0:
            raise ValueError(f"TopKEFState.load_state_dict: step must be >= 0, got {step}")
        shard, places = _checked_shard(state_dict, self._exchange_name())
        saved, now = _comparable(state_dict), _comparable(self._options())
        differing = [
            f"{option} (saved {saved[option]!r}, now {value!r})"
            for option, value in now.items()
            if option in saved and saved[option] != value
        ]
        if differing:
            warnings.warn(
                "TopKEFState.load_state_dict: the state was saved with other options, which are not taken over: "
                + ", ".join(differing),
                stacklevel=2,
            )
        costs = self._costs_to_load(state_dict)
        self._engine.load(step, list(state_dict["residuals"].items()), shard, places)
        if costs is not None:
            self._engine.use_costs(costs.as_tuple())
        self._loaded_rank = loaded_rank
        self._loaded_names = list(state_dict["residuals"])
        self._warn_about_unmatched_names(stacklevel=3)

    def _options(self) -> dict[str, Any]:
        """The options that matter to a checkpoint."""
        options = {
            "density": self.density if isinstance(self.density, float) else -1.0,
            "scope": self.scope,
            "value_format": self.value_format,
            "exchange": self._exchange_name() or "default",
            "ranks_per_node": self.ranks_per_node or 0,
            "error_feedback": self.error_feedback,
            "dense_steps": self.dense_steps,
            "min_compress_numel": self.min_compress_numel,
        }
        if self._exchange_name() == "auto":
            options["auto"] = {
                "sparse": self._automatic.sparse or "default",
                "dense": self._automatic.dense,
            }
        return options

    def _costs_to_load(self, state_dict: dict[str, Any]) -> ExchangeCosts | None:
        if self._exchange_name() != "auto" or self._automatic.costs is not None:
            return None
        saved, here = _checked_costs(state_dict), self.exchange_costs()
        if saved is not None and here is not None and saved != here:
            raise ValueError(
                "TopKEFState.load_state_dict: this state has measured its costs (exchange='auto') and its buckets travel as they say, "
                "but the saved state goes by others; load it before the first compressed step, or call reset() on every rank first"
            )
        return None if here is not None else saved

    def _exchange_name(self) -> str | None:
        return "auto" if isinstance(self._exchange, AutoExchange) else self._exchange

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self._used_rank is not None and self._engine.has_process_group():
            return self._used_rank  # may be the group of the registered model
        process_group = self._chosen_process_group()
        if process_group is not None:
            return process_group.rank(), process_group.size()
        return self._loaded_rank or (0, 1)

    def _chosen_process_group(self) -> dist.ProcessGroup | None:
        return self.process_group or dist.group.WORLD


def _checked_density(density: Any) -> float:
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise TypeError(
            f"TopKEFState: density must be a number in (0, 1] or a callable of the step, got {density!r}"
        )
    number = float(density)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"TopKEFState: density must be in (0, 1], got {density!r}")
    return number


def _checked_integer(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"TopKEFState: {option} must be an integer >= 0, got {value!r}")
    if value < 0:
        raise ValueError(f"TopKEFState: {option} must be >= 0, got {value}")
    return int(value)


def _checked_ranks_per_node(ranks_per_node: Any, exchange: str | None) -> int:
    count = _checked_integer("ranks_per_node", ranks_per_node)
    if count == 0:
        raise ValueError("TopKEFState: ranks_per_node must be >= 1, or None to find it out, got 0")
    if exchange != "hierarchical":
        raise ValueError(
            f"TopKEFState: ranks_per_node belongs to exchange='hierarchical', but exchange is {exchange!r}; leave it out"
        )
    return count


def _comparable(options: dict[str, Any]) -> dict[str, Any]:
    """With the members of "auto" that are options beside the others."""
    auto = options.get("auto")
    members = auto if isinstance(auto, dict) else {}
    return (
        options
        | {f"AutoExchange.{name}": members[name] for name in ("sparse", "dense") if name in members}
        | {"auto": None}
    )


def _checked_costs(state_dict: dict[str, Any]) -> ExchangeCosts | None:
    saved = state_dict.get("auto")
    if saved is None or (isinstance(saved, dict) and saved.keys() <= {"sparse", "dense"}):
        return None  # nothing had been measured yet
    try:
        return ExchangeCosts(**saved["costs"])
    except (KeyError, TypeError, ValueError) as error:
        raise TypeError(
            f"TopKEFState.load_state_dict: auto is not as it was saved ({error}); load what TopKEFState.state_dict() returned"
        ) from None


Place = tuple[str, int, int, list[int], list[int]]


def _checked_shard(
    state_dict: dict[str, Any], exchange: str | None
) -> tuple[tuple[int, int] | None, list[Place]]:
    """What `state_dict()` says of shards: this one and of how many, and where it lies in each parameter."""
    who, remedy = "TopKEFState.load_state_dict", "load what TopKEFState.state_dict() returned"
    shard = state_dict.get("shard")
    if shard is None:
        return None, []
    if exchange != "hierarchical":
        raise ValueError(
            f"{who}: the state was saved with exchange='hierarchical' and holds shards of the residuals, but this state keeps them whole "
            f"(exchange={exchange!r}); use the same exchange, or start without residuals"
        )
    try:
        index, count = int(shard["index"]), int(shard["count"])
        places = [
            (
                str(name),
                int(p["begin"]),
                int(p["end"]),
                [int(n) for n in p["shape"]],
                [int(n) for n in p["strides"]],
            )
            for name, p in shard["places"].items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"{who}: shard is not as it was saved ({error!r}); {remedy}") from None
    if not 0 <= index < count:
        raise ValueError(f"{who}: shard {index} of {count} cannot be; {remedy}")
    without = state_dict["residuals"].keys() - {name for name, *_ in places}
    if without:
        raise ValueError(f"{who}: shard says nothing of {_some_names(sorted(without))}; {remedy}")
    return (index, count), places


def _check_state_dict_types(state_dict: dict[str, Any]) -> None:
    who, remedy = "TopKEFState.load_state_dict", "load what TopKEFState.state_dict() returned"
    for key in ("rank", "world_size", "step"):
        value = state_dict[key]
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{who}: {key} must be an integer, got {value!r}; {remedy}")
    residuals = state_dict["residuals"]
    if not isinstance(residuals, dict):
        raise TypeError(
            f"{who}: residuals must be a dict of name to tensor, got {type(residuals).__name__}; {remedy}"
        )
    for name, residual in residuals.items():
        if not isinstance(name, str) or not isinstance(residual, torch.Tensor):
            raise TypeError(
                f"{who}: residuals must be a dict of name to tensor, got {type(residual).__name__} under the key {name!r}; {remedy}"
            )


def _some_names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _exempt_rule(exempt: Any) -> Callable[[str, torch.Tensor], bool] | None:
    expected = (
        "TopKEFState: exempt must be regular expressions or a predicate (name, parameter) -> bool"
    )
    if isinstance(exempt, bytes):
        raise TypeError(f"{expected}, got bytes {exempt!r}; names are str: leave out the b")
    if callable(exempt):
        rule: Callable[[str, torch.Tensor], bool] = exempt
        return rule
    if not isinstance(exempt, (str, Iterable)):
        raise TypeError(f"{expected}, got {exempt!r}")
    patterns = [exempt] if isinstance(exempt, str) else list(exempt)
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
            compiled[-1].search("")  # bytes compile, and do not fit a name
        except (re.error, TypeError) as error:
            raise ValueError(f"{expected}, got {pattern!r}: {error}") from None
    if not compiled:
        return None
    return lambda name, parameter: any(pattern.search(name) for pattern in compiled)


def _check_same_rank(loaded: tuple[int, int], here: tuple[int, int]) -> None:
    if loaded == here:
        return
    raise ValueError(
        f"TopKEFState.load_state_dict: this state was saved by rank {loaded[0]} of {loaded[1]}, but this is rank {here[0]} of "
        f"{here[1]}; residuals belong to a rank: load each rank's own file with the same world size, or start without residuals "
        f"(a model that averages over a part of the ranks: register it before loading, or pass TopKEFState(process_group=...))"
    )
