"""What people write in PyTorch, on a GPU: the eager pipeline and torch.sort, for bench_cuda_stages.

    python benchmarks/gpu/bench_eager_cuda.py --into benchmarks/results/bench_stages_cuda.json

The same buckets as in the rows of that file, on the same GPU, in the same verify.sh: add, abs, topk,
gather and zero for every group, and torch.sort of the bucket. Times are the device's, between two
events, and hold what the host keeps it waiting for, as a training loop would. The rows are appended,
and every compress row of the file gets `eager_over_it`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_stages import eager_pipeline, segmentation
from timing import goal, quartiles, write

WARM_UP_STEPS = 30
NUM_BUFFERS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPRESS = "compensate_select_encode, one pass"
AXES = ("numel", "density", "dtype", "segmentation")
GOAL_NUMELS = (26_214_400, 104_857_600)  # 100 and 400 MiB of fp32
HEAVY_NUMEL = 50_000_000  # from here on, fewer repetitions


def times_ms(call: Callable[[int], object], repetitions: int, warmup: int) -> list[float]:
    """Return the device's time of `call(turn)`, in ms."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for turn in range(warmup + repetitions):
        torch.cuda.synchronize()
        start.record()
        call(turn)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times[warmup:]


def row(stage: str, like: dict[str, Any], times: list[float]) -> dict[str, Any]:
    """Return a row with the axes of another one."""
    axes = {axis: like[axis] for axis in ("numel", "size_mib", "density", "dtype", "segmentation")}
    sizes = {name: like[name] for name in ("segments", "selected") if name in like}
    return {"stage": stage, **axes, "payloads": None, **sizes, "ms": quartiles(times)}


def measure_eager(like: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Return the eager pipeline's row for the bucket of a compress row."""
    numel, dtype = like["numel"], DTYPES[like["dtype"]]
    layout = segmentation(like["segmentation"], numel, like["density"])
    if (len(layout.segments), sum(layout.k)) != (like["segments"], like["selected"]):
        raise RuntimeError(f"bench_cuda_stages cut {like} otherwise than {__file__} does")
    gradients = [torch.randn(numel, device="cuda").to(dtype) for _ in range(NUM_BUFFERS)]
    residual = torch.zeros(numel, device="cuda")

    def step(turn: int) -> None:
        eager_pipeline(gradients[turn % NUM_BUFFERS], residual, layout)

    warmup = 3 if numel > HEAVY_NUMEL else WARM_UP_STEPS if len(layout.k) == 1 else 8
    return row("eager pipeline", like, times_ms(step, repetitions, warmup))


def measure_sort(like: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Return torch.sort's row for the size of a stream row."""
    values = [torch.randn(like["numel"], device="cuda").abs_() for _ in range(2)]
    times = times_ms(lambda turn: torch.sort(values[turn % 2], descending=True), repetitions, 2)
    return row("torch.sort", like, times)


def merged(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result with these rows, `eager_over_it` in the compress rows, and the goals."""
    eager = {
        tuple(entry[axis] for axis in AXES): entry["ms"]["median"]
        for entry in rows
        if entry["stage"] == "eager pipeline"
    }
    words = "eager pipeline's time over its"
    goals = [entry for entry in result["goals"] if entry["goal"] != words]
    kept = [e for e in result["rows"] if e["stage"] not in ("eager pipeline", "torch.sort")]
    for entry in kept:
        time_ms = eager.get(tuple(entry[axis] for axis in AXES))
        if not entry["stage"].startswith("compensate_select_encode") or time_ms is None:
            continue
        entry["eager_over_it"] = float(f"{time_ms / entry['ms']['median']:.5g}")
        counts = entry["segmentation"] == "one" and entry["numel"] in GOAL_NUMELS
        if entry["stage"] == COMPRESS and counts and entry["density"] <= 0.01:
            where = {axis: entry[axis] for axis in ("stage", *AXES)}
            goals.append({**where, **goal(words, entry["eager_over_it"], at_least=6)})
    return {**result, "goals": goals, "rows": kept + rows}


def main() -> int:
    """Measure beside the rows of a results file, and write them into it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, required=True, help="what bench_cuda_stages wrote")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--budget-s", type=float, default=1e9)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_eager_cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    result = json.loads(options.into.read_text(encoding="utf-8"))
    result["system"]["torch"] = torch.__version__

    start = time.monotonic()
    rows: list[dict[str, Any]] = []
    skipped = list(result["skipped"])
    for like in result["rows"]:
        is_sort = like["stage"] == "stream" and like["density"] is None
        if not is_sort and like["stage"] != COMPRESS:
            continue
        repetitions = 3 if like["numel"] > HEAVY_NUMEL else options.repetitions
        where = {"stage": "torch.sort" if is_sort else "eager pipeline"}
        where |= {axis: like[axis] for axis in AXES}
        if time.monotonic() - start > options.budget_s:
            skipped.append({**where, "reason": "the time was up"})
            continue
        try:
            rows.append((measure_sort if is_sort else measure_eager)(like, repetitions))
        except torch.cuda.OutOfMemoryError:
            skipped.append({**where, "reason": "out of memory"})
        else:
            print(" ".join(f"{value}" for value in where.values()), rows[-1]["ms"], flush=True)
        torch.cuda.empty_cache()
    write({**merged(result, rows), "skipped": skipped}, options.into)
    return 0


if __name__ == "__main__":
    sys.exit(main())
