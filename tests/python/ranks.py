"""Runs a function on several ranks: real processes, Gloo, a file store, no ports.

The processes are forked from a server that has torch and compressed_ddp imported already (multiprocessing's "forkserver"), so a
test with four ranks costs a tenth of a second, and no test inherits anything from another.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import stand_in
import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# Python 3.11's fork server does not take over sys.path, and would pass over a module that it cannot find.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        os.path.dirname(os.path.abspath(__file__)),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
).rstrip(os.pathsep)
# DistributedDataParallel imports torch._dynamo when it is constructed: two seconds that no rank should spend again.
_context.set_forkserver_preload(
    [
        "torch.nn.parallel",
        "torch.distributed",
        "torch._dynamo",
        "pytest",
        "stand_in",
        "compressed_ddp",
    ]
)

_SLOWER = 1 if stand_in.PATH is None else 4  # interpreted kernels
GROUP_TIMEOUT_S = 20 * _SLOWER  # of the process group: a collective that waits longer fails
RUN_TIMEOUT_S = 60 * _SLOWER  # of a whole run: longer counts as a hang


@dataclasses.dataclass
class Died:
    """In place of a result: the rank's process ended without one."""

    exit_code: int | None


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = RUN_TIMEOUT_S,
    group_timeout_s: float = GROUP_TIMEOUT_S,
    allow_death: bool = False,
) -> list[Any]:
    """Calls function(rank, world_size, *args) on every rank, inside a default Gloo group, and returns the results in rank order.

    `function` must be a module-level function. An exception on a rank is raised here with that rank's traceback. A rank that is
    still running after `timeout_s` has its stacks printed and fails the test. With allow_death a rank that ends without a
    result gives Died instead of failing the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes, pipes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_main,
                args=(theirs, function, rank, world_size, store, group_timeout_s, timeout_s, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        deadline = time.monotonic() + timeout_s
        results: list[Any] = []
        failures: list[str] = []
        for rank, (process, pipe) in enumerate(zip(processes, pipes)):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank} hung: no result after {timeout_s} s")
                    results.append(None)
                    continue
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                process.join(5)
                ok, value = allow_death, Died(process.exitcode)
                if not ok:
                    value = f"the process died with exit code {process.exitcode}"
            results.append(value if ok else None)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        for process in processes:
            process.join(max(0.1, min(5.0, deadline - time.monotonic())) if not failures else 0.5)
            if process.is_alive():
                process.kill()
                process.join()
        if failures:
            raise AssertionError("\n".join(failures))
        return results


class Pool:
    """Processes that stay and run one function after another, each in a default group of its own: `run` without the start of processes.

    After an exception or a hang on some rank all of them are ended, and the next run begins with new ones.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        # Kept until the processes have ended: a rank still closes its store when its result is here, and would wait for a removed file.
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = 0

    def run(
        self, function: Callable[..., Any], *args: Any, timeout_s: float = RUN_TIMEOUT_S
    ) -> list[Any]:
        """As `run` above."""
        if not self._processes:
            self._start()
        results, failures = [], []
        store = os.path.join(self._folder.name, f"store{self._jobs}")
        self._jobs += 1
        job = pickle.dumps((function, store, timeout_s, args))
        deadline = time.monotonic() + timeout_s
        for pipe in self._pipes:
            pipe.send_bytes(job)
        for rank, pipe in enumerate(self._pipes):
            ok, value = False, f"hung: no result after {timeout_s} s"
            try:
                # Once a rank has failed, the others may wait for it in a collective.
                if pipe.poll(max(0.0, deadline - time.monotonic()) if not failures else 2.0):
                    ok, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                value = "the process died"
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # ends the process's loop
        for process in self._processes:
            process.join(1.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        for rank in range(self.world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(theirs, rank, self.world_size), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


class Pools:
    """One pool per world size, begun when it is first needed."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._pools.setdefault(world_size, Pool(world_size)).run(function, *args, **kwargs)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _serve(pipe: Connection, rank: int, world_size: int) -> None:
    while True:
        try:
            function, store, timeout_s, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            os._exit(0)
        _run_one(pipe, function, rank, world_size, store, GROUP_TIMEOUT_S, timeout_s, args)


def _main(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    group_timeout_s: float,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    _run_one(pipe, function, rank, world_size, store, group_timeout_s, timeout_s, args)
    pipe.close()


def _run_one(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    group_timeout_s: float,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout_s - 2.0), file=sys.stderr)
    torch.set_num_threads(1)  # several ranks share few cores
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=group_timeout_s),
        )
        result = function(rank, world_size, *args)
    except BaseException:
        _send(pipe, False, traceback.format_exc())
    else:
        _send(pipe, True, result)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():
            dist.destroy_process_group()


def _send(pipe: Connection, ok: bool, value: Any) -> None:
    # pipe.send() would share a tensor's memory with a process that is about to end; plain pickle copies it.
    pipe.send_bytes(pickle.dumps((ok, value)))
