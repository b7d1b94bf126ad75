"""Tests the tests of the CUDA kernels: breaks one instruction of their PTX at a time and runs the tests on it.

    python tests/cpp/ptx/mutate_ptx.py TEST_EXECUTABLE [--filter GTEST_FILTER] [--kind sync|compare]
                                       [--then GTEST_FILTER] [--kernel NAME] [--one-per-source]
                                       [--sample N --seed S]
                                       [--jobs N] [--json FILE]

`sync` removes each barrier and fence, takes each vote of a block apart and weakens each acquire and release; every one of these must be
noticed, by a wrong result, by the race detector or as a hang, or it is not needed. `compare` turns
each comparison around its edge (lt <-> le, gt <-> ge, eq <-> ne): survivors show what the test data
does not reach. What survives the tests of --filter (`sync`: in two orders of threads) meets those of --then.
The executable is one that is linked with the stand-in runtime. Exit status 1 when a `sync` mutant
survives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

COMPARISONS = {
    "lt": "le",
    "le": "lt",
    "gt": "ge",
    "ge": "gt",
    "lo": "ls",
    "ls": "lo",
    "hi": "hs",
    "hs": "hi",
    "eq": "ne",
    "ne": "eq",
}
# SIMT_FUZZ and SIMT_ORDER. A removed barrier may show in one order only; a comparison is a matter of the data.
ORDERS = {"sync": (("0", "ascending"), ("1", "random")), "compare": (("1", "random"),)}
TIMEOUT_S = 300


@dataclass
class Mutant:
    """One change of one line of one program's PTX."""

    program: int
    line: int  # from 1
    kernel: str
    change: str
    text: str  # the line that takes its place
    source: str = ""  # where nvcc says that it comes from
    outcome: str = ""


def sites(program: int, ptx: list[str], kind: str) -> list[Mutant]:
    """Return every mutant of a PTX text."""
    found, kernel, source, files = [], "", "", {}
    for line in ptx:  # the table of files stands at the end
        if name := re.match(r"\s*\.file\s+(\d+)\s+\"([^\"]+)\"", line):
            files[name.group(1)] = Path(name.group(2)).name
    for number, line in enumerate(ptx, 1):
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            source = f"{files.get(place.group(1), '?')}:{place.group(2)}"
        entry = re.search(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", line)
        if entry:
            kernel = entry.group(1)
        text = line.strip()
        operation = re.sub(r"^@!?%\w+\s+", "", text)
        if kind == "sync":
            if re.match(r"(bar(rier)?\.(sync|warp\.sync)|membar|fence)\b", operation):
                found.append(
                    Mutant(program, number, kernel, f"without: {operation}", "// " + line, source)
                )
            # A vote of the block: each thread keeps its own opinion, with the barrier and without.
            if vote := re.match(
                r"bar\.red\.(?:or|and)\.pred\s+(%\w+), \d+, (!?)(%\w+);", operation
            ):
                own = f"{'not' if vote[2] else 'mov'}.pred {vote[1]}, {vote[3]};"
                for what, text in (("alone", f"bar.sync 0;\n{own}"), ("without", own)):
                    found.append(
                        Mutant(program, number, kernel, f"{what}: {operation}", text, source)
                    )
            for strong in (".acquire", ".release", ".acq_rel"):
                if strong in operation and not operation.startswith("fence"):
                    found.append(
                        Mutant(
                            program,
                            number,
                            kernel,
                            f"relaxed: {operation}",
                            line.replace(strong, ".relaxed"),
                            source,
                        )
                    )
        else:
            comparison = re.match(r"setp\.(\w+)\.", operation)
            if comparison and comparison.group(1) in COMPARISONS:
                name = comparison.group(1)
                found.append(
                    Mutant(
                        program,
                        number,
                        kernel,
                        operation,
                        line.replace(f"setp.{name}.", f"setp.{COMPARISONS[name]}.", 1),
                        source,
                    )
                )
    return found


def run(executable: str, test_filter: str, environment: dict[str, str]) -> str:
    """Return "" when all tests pass, else how the failure was noticed."""
    command = [executable, f"--gtest_filter={test_filter}", "--gtest_fail_fast"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return ""
    known = re.search(
        r"(data race|out of bounds|uninitiali[sz]ed|misaligned|barrier|mask|hang|trap|unsupported)",
        done.stdout + done.stderr,
    )
    return (
        known.group(1)
        if known
        else "wrong result"
        if done.returncode == 1
        else f"exit {done.returncode}"
    )


def judge(mutant: Mutant, ptx: list[str], options: argparse.Namespace) -> Mutant:
    """Run the tests on a mutant and fill in what noticed it."""
    changed = list(ptx)
    changed[mutant.line - 1] = mutant.text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.ptx"
        path.write_text("\n".join(changed))
        for test_filter in filter(None, (options.filter, options.then)):
            for fuzz, order in ORDERS[options.kind]:
                environment = {
                    "SIMT_PTX_REPLACE": f"{mutant.program}:{path}",
                    "SIMT_FUZZ": fuzz,
                    "SIMT_ORDER": order,
                }
                mutant.outcome = run(options.executable, test_filter, environment)
                if mutant.outcome:
                    return mutant
    return mutant


def main() -> int:
    """Run the mutants, print each and what noticed it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("executable")
    parser.add_argument("--filter", default="*")
    parser.add_argument("--then", default="", help="tests that only survivors of --filter meet")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kind", choices=["sync", "compare"], default="sync")
    parser.add_argument(
        "--kernel", default="", help="only kernels whose name this expression finds"
    )
    parser.add_argument(
        "--one-per-source",
        action="store_true",
        help="of the instances of one comparison in the source (templates, unrolled loops), one at random",
    )
    parser.add_argument("--sample", type=int, default=0, help="only so many, chosen at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        before = run(options.executable, options.filter, {"SIMT_PTX_DUMP": folder})
        if before:
            print(f"the tests fail on the unchanged PTX: {before}")
            return 2
        texts = {
            int(path.stem): path.read_text().split("\n") for path in Path(folder).glob("*.ptx")
        }
        mutants = [
            m
            for program, ptx in sorted(texts.items())
            for m in sites(program, ptx, options.kind)
            if re.search(options.kernel, m.kernel)
        ]
        total = len(mutants)
        if options.one_per_source:
            random.Random(options.seed).shuffle(mutants)
            places = {(m.source, re.sub(r"%\w+", "%", m.change)): m for m in mutants}
            mutants = sorted(places.values(), key=lambda m: (m.program, m.line))
        if options.sample:
            mutants = sorted(
                random.Random(options.seed).sample(mutants, min(options.sample, total)),
                key=lambda m: (m.program, m.line),
            )
        print(f"{len(mutants)} of {total} mutants, seed {options.seed}")
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant in pool.map(lambda m: judge(m, texts[m.program], options), mutants):
                print(
                    f"{mutant.outcome or 'SURVIVED':16} line {mutant.line:6} {mutant.kernel[:60]:60} {mutant.change}",
                    flush=True,
                )
    survived = [mutant for mutant in mutants if not mutant.outcome]
    print(f"{len(mutants) - len(survived)} noticed, {len(survived)} survived")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"kind": options.kind, "total": total, "mutants": [asdict(m) for m in mutants]},
                indent=1,
            )
            + "\n"
        )
    return 1 if survived and options.kind == "sync" else 0


if __name__ == "__main__":
    sys.exit(main())
