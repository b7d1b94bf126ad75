"""Checkpoints from which a run goes on bitwise as if it had never stopped.

DIR/epoch_0003/training.pt   model, optimizer, scheduler, history, options: one file, by rank 0
DIR/epoch_0003/rank_0.pt     what differs by process: random generator, state of the hook

Everything in them is tensors, numbers, strings, lists and dicts, so that
torch.load(weights_only=True) reads them. training.pt is written last: a folder without it is a
checkpoint that was cut short, and is passed over. All machines of the run have to see DIR.

Bitwise holds for compressed runs of up to 16 processes (scope "tensor") and dense runs of up to
two. DDP's buckets begin anew with every process: there a dense ring of three or more adds in another
order, and from 17 processes on "split" selects from other ranges.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from options import OPTIONS_FIXED_BY_A_CHECKPOINT
from training import Run

KEPT_CHECKPOINTS = 2


def save(run: Run) -> None:
    """Write the checkpoint after the epoch that has just ended; remove all but the newest two."""
    directory: Path = run.options.checkpoint_dir
    folder = directory / f"epoch_{len(run.history):04d}"
    processes = run.processes

    def write_own() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {"torch_rng": torch.get_rng_state()}
        if processes.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(processes.device)
        if run.state is not None:
            own["compression"] = run.state.state_dict()
        _write(own, folder / f"rank_{processes.rank}.pt")

    def write_shared() -> None:
        shared = {
            "world_size": processes.world_size,
            "model": run.network.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "history": run.history,
            "options": {name: getattr(run.options, name) for name in OPTIONS_FIXED_BY_A_CHECKPOINT},
        }
        _write(shared, folder / "training.pt")
        for old in _complete(directory)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    processes.all_or_none(write_own)
    processes.all_or_none(write_shared if processes.is_main else lambda: None)


def resume(run: Run) -> None:
    """Load the newest complete checkpoint into the run.

    Without one the run starts at its beginning and says so. A checkpoint of another run ends all
    processes with one message.
    """
    directory: Path = run.options.checkpoint_dir
    complete = _complete(directory) if run.processes.is_main else []
    folder: Path | None = run.processes.from_main(complete[-1] if complete else None)
    if folder is None:
        run.processes.say(f"--resume: no checkpoint in {directory}, starting with epoch 1.")
        return
    run.processes.all_or_none(lambda: _load(run, folder))
    run.processes.say(f"--resume: going on after epoch {len(run.history)}, from {folder}.")


def _load(run: Run, folder: Path) -> None:
    processes = run.processes
    shared = torch.load(folder / "training.pt", map_location=processes.device, weights_only=True)
    for name, then in shared["options"].items():
        now = getattr(run.options, name)
        if now != then:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{folder} was written with {option} {then}, this run has {now}; "
                "resume with the same value"
            )
    if shared["world_size"] != processes.world_size:
        raise ValueError(
            f"{folder} was written by {shared['world_size']} processes, this run has "
            f"{processes.world_size}; start as many"
        )
    own_path = folder / f"rank_{processes.rank}.pt"
    own = torch.load(own_path, map_location="cpu", weights_only=True)

    run.network.load_state_dict(shared["model"])
    run.optimizer.load_state_dict(shared["optimizer"])
    run.scheduler.load_state_dict(shared["scheduler"])
    run.history = shared["history"]
    torch.set_rng_state(own["torch_rng"])
    if processes.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda_rng"], processes.device)
    if run.state is not None:
        if "compression" not in own:
            raise ValueError(
                f"{own_path} was written without torchrun, where nothing is compressed"
            )
        run.state.load_state_dict(own["compression"])


def _complete(directory: Path) -> list[Path]:
    """Checkpoint folders that were written to the end, oldest first."""
    return sorted(path.parent for path in directory.glob("epoch_*/training.pt"))


def _write(content: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)
