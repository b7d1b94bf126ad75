"""What notices a broken instruction of the CUDA kernels: a row per kernel, from tests/cpp/ptx/mutate_ptx.py.

    python benchmarks/count_mutants.py build/cpp/tests/cpp/cuda [--kind sync|compare]

Of each fp32 kernel (sm_80) every barrier and fence is removed in turn (`sync`), or every comparison of the
source turned around its edge in one of its instances (`compare`), and the tests of the stage are run on it in the interpreter. A `sync`
mutant that survives is a barrier that is not needed, or one that no test reaches.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from mutant_reasons import HEADER, UNEXPLAINED, reason_of, unused_reasons
from timing import RESULTS, goal, write_counted

ROOT = Path(__file__).resolve().parents[1]
MUTATE = ROOT / "tests" / "cpp" / "ptx" / "mutate_ptx.py"
CSRC = ROOT / "csrc" / "cuda"
SELECTION = "compensate_select_cuda_test_ptx80"
RUNS = (  # a program, its kernels, tests that notice most of them quickly, and tests that reach the rest
    (
        SELECTION,
        "guess_kernelIf",
        "*AWrongGuess*:*ManySegments*:*Zeros*:*AllTails*:*AGuessThat*",
        "",
    ),
    (
        SELECTION,
        "(filter_kernelIf|histogram_kernelIf|refine_kernelIf|emit_kernelIf|small_kernelIf|encode_lost)",
        "*AWrongGuess*:*ManySegments*:*ALayout*:*OneNonFinite*:*Largest*:*Zeros*:*TwoSegments*:*Edges*:*AllTails*:*NoEntry*",
        "*AGuessThat*:*ManySteps*:*SmallGroups*:*MoreGroups*:*Adversarial*:*Ties*:*Magnitude*",
    ),
    (
        "decode_apply_cuda_test_ptx80",
        "(decode_apply_kernelIf|nan_if_flagged_kernelIf|restore_kernel|return_dropped_kernelIf|add_lost_kernel)",
        "*-*ManyRanks*:*AtTheEndOfARound*",
        "*ManyRanks*:*AtTheEndOfARound*",
    ),
    (
        "shards_cuda_test_ptx80",
        "(pack_shards_kernelIj|unpack_shards_kernelIj|mean_of_shards_kernelIf|mark_unused|seal_slot)",
        "*",
        "",
    ),
)


def code_at(source: str) -> str:
    """Return the line that `file.cuh:12` names, or where it is from."""
    name, _, number = source.rpartition(":")
    path = CSRC / name
    if not path.is_file():
        return HEADER
    return path.read_text().splitlines()[int(number) - 1].strip() if number != "0" else "(of nvcc)"


def readable(mangled: str) -> str:
    """Return `emit<fp32, sign>` for the mangled name of a kernel."""
    name = re.search(r"\d+([a-z_]+)_kernel", mangled)
    formats = {"0": "fp32", "1": "bf16", "2": "sign"}
    options = [formats[n] + " values" for n in re.findall(r"ValueFormatE(\d)", mangled)]
    options += ["again" if n == "1" else "first" for n in re.findall(r"Lb(\d)E", mangled)]
    stem = name[1] if name else mangled
    return f"{stem} ({', '.join(options)})" if options else stem


def main() -> int:
    """Run the mutants of all programs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["sync", "compare"], default="sync")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    mutants = []
    for program, kernels, tests, then in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "mutants.json"
            arguments = ["--kernel", kernels, "--filter", tests, "--then", then]
            arguments += ["--kind", options.kind]
            arguments += ["--jobs", str(options.jobs), "--json", str(found)]
            if options.kind == "compare":
                arguments.append("--one-per-source")
            subprocess.run(
                [sys.executable, MUTATE, options.folder / program, *arguments], check=False
            )
            mutants += json.loads(found.read_text())["mutants"]
    return write_result(mutants, options.kind, options.output)


def write_result(mutants: list[dict[str, Any]], kind: str, output: Path | None) -> int:
    """Print what is left and write the results file."""
    rows = []
    for kernel in sorted({mutant["kernel"] for mutant in mutants}):
        outcomes = Counter(m["outcome"] or "survived" for m in mutants if m["kernel"] == kernel)
        rows.append(
            {
                "kernel": readable(kernel),
                "mutants": outcomes.total(),
                "survived": outcomes.pop("survived", 0),
                "noticed_as": ", ".join(f"{what} {n}" for what, n in sorted(outcomes.items())),
            }
        )
    survived = sum(row["survived"] for row in rows)
    survivors = Counter(
        (readable(m["kernel"]), m["source"], re.sub(r"%\w+", "%", m["change"]))
        for m in mutants
        if not m["outcome"]
    )
    listed = [  # the same place in several instances of a template, and unrolled, counts together
        {
            "kernel": kernel,
            "source": source,
            "code": (code := code_at(source)),
            "comparison": comparison,
            "mutants": count,
            "reason": reason_of(kernel, code, comparison),
        }
        for (kernel, source, comparison), count in sorted(survivors.items())
    ]
    if kind == "sync":
        goals = [goal("removed barriers and fences that nothing notices", survived, at_most=0)]
    else:
        unexplained = sum(one["mutants"] for one in listed if one["reason"] == UNEXPLAINED)
        goals = [goal("flipped comparisons that survive without a reason", unexplained, at_most=0)]
        for reason in unused_reasons(
            [(one["kernel"], one["code"], one["comparison"]) for one in listed]
        ):
            print(f"no survivor has this reason: {reason}")
    write_counted(
        "count_mutants",
        f"Mutants of the CUDA kernels ({kind}), executed without a GPU",
        settings={"kind": kind, "kernels": "fp32, PTX of sm_80, interpreted"},
        goals=goals,
        rows=rows,
        path=output or RESULTS / f"mutants_{kind}.json",
        survivors=listed,
    )
    return 1 if survived and kind == "sync" else 0


if __name__ == "__main__":
    sys.exit(main())
