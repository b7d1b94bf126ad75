"""The processes of one training run: who this one is, and what all of them do together."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Processes:
    """This process among the others. Alone (not under torchrun) there is no process group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    grouped: bool

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all of them."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up `tensor` over all processes, in place, and return it."""
        if self.grouped:
            distributed.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """Return the main process's value on every process."""
        if not self.grouped:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_or_none(self, action: Callable[[], None], only_first_on_machine: bool = False) -> None:
        """Run `action`, wait for everyone, and leave together when it failed anywhere.

        With `only_first_on_machine` one process per machine runs it and the others wait. A failure
        ends every process with exit code 1 and one message: nobody is left waiting for a process
        that is gone.
        """
        failure: str | None = None
        if self.local_rank == 0 or not only_first_on_machine:
            try:
                action()
            except Exception as error:  # whatever it was, the other processes must hear of it
                failure = " ".join(str(error).split()) or type(error).__name__  # one line
        failures: list[str | None] = [failure]
        if self.grouped:
            failures = [None] * self.world_size
            distributed.all_gather_object(failures, failure)
        told = [
            f"rank {rank}: {text}" if rank else text for rank, text in enumerate(failures) if text
        ]
        if told:
            self.say(f"train.py: {told[0]}")
            raise SystemExit(1)


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[Processes]:
    """Join the process group that torchrun prepared (alone: none) and leave it at the end."""
    grouped = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = _device(options, local_rank)
    if not grouped:
        yield Processes(0, 1, 0, device, grouped=False)
        return
    backend = options.backend or ("nccl" if device.type == "cuda" else "gloo")
    if backend == "nccl" and device.type != "cuda":
        raise SystemExit(
            "train.py: --backend nccl needs CUDA devices; use --backend gloo or --device cuda"
        )
    if backend == "nccl" and options.compress:
        # A build without the CUDA stages sends payloads through host memory: a group for both.
        distributed.init_process_group("cpu:gloo,cuda:nccl")
    else:
        distributed.init_process_group(backend, device_id=device if backend == "nccl" else None)
    try:
        yield Processes(
            distributed.get_rank(), distributed.get_world_size(), local_rank, device, grouped=True
        )
    finally:
        distributed.destroy_process_group()
        # Under DDP that leaves Gloo's threads running, and one that still holds the last collective's tensors ends the process
        # with SIGABRT when it asks for the GIL of an interpreter that is shutting down (pytorch issue 190489). So it gets the GIL now.
        time.sleep(0.1)


def _device(options: argparse.Namespace, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise SystemExit(
            "train.py: --device cuda, but torch finds no CUDA device; use --device cpu or auto"
        )
    if options.device == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SystemExit(
            f"train.py: process {local_rank} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; start fewer processes or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
