"""The process groups that an exchange needs beside the model's own, and which ranks share a node."""

from __future__ import annotations

import contextlib
import socket
import weakref
from pathlib import Path

import torch
import torch.distributed as dist


class ExchangeGroups:
    """Makes process groups when the engine asks, and owns them: the engine only borrows.

    Its methods are called from the hook, by all ranks that are concerned in the same order.
    """

    def __init__(self) -> None:
        self._groups: list[dist.ProcessGroup] = []
        weakref.finalize(self, _destroy, self._groups).atexit = False

    def make(
        self, process_group: dist.ProcessGroup, ranks: list[int], device_type: str
    ) -> dist.ProcessGroup:
        """A new group of those `ranks` of `process_group`, with its backend for that type of device and its timeout."""
        backend = process_group._get_backend(torch.device(device_type))
        of_world = _world_ranks(process_group)
        group = dist.new_group(
            [of_world[rank] for rank in ranks],
            backend=backend.name(),
            timeout=backend.options._timeout,
            use_local_synchronization=True,
            group_desc="compressed_ddp",
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

    def clear(self) -> None:
        """Ends all groups, of which none may be in use."""
        _destroy(self._groups)


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
