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

from timing import RESULTS, goal, write_counted

ROOT = Path(__file__).resolve().parents[1]
MUTATE = ROOT / "tests" / "cpp" / "ptx" / "mutate_ptx.py"
CSRC = ROOT / "csrc" / "cuda"
PROGRAMS = {  # which kernels, which tests notice most of it quickly, and which reach the rest
    "compensate_select_cuda_test_ptx80": (
        "(kernelIf|encode_lost)",
        "*AWrongGuess*:*ManySegments*:*ALayout*:*OneNonFinite*:*Largest*:*Zeros*:*TwoSegments*:*Edges*",
        "*AGuessThat*:*ManySteps*:*SmallGroupsAlone*:*MoreGroups*",
    ),
    "decode_apply_cuda_test_ptx80": (
        "(decode_apply_kernelIf|nan_if_flagged_kernelIf|restore_kernel|return_dropped_kernel|add_lost_kernel)",
        "*",
        "",
    ),
    "shards_cuda_test_ptx80": (
        "(pack_shards_kernelIj|unpack_shards_kernelIj|mean_of_shards_kernelIf|mark_unused|seal_slot)",
        "*",
        "",
    ),
}


CUB = "in CUB's header"
UNROLLED = (
    "nvcc's choice between a loop and the same loop unrolled by four, which differs beyond 768 rounds only; "
    "or a zero more, written into what is zero or is written later"
)
MENDED = "what is a candidate is a guess: what it misses, a second pass finds, and what is too much, refine takes out"

# Why nothing can notice: of a line of the source that holds these words.
REASONS: tuple[tuple[str, str], ...] = (
    (
        "entry < end && word_index < 2 * plan.high_words",
        "of the rank's own payload the first condition ends the loop, and one round more finds nothing before `end`",
    ),
    (
        "word_index + lane < 2 * plan.high_words) word",
        "one word more is read, inside the payload, and its bits lie behind `end`",
    ),
    (
        "const bool valid = c < count;",
        "the value is 0 beyond the last entry, and zeros are taken only after all real ones",
    ),
    ("first < count; first += 32", "a round more, in which no lane is valid"),
    ("plan.states[g] = GroupState{}", UNROLLED),
    ("plan.look_back[r] = 0", UNROLLED),
    ("counts[b] = 0;", UNROLLED),
    ("b < kHistogramBins; b += kThreads", UNROLLED),
    ("if (counts[b] != 0) add_relaxed", UNROLLED),
    ("w < plan.high_words; w += kThreads", UNROLLED),
    ("signs[w] = 0;", UNROLLED),
    ("i < num_sums; i += kThreads", UNROLLED),
    ("c < static_cast<int>(tile_state); c += kThreads", UNROLLED),
    ("i < tile.numel; i += kThreads", UNROLLED),
    ("canonical(load_one(gradient + i))", UNROLLED),
    ("p < a.count; p += kThreads", UNROLLED),
    ("state.again = above", MENDED),
    ("(key >= low) <<", MENDED),
    ("if (key >= high)", MENDED),
    ("order.total > static_cast<uint32_t>(min(group.slot_numel", MENDED),
    (
        "bits > kHistogramBits ? bits - kHistogramBits : 0",
        "bins half as wide or twice: refine reads as many keys or twice as many",
    ),
    (
        "if (last - b >= 0",
        "every thread has as many bins, and its last is one less than a multiple of their number: never the edge",
    ),
    ("__nanosleep(64)", "one sleep more or less before the same word is there"),
    (CUB, "a lane whose sum nobody uses: the result is lane 0's"),
)
GUESS = "a guess is never wrong, only costly; counted_bytes_test holds the cost"
UNEXPLAINED = "none known"


def code_at(source: str) -> str:
    """Return the line that `file.cuh:12` names, or where it is from."""
    name, _, number = source.rpartition(":")
    path = CSRC / name
    return path.read_text().splitlines()[int(number) - 1].strip() if path.is_file() else CUB


def reason_of(kernel: str, code: str) -> str:
    """Return why its survivors are as good as the original."""
    if kernel == "guess":
        return GUESS
    return next((reason for words, reason in REASONS if words in code), UNEXPLAINED)


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
    for program, (kernels, tests, then) in PROGRAMS.items():
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
        (readable(m["kernel"]).split(" ")[0], m["source"], re.sub(r"%\w+", "%", m["change"]))
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
            "reason": reason_of(kernel, code),
        }
        for (kernel, source, comparison), count in sorted(survivors.items())
    ]
    if kind == "sync":
        goals = [goal("removed barriers and fences that nothing notices", survived, at_most=0)]
    else:
        unexplained = sum(one["mutants"] for one in listed if one["reason"] == UNEXPLAINED)
        goals = [goal("flipped comparisons that survive without a reason", unexplained, at_most=0)]
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
