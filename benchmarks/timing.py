"""What the benchmarks share: interleaved repetitions, quartiles, paired ratios, and the machine.

A machine's speed drifts, and other programs take some of it. So the things that are compared run in
turns (A B C A B C ..), a ratio is taken inside each turn, and the median of those ratios is what
counts: a slow moment hits both sides of it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
# Written by the benchmarks themselves: a run must not call the next one's commit dirty.
GENERATED = ("benchmarks/results", "docs/benchmarks.md")


# ---- repetitions


def in_turns(
    arms: Mapping[str, Callable[[int], object]], repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Call every arm once per turn, in order, and return each arm's wall times in ms.

    An arm is called with the number of the turn (warm-up turns included, so that it can rotate its
    buffers). What it has to prepare without being timed, it does in a `Prepared`.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + repetitions):
        for name, arm in arms.items():
            call = arm.prepare(turn) if isinstance(arm, Prepared) else partial(arm, turn)
            start = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - start
            if turn >= warmup:
                samples[name].append(elapsed / 1e6)
    return samples


class Prepared:
    """An arm of `in_turns` whose `prepare(turn)`, untimed, returns the call that is timed."""

    def __init__(self, prepare: Callable[[int], Callable[[], object]]) -> None:
        self.prepare = prepare

    def __call__(self, turn: int) -> object:
        """Prepare and run: for warm-ups of one's own."""
        return self.prepare(turn)()


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    """Return median, 25th and 75th percentile (inclusive method), rounded to five digits."""
    if not samples:
        raise ValueError("quartiles: expected at least one sample")
    if len(samples) == 1:
        p25 = median = p75 = samples[0]
    else:
        p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": _round(median), "p25": _round(p25), "p75": _round(p75)}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Return the quartiles of numerator[i] / denominator[i]: both of the same turn."""
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def paired_difference(first: Sequence[float], *others: Sequence[float]) -> dict[str, float]:
    """Return the quartiles of first[i] - others[0][i] - others[1][i] - ..: all of the same turn."""
    turns = zip(first, *others, strict=True)
    return quartiles([value - sum(subtracted) for value, *subtracted in turns])


def goal(
    text: str, value: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """Return a goal beside the figure that it is about, and whether it is reached."""
    reached = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    limit = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
    return {"goal": text, "limit": limit, "value": value, "reached": reached}


def _round(value: float) -> float:
    return float(f"{value:.5g}")


# ---- the machine


def system_metadata() -> dict[str, Any]:
    """Return processor, memory, versions, commit and date. No host names and no paths."""
    import torch

    import compressed_ddp
    from compressed_ddp import _native

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compressed_ddp": compressed_ddp.__version__,
        "compiler": compiler_of(Path(_native._C.__file__)),
        "instruction_set": _native._C.instruction_set,
        "load_average": round(os.getloadavg()[0], 2),  # at the start: above 0.5, others ran as well
        **_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def warn_when_busy(system: Mapping[str, Any]) -> None:
    """Say on stderr when the machine does something else as well."""
    if system["load_average"] > 0.5:
        print(
            f"load average {system['load_average']}: other programs are running, which makes these "
            "figures unfit for publication",
            file=sys.stderr,
        )


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def write_counted(
    benchmark: str,
    title: str,
    *,
    settings: Mapping[str, Any],
    goals: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    **more: object,
) -> None:
    """Write the result of a benchmark that counts, beside the machine that it ran on; `more` behind it."""
    write(
        {
            "benchmark": benchmark,
            "title": title,
            "system": system_metadata(),
            "settings": settings,
            "goals": goals,
            "rows": rows,
            **more,
        },
        path,
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # virtual machines often hide the model's name, but not its number
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compiler_of(module: Path) -> str:
    """Return what compiled a module or program, as the compiler noted it there."""
    found = re.findall(rb"(?:GCC: \([^)]*\)|clang version) [\d.]+", module.read_bytes())
    return found[-1].decode() if found else "unknown"


def _commit() -> dict[str, Any]:
    try:
        commit = _git("rev-parse", "HEAD")
        excluded = [f":(exclude){path}" for path in GENERATED]
        changes = _git("status", "--porcelain", "-uno", "--", ".", *excluded)
        return {"commit": commit, "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _command() -> str:
    program = Path(sys.argv[0]).name
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith("--output"):
            arguments.append("DIR" if Path(argument).is_absolute() else argument)
        skip = argument == "--output"  # a path of this machine
    return shlex.join(["python", f"benchmarks/{program}", *arguments])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with this many intra-op threads of torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> bool:
    """Make malloc reuse what was freed instead of handing it back to the kernel. False: not glibc.

    The engine allocates once and reuses; the operators (and torch.topk) allocate in every call, and
    without this the time would be spent in page faults.
    """
    import ctypes

    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))
