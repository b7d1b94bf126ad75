"""A process group that lets a test stand between the engine and its collectives: delay them, change their bytes, end the process."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import compressed_ddp.state as state_module

try:
    from torch._C._distributed_c10d import _create_work_from_future
except ImportError:  # only delays need it
    _create_work_from_future = None

# torch calls a Python process group under these names only since 2.15.
needs_python_groups = pytest.mark.skipif(
    not hasattr(dist.ProcessGroup, "all_to_all_single"),
    reason="this torch does not call a process group written in Python",
)

Change = Callable[[Tensor], Tensor]  # what is sent instead
Delay = Callable[[int], float]  # of the n-th collective, in seconds


@dataclasses.dataclass
class Between:
    """What happens to the payloads of this rank. None: nothing."""

    before_all_to_all: Change | None = None
    before_all_gather: Change | None = None
    delay_all_to_all: Delay | None = None


class ChangedGroup(dist.ProcessGroup):
    """Passes everything on to `inner`."""

    def __init__(self, inner: dist.ProcessGroup, between: Between) -> None:
        super().__init__(inner.rank(), inner.size())
        self._inner = inner
        self._between = between
        self._calls = 0
        cpu = torch.device("cpu")
        gloo = dist.ProcessGroup.BackendType.GLOO
        self._register_backend(cpu, gloo, inner._get_backend(cpu))

    def size(self) -> int:
        return self._inner.size()

    getSize = size  # noqa: N815  torch's name

    def rank(self) -> int:
        return self._inner.rank()

    def allreduce(self, *args: Any) -> dist.Work:
        return self._inner.allreduce(*args)

    def all_gather_single(self, output: Tensor, mine: Tensor, *options: Any) -> dist.Work:
        change = self._between.before_all_gather
        if change is not None:
            mine = change(mine)
        return self._inner.all_gather_single(output, mine, *options)

    def all_to_all_single(self, output: Tensor, mine: Tensor, *options: Any) -> dist.Work:
        change, delay = self._between.before_all_to_all, self._between.delay_all_to_all
        if change is not None:
            mine = change(mine)
        work = self._inner.all_to_all_single(output, mine, *options)
        if delay is None:
            return work
        seconds, self._calls = delay(self._calls), self._calls + 1
        return _delayed(work, output, seconds)


def _delayed(work: dist.Work, output: Tensor, seconds: float) -> dist.Work:
    """Is done `seconds` later than `work`."""
    future: torch.futures.Future[Any] = torch.futures.Future()

    def finish() -> None:
        try:
            work.wait()
            future.set_result([output])
        except RuntimeError as error:
            future.set_exception(error)

    threading.Timer(seconds, finish).start()
    return _create_work_from_future(future)


def changed_groups(
    first: Between, second: Between, inner: dist.ProcessGroup | None = None
) -> dist.ProcessGroup:
    """A group for one new TopKEFState, over `inner`; `second` is for the group that the state makes for second collectives.

    It replaces the class by which states make their second group, once.
    """
    group = ChangedGroup(inner or dist.group.WORLD, first)
    groups_class = state_module.ExchangeGroups
    kept = []  # an engine only borrows its groups
    weakref.finalize(group, kept.clear)

    class Changed(groups_class):
        def __init__(self, *options: Any) -> None:
            super().__init__(*options)
            state_module.ExchangeGroups = groups_class

        def make(
            self, asked: dist.ProcessGroup, ranks: list[int], device_type: str
        ) -> dist.ProcessGroup:
            kept.append(
                ChangedGroup(super().make(inner or dist.group.WORLD, ranks, device_type), second)
            )
            return kept[-1]

    state_module.ExchangeGroups = Changed
    return group
