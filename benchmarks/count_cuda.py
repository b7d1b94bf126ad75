"""Bytes, sectors and launches of the CUDA stages on a 25 MiB bucket, counted in simulation: no GPU, no time.

    python benchmarks/count_cuda.py build/cpp/tests/cpp/cuda/count_bytes

The executable runs the kernels' PTX (sm_80) in the interpreter of tests/cpp/ptx. Bytes are what the
threads ask for, where lanes of a warp that load from one address ask once; sector bytes are 32 for each sector that
a warp's request touches. Neither knows caches: sectors of one line that several requests touch count
each time. Gradients are Gaussian; the residual is that of three earlier steps. Values travel as bf16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_stages import segmentation
from timing import RESULTS, goal, write_counted

from compressed_ddp import ops

NUMEL = 25 * 2**20 // 4
GOALS = {  # at density 0.01, float32
    ("compensate_select_ and encode", "one pass"): 12.8,
    ("compensate_select_ and encode", "two passes"): 16.8,
    ("decode_apply_ of 8", ""): 4.4,
}


def floor_bytes(row: dict[str, Any], kind: str) -> float:
    """Return the bytes per element that no implementation can avoid."""
    layout = segmentation(kind, NUMEL, row["density"])
    payload = ops.payload_bytes(*layout.arguments, value_format="bf16") / NUMEL
    if row["stage"].startswith("decode"):
        return float(4 + 8 * payload)
    gradient = 4 if row["dtype"] == "float32" else 2
    return float(gradient + 4 + 4 + payload)


def main() -> int:
    """Run the counting program on both segmentations, print the rows and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("executable", type=Path)
    parser.add_argument("--segmentations", nargs="+", default=["one", "resnet50"])
    parser.add_argument("--output", type=Path, default=RESULTS / "count_cuda.json")
    options = parser.parse_args()
    rows, goals = [], []
    for kind in options.segmentations:
        layout = segmentation(kind, NUMEL, 0.01)
        segments = [
            -numel if group < 0 else numel
            for numel, group in zip(layout.segments, layout.groups, strict=True)
        ]
        with subprocess.Popen(
            [options.executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as program:
            assert program.stdin is not None and program.stdout is not None
            program.stdin.write("\n".join(map(str, segments)))
            program.stdin.close()
            for line in program.stdout:
                row = {"segments": len(segments), **json.loads(line)}
                row["floor_bytes_per_element"] = round(floor_bytes(row, kind), 4)
                rows.append(row)
                print(row, flush=True)
                limit = GOALS.get((row["stage"], row["method"]))
                if limit and row["density"] == 0.01 and row["dtype"] == "float32":
                    name = f"{row['stage']} {row['method']}".strip()
                    name += f", segments: {len(segments)}, B/element at 0.01"
                    goals.append(goal(name, row["bytes_per_element"], at_most=limit))
        if program.returncode != 0:
            print(f"{options.executable} ended with {program.returncode}", file=sys.stderr)
            return 1
    write_counted(
        "count_cuda",
        "What the CUDA stages move, counted in simulation (not timed)",
        settings={
            "numel": NUMEL,
            "kernels": "PTX of sm_80, interpreted",
            "earlier_steps": 3,
            "value_format": "bf16",
        },
        goals=goals,
        rows=rows,
        path=options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
