"""A process that has used the hook ends with exit code 0, however the state and the group were kept."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import pathlib
import subprocess
import sys

import pytest
import ranks
import torch.distributed as dist
from ddp_models import Case, both_entries, build

KEPT: list[object] = []  # module globals live until the interpreter takes itself apart


def train_and_keep(rank: int, case: Case, keep: bool) -> None:
    model, state = build(case)
    for step in range(case.steps):
        model(case.gradients(rank, step)).backward()
    if keep:
        KEPT.extend((model, state))


def train_and_exit(rank: int, world_size: int, case: Case, keep: bool, destroy: bool) -> None:
    faulthandler.cancel_dump_traceback_later()
    gc.freeze()  # the end then visits this run's objects, not all of torch's, whose pages would be copied from the fork server
    train_and_keep(rank, case, keep)
    if destroy:
        dist.destroy_process_group()
    # A rank of the harness leaves through os._exit; this is how an ordinary script ends: finalise Python, then exit().
    ctypes.pythonapi.Py_Exit(0)


@pytest.mark.parametrize("destroy", [True, False], ids=["destroyed", "group_left_open"])
@pytest.mark.parametrize("keep", [False, True], ids=["local", "global"])
@both_entries
def test_processes_end_with_exit_code_0(entry: str, keep: bool, destroy: bool) -> None:
    """Together 32 processes for each entry: an abort in the last moments of a process is a race."""
    case = Case(entry, steps=4)
    for _ in range(4):
        assert (
            ranks.run(2, train_and_exit, case, keep, destroy, allow_death=True)
            == [ranks.Died(0)] * 2
        )


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from compressed_ddp import TopKEFState, register, topk_ef_hook
from torch.nn.parallel import DistributedDataParallel

rank, entry, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
model = DistributedDataParallel(torch.nn.Linear(64, 64))
state = TopKEFState(exchange="allgather", density=0.1, dense_steps=1)
if entry == "cpp":
    register(model, state)
else:
    model.register_comm_hook(state, topk_ef_hook)
for _ in range(5):
    model(torch.ones(2, 64)).sum().backward()
print(state.step)
"""


@both_entries
def test_a_script_that_cleans_nothing_up_ends_with_exit_code_0(
    entry: str, tmp_path: pathlib.Path
) -> None:
    arguments = [entry, str(tmp_path / "store")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        stdout, stderr = process.communicate(timeout=90)
        assert (process.returncode, stdout.strip()) == (0, "5"), stderr
