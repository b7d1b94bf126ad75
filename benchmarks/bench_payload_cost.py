"""What payload version 3 costs beside version 1: processor time of select + encode, and of decoding 8 payloads.

    python benchmarks/bench_payload_cost.py

Version 1 sent an int32 and a float32 per entry, 8 bytes, as plain lists. Its code is kept for this
comparison in benchmarks/cpu/payload_v1.cpp: selection writes straight into the payload, so that
encoding is a header; decoding checks every index and adds from the lists, tile by tile. Version 3 is
the engine's own code, in its three value formats.

The program benchmarks/cpu/bench_payload_cost.cpp is compiled into --build and runs all of it in
turns, in one process and on one thread; what is compared is the thread's processor time. A ratio is
taken inside each turn. The bucket is float32, and a group is one tensor of it, of --group-numel entries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from timing import (
    REPOSITORY,
    RESULTS,
    compiler_of,
    goal,
    paired_ratio,
    quartiles,
    system_metadata,
    warn_when_busy,
    write,
)

BASE = "v1"
LIMIT = 1.25  # times version 1


def build(folder: Path) -> Path:
    """Compile the program with the core, without Python and torch, and return its path."""
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCOMPRESSED_DDP_PYTHON=OFF",
        "-DCOMPRESSED_DDP_TESTS=OFF",
        "-DCOMPRESSED_DDP_CUDA=OFF",
        "-DCOMPRESSED_DDP_BENCHMARKS=ON",
    ]
    subprocess.run(["cmake", "-S", REPOSITORY, "-B", folder, *options], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", "bench_payload_cost"], check=True)
    return folder / "benchmarks" / "cpu" / "bench_payload_cost"


def measure(program: Path, options: argparse.Namespace, group_numel: int) -> list[dict[str, Any]]:
    """Return the rows of all densities for groups of one size."""
    numel = int(options.size * 2**20) // 4
    group_numel = group_numel or numel
    command = [program, numel, group_numel, options.warmup_steps, options.turns, *options.densities]
    output = subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True
    )
    samples = [json.loads(line) for line in output.stdout.splitlines()]
    base = {(s["density"], s["stage"]): s["cpu_ms"] for s in samples if s["payload"] == BASE}
    return [
        {
            "stage": sample["stage"],
            "density": sample["density"],
            "group_numel": group_numel,
            "payload": sample["payload"],
            "entries": sample["entries"],
            "payload_bytes": sample["bytes"],
            "cpu_ms": quartiles(sample["cpu_ms"]),
            "over_v1": paired_ratio(sample["cpu_ms"], base[sample["density"], sample["stage"]]),
        }
        for sample in samples
    ]


def goals(rows: list[dict[str, Any]], numel: int) -> list[dict[str, Any]]:
    """Return what is aimed at, beside the figures: of a bucket that is one tensor."""
    return [
        {
            "stage": row["stage"],
            "density": row["density"],
            "payload": row["payload"],
            **goal("processor time over version 1's", row["over_v1"]["median"], at_most=LIMIT),
        }
        for row in rows
        if row["payload"] != BASE and row["group_numel"] == numel
    ]


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    times, ratio = row["cpu_ms"], row["over_v1"]
    print(
        f"{row['density']:<6g} {row['stage']:<18} {row['payload']:<5} {times['median']:>8.3f} ms "
        f"[{times['p25']:.3f}, {times['p75']:.3f}]   {ratio['median']:.2f} x v1 "
        f"[{ratio['p25']:.2f}, {ratio['p75']:.2f}]"
    )


def main() -> int:
    """Build, run, print the rows and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=25, help="MiB of fp32")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.001, 0.01, 0.1])
    parser.add_argument(
        "--group-numel", type=int, nargs="+", default=[0], help="0: the bucket is one group"
    )
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build" / "benchmarks")
    parser.add_argument("--output", type=Path, default=RESULTS / "payload_cost.json")
    options = parser.parse_args()

    program = build(options.build)
    system = system_metadata() | {"compiler": compiler_of(program)}  # not that of the Python module
    warn_when_busy(system)
    rows = []
    for group_numel in options.group_numel:
        rows += measure(program, options, group_numel)
    for row in rows:
        show(row)
    write(
        {
            "benchmark": "bench_payload_cost",
            "title": "What payload version 3 costs beside version 1",
            "system": system,
            "settings": {
                "size_mib": options.size,
                "dtype": "float32",
                "threads": 1,
                "payloads_decoded": 8,
                "turns": options.turns,
                "warmup_steps": options.warmup_steps,
                "time": "processor time of the thread",
                "gradients": "Gaussian, new in every turn",
            },
            "goals": goals(rows, int(options.size * 2**20) // 4),
            "rows": rows,
        },
        options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
