"""Run train.py under torchrun from another script and read its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).resolve().with_name("train.py")


def command(arguments: Sequence[str], world_size: int) -> list[str]:
    """Return the command line that runs train.py on `world_size` processes of this machine.

    --standalone lets torchrun take a free port.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world_size}",
        str(TRAIN),
        *arguments,
    ]


def run_training(arguments: Sequence[str], world_size: int, timeout_s: float) -> dict[str, Any]:
    """Run train.py with one thread per process and return what it wrote to --results.

    Raises RuntimeError when it fails, with the end of its output, and when it runs longer than
    `timeout_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        process = subprocess.Popen(
            command([*arguments, f"--results={results}"], world_size),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # torchrun and its workers can then be ended together
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{TRAIN.name} {' '.join(arguments)} ran longer than {timeout_s:g} s"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            tail = "\n".join(output.splitlines()[-40:])
            raise RuntimeError(
                f"{TRAIN.name} {' '.join(arguments)} ended with exit code {process.returncode}:\n"
                f"{tail}"
            )
        return json.loads(results.read_text(encoding="utf-8"))
