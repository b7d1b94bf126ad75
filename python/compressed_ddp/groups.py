"""What the engine asks for in the hook: process groups beside the model's own, which ranks share a node, what exchanges cost."""

from __future__ import annotations

import contextlib
import inspect
import logging
import secrets
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import auto_exchange

_logger = logging.getLogger("compressed_ddp")
_naming = threading.Lock()
_names: dict[int, str] = {}  # by thread, of the groups that are being made
_torchs_own: list[Any] = []  # what names groups else, while ours stands in its place


class ExchangeGroups:
    """Makes process groups when the engine asks, and owns them: the engine only borrows.

    Its methods are called from the hook, by all ranks that are concerned in the same order. density, value_format: for what is
    measured with exchange="auto".
    """

    def __init__(self, density: float = 0.01, value_format: str = "bf16") -> None:
        self._density, self._value_format = density, value_format
        self.logs = True  # rank 0 does
        self._groups: list[dist.ProcessGroup] = []
        self._token = ""
        weakref.finalize(self, _destroy, self._groups).atexit = False

    def make(
        self, process_group: dist.ProcessGroup, ranks: list[int], device_type: str
    ) -> dist.ProcessGroup:
        """A new group of those `ranks` of `process_group`, with its backend for that type of device and its timeout.

        All ranks of `process_group` call it equally often, each with the ranks of a group that it is in.
        """
        backend = process_group._get_backend(torch.device(device_type))
        of_world = _world_ranks(process_group)
        if not self._token:
            tokens = [secrets.token_hex(8)]
            dist.broadcast_object_list(tokens, group=process_group, group_src=0)
            self._token = tokens[0]
        members = [of_world[rank] for rank in ranks]
        keeps_order = "sort_ranks" in inspect.signature(dist.new_group).parameters
        if not keeps_order and members != sorted(members):
            raise RuntimeError(
                f"the ranks of the process group are {of_world} of the world, and this torch makes groups in ascending order only; "
                "pass such a group, or exchange='allgather'"
            )
        in_this_order: dict[str, Any] = {"sort_ranks": False} if keeps_order else {}
        name = f"compressed_ddp_{self._token}_{len(self._groups)}_{members[0]}"
        with _group_name(name):
            group = dist.new_group(
                members,
                backend=backend.name(),
                timeout=backend.options._timeout,
                use_local_synchronization=True,
                group_desc="compressed_ddp",
                **in_this_order,
            )
        assert isinstance(group, dist.ProcessGroup)
        self._groups.append(group)
        return group

    def find_ranks_per_node(self, process_group: dist.ProcessGroup) -> int:
        """A collective of all ranks: how many of them share a machine, which they tell by its boot, else by its host name.

        Raises:
            RuntimeError: the ranks of a machine are not consecutive, or not as many on each; the same on every rank.
        """
        nodes: list[str] = [""] * process_group.size()
        dist.all_gather_object(nodes, _machine(), group=process_group)
        return ranks_per_node_of(nodes)

    def measure_costs(
        self, process_group: dist.ProcessGroup, device: torch.device
    ) -> tuple[float, float, float, float, float]:
        """A collective of all ranks: the members of ExchangeCosts, as rank 0 has measured them."""
        costs = auto_exchange.measure_costs(
            process_group, device, self._density, self._value_format
        )
        self._log("exchange='auto' has measured %s on %d ranks", costs, process_group.size())
        return costs.as_tuple()

    def note_choice(self, choice: tuple[str, int, str, float, float]) -> None:
        """name of the first parameter, numel, exchange, predicted seconds sparse and dense"""
        self._log(
            "exchange='auto': the bucket that begins with %r (%d entries) travels by %s (predicted: %.3g ms sparse, %.3g ms dense)",
            *choice[:3],
            1e3 * choice[3],
            1e3 * choice[4],
        )

    def _log(self, message: str, *values: object) -> None:
        if self.logs:
            with contextlib.suppress(
                Exception
            ):  # the other ranks wait: no handler may stop this one
                _logger.info(message, *values)

    def clear(self) -> None:
        """Ends all groups, of which none may be in use."""
        _destroy(self._groups)
        self._token = ""


@contextlib.contextmanager
def _group_name(name: str) -> Iterator[None]:
    """Gives the next new group this name instead of torch's own.

    Torch derives names from counters that each rank keeps for itself. They are equal only while all ranks make equally many groups,
    which ranks of another model do not: its groups, or the next ones that all ranks make, would wait for each other under different
    names. A name that the members have agreed on leaves the counters alone.
    """
    if not hasattr(distributed_c10d, "_process_group_name"):
        yield  # of a torch to come: its own name
        return
    thread = threading.get_ident()
    with _naming:  # not while the group is made: ranks may make two in threads, in either order
        if not _names:
            _torchs_own[:] = [distributed_c10d._process_group_name]
            distributed_c10d._process_group_name = _process_group_name
        _names[thread] = name
    try:
        yield
    finally:
        with _naming:
            del _names[thread]
            if not _names:
                distributed_c10d._process_group_name = _torchs_own[0]


def _process_group_name(*arguments: Any, **options: Any) -> Any:
    """For groups that other threads make meanwhile, torch's own."""
    name = _names.get(threading.get_ident())
    return _torchs_own[0](*arguments, **options) if name is None else name


def ranks_per_node_of(nodes: list[str]) -> int:
    """How many ranks each node has, from the node of every rank.

    Raises:
        RuntimeError: the ranks of a node are not consecutive, or not as many on each.
    """
    count = next((rank for rank, node in enumerate(nodes) if node != nodes[0]), len(nodes))
    firsts = nodes[::count]
    regular = len(nodes) % count == 0 and len(set(firsts)) == len(firsts)
    if not regular or any(node != firsts[rank // count] for rank, node in enumerate(nodes)):
        numbers = {node: number for number, node in reversed(list(enumerate(dict.fromkeys(nodes))))}
        raise RuntimeError(
            "exchange='hierarchical' needs nodes of equally many consecutive ranks, but the nodes of ranks 0, 1, .. are "
            f"{[numbers[node] for node in nodes]}; start the ranks node by node (as torchrun does), or pass ranks_per_node=.., or "
            "exchange='split'"
        )
    return count


def _machine() -> str:
    try:  # differs between machines of one host name, and is the same in all containers of a machine
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _world_ranks(process_group: dist.ProcessGroup) -> list[int]:
    try:
        return dist.get_process_group_ranks(process_group)
    except KeyError:
        raise RuntimeError(
            "torch.distributed does not know the process group any more (destroy_process_group was called?); create a new "
            "TopKEFState, and a new process group"
        ) from None


def _destroy(groups: list[dist.ProcessGroup]) -> None:
    """Their threads and connections end here; none may be in use."""
    while groups:
        group = groups.pop()
        with contextlib.suppress(Exception):  # destroy_process_group() has been there before
            dist.destroy_process_group(group)
