"""What the convergence studies share: one run of examples/train.py, and where it was made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("compressed-ddp", "torch", "torchvision", "numpy")
CURVE_POINTS = 60
PATH_OPTIONS = ("--data-dir", "--output")

sys.path.insert(0, str(REPOSITORY / "examples"))  # the examples are scripts, not a package

from launch import run_training  # noqa: E402


def run_arm(
    arm: dict[str, Any], arguments: list[str], world_size: int, timeout_s: float
) -> dict[str, Any]:
    """Train once and return the figures that a study keeps, beginning with those of `arm`.

    `arm` names the run (arm, seed, learning rate, ...); `arguments` are those of train.py.
    """
    started = time.perf_counter()
    print(", ".join(f"{name} {value}" for name, value in arm.items()), end=": ", flush=True)
    figures = run_training(arguments, world_size, timeout_s)
    seconds = time.perf_counter() - started
    print(
        f"held-out loss {figures['held_out_loss']:.4f}, "
        f"accuracy {100 * figures['held_out_accuracy']:.2f} % ({seconds:.0f} s)",
        flush=True,
    )
    losses = [loss for record in figures["history"] for loss in record["losses"]]
    return {
        **arm,
        "arguments": _without_paths(arguments),
        "held_out_loss": figures["held_out_loss"],
        "held_out_accuracy": figures["held_out_accuracy"],
        "held_out_accuracy_by_epoch": [
            record["held_out_accuracy"] for record in figures["history"]
        ],
        "train_loss": figures["train_loss"],
        "train_loss_curve": _means(losses),
        "steps": figures["steps"],
        "step_ms": figures["step_ms"],
        "bytes_sent_per_step": figures["bytes_sent_per_step"],
        "bytes_sent_total": figures["bytes_sent_total"],
        "dense_bytes_per_step": figures["dense_bytes_per_step"],
        "compression_ratio": figures["compression_ratio"],
        "metrics_of_the_last_step": figures["metrics"],
        "seconds": seconds,
        "parameters": figures["parameters"],
        "held_out_name": figures["held_out_name"],
        "device": figures["device"],
        "processor": figures["processor"],
        "cores": figures["cores"],
    }


def provenance(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return machine, versions, commit, command and time, for the head of a results file.

    What all runs share is taken out of them. A commit that ends in "-dirty" had changes on top.
    """
    shared = ("parameters", "held_out_name", "device", "processor", "cores")
    program = [Path(sys.executable).name, os.path.relpath(sys.argv[0], REPOSITORY)]
    about = {
        "command": shlex.join([*program, *_without_paths(sys.argv[1:])]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }
    for name in shared:
        values = [run.pop(name) for run in runs]
        assert len(set(values)) == 1, f"the runs differ in {name}: {values}"
        about[name] = values[0]
    return about


def write(study: dict[str, Any], path: Path) -> None:
    """Write a study as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def _means(losses: list[float]) -> list[dict[str, float]]:
    """Return at most CURVE_POINTS means of consecutive losses, each with the last step in it."""
    width = -(-len(losses) // CURVE_POINTS)
    starts = range(0, len(losses), width)
    groups = [losses[start : start + width] for start in starts]
    return [
        {"step": start + len(group), "loss": sum(group) / len(group)}
        for start, group in zip(starts, groups, strict=True)
    ]


def _without_paths(arguments: list[str]) -> list[str]:
    """Return the arguments with the paths of this machine replaced: they mean nothing elsewhere."""
    kept: list[str] = []
    for argument in arguments:
        option, separator, _ = argument.partition("=")
        if separator and option in PATH_OPTIONS:
            argument = f"{option}=PATH"
        elif kept and kept[-1] in PATH_OPTIONS:
            argument = "PATH"
        kept.append(argument)
    return kept


def _commit() -> str | None:
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
