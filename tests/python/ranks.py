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
        pipe.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _send(pipe: Connection, ok: bool, value: Any) -> None:
    # pipe.send() would share a tensor's memory with a process that is about to end; plain pickle copies it.
    pipe.send_bytes(pickle.dumps((ok, value)))
