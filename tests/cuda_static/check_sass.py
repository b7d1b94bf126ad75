"""Is the machine code of the CUDA kernels what they were written for? Needs the toolkit, but no GPU.

    python tests/cuda_static/check_sass.py build/sass                  all architectures
    python tests/cuda_static/check_sass.py build/sass --arch 90        one of them
    python tests/cuda_static/check_sass.py build/sass --update         take today's limits over

Every kernel below --sources is compiled for each architecture, with the flags of csrc/CMakeLists.txt,
into the folder that is named first; what is there already for the same sources, flags and compiler
is used again. Then each kernel is held against rules.json:

- Never a spilled register, a stack or an access to local memory.
- `limits`, per kernel and architecture: registers, in steps of 8, since the hardware hands them out
  in such; and how many blocks a multiprocessor holds, as follows from registers and shared memory.
- `instructions`: how often the opcodes that match a regular expression occur (`min`, `max`) in the
  kernels that match a name pattern (`kernels`, but not `except`).

A kernel without limits is as wrong as limits without a kernel. The exit code is 1 if a rule is
broken, 2 if the check could not be made. `-Xptxas -warn-spills` is left out: with warnings as errors
there would be no figures of a kernel that spills.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RULES = Path(__file__).resolve().with_name("rules.json")
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--fmad=false", "-lineinfo", "-Werror=all-warnings")
PTXAS_FLAGS = ("-Xptxas", "-v")

ENTRY = re.compile(
    r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL
)
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SECTION = re.compile(r"\.text\.(\S+):$")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
SHORT_NAME = re.compile(r"(?:void )?(?:[\w ()]+::)*(\w+)(<.*?>)?\(")


class CheckError(Exception):
    """The check could not be made; says why."""


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks have to share (CUDA C++ Programming Guide, "Compute Capabilities")."""

    threads: int
    blocks: int
    shared_bytes: int
    registers_per_quarter: int = 65536 // 4

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Return how many blocks of a kernel fit, with the largest share of shared memory."""
        warps = threads // 32
        registers_per_warp = round_up(registers * 32, 256)
        by_registers = self.registers_per_quarter // registers_per_warp * 4 // warps
        by_shared = self.shared_bytes // (round_up(shared_bytes, 128) + 1024)  # the system's KiB
        return min(self.blocks, self.threads // threads, by_registers, by_shared)


MULTIPROCESSORS = {
    "80": Multiprocessor(threads=2048, blocks=32, shared_bytes=164 << 10),
    "90": Multiprocessor(threads=2048, blocks=32, shared_bytes=228 << 10),
    "100": Multiprocessor(threads=2048, blocks=32, shared_bytes=228 << 10),
    "120": Multiprocessor(threads=1536, blocks=24, shared_bytes=100 << 10),
}


@dataclass
class Kernel:
    """What the compiler made of one kernel, for one architecture."""

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int
    blocks: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        """Return how many instructions have an opcode that matches all of `pattern`."""
        return sum(n for opcode, n in self.opcodes.items() if re.fullmatch(pattern, opcode))


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


# ---- tools


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool; its failure is a CheckError that shows what it said."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done


def find_nvcc() -> Path | None:
    """Return the toolkit's compiler, looked for where csrc/cuda/toolkit.cmake does."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home, "bin") for home in homes if home]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, places)))
    return Path(found) if found else None


def toolkit_version(nvcc: Path) -> tuple[int, int]:
    """Return the toolkit's version, such as (13, 0)."""
    match = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version").stdout)
    if match is None:
        raise CheckError(f"{nvcc} --version names no release")
    return int(match[1]), int(match[2])


def find_nvdisasm(nvcc: Path) -> Path:
    """Return the disassembler: of the package that pyproject.toml pins, else of the toolkit."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = [path for package in packages for path in sorted(package.glob("*/bin/nvdisasm"))]
    beside = nvcc.resolve().with_name("nvdisasm")
    if not found and not beside.is_file():
        raise CheckError(f"no nvdisasm, and none beside {nvcc}: pip install nvidia-cuda-nvdisasm")
    return found[0] if found else beside


# ---- from sources to figures


def compiled(source: Path, arch: str, nvcc: Path, folder: Path, key: str) -> tuple[Path, str]:
    """Return the source's cubin and what ptxas said about it, compiled unless it is there."""
    cubin = folder / f"{source.stem}.sm_{arch}.{key}.cubin"
    log = cubin.with_suffix(".log")
    if not cubin.is_file():
        for old in folder.glob(f"{source.stem}.sm_{arch}.*"):
            old.unlink(missing_ok=True)
        new = cubin.with_suffix(f".{os.getpid()}")  # two checks at once do not meet
        command = (nvcc, *FLAGS, *PTXAS_FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", new, source)
        log.write_text(run(*command).stderr, "utf-8")
        new.rename(cubin)
    return cubin, log.read_text("utf-8")


def content_key(sources: Path, nvcc: Path) -> str:
    """Return a name for all that a cubin depends on: sources, headers, flags and compiler."""
    digest = hashlib.sha256(run(nvcc, "--version").stdout.encode())
    digest.update(" ".join(FLAGS + PTXAS_FLAGS).encode())
    for path in sorted(p for p in sources.rglob("*") if p.suffix in {".cu", ".cuh", ".h"}):
        digest.update(f"{path.relative_to(sources)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def opcodes_of(disassembly: str) -> dict[str, Counter[str]]:
    """Return how often each opcode occurs, by the mangled name of the kernel."""
    found: dict[str, Counter[str]] = {}
    opcodes: Counter[str] = Counter()
    for line in disassembly.splitlines():
        if section := SECTION.match(line):
            opcodes = found.setdefault(section[1], Counter())
        elif instruction := INSTRUCTION.match(line):
            opcodes[instruction[1]] += 1
    return found


def short_names(mangled: Iterable[str]) -> Iterator[str]:
    """Yield names as rules.json has them: no namespaces, no parameters, no spaces."""
    for name in run("c++filt", text="\n".join(mangled)).stdout.splitlines():
        match = SHORT_NAME.match(name)
        arguments = re.sub(r"\w+::|\s", "", (match[2] or "") if match else "")
        yield match[1] + arguments if match else name


def kernels_of(cubin: Path, log: str, arch: str, nvdisasm: Path) -> Iterator[Kernel]:
    """Yield the kernels of one cubin, not yet held against any rule."""
    opcodes = opcodes_of(run(nvdisasm, "-c", cubin).stdout)
    entries = {match[1]: match[2] for match in ENTRY.finditer(log)}
    if entries.keys() != opcodes.keys():
        raise CheckError(f"{cubin}: code of {sorted(opcodes)}, but figures of {sorted(entries)}")
    for name, mangled in zip(short_names(entries), entries):
        frame, used = FRAME.search(entries[mangled]), USED.search(entries[mangled])
        if frame is None or used is None:
            raise CheckError(f"{cubin}: what ptxas said is not understood:\n{entries[mangled]}")
        stack, stores, loads = map(int, frame.groups())
        registers, shared = int(used[1]), int(used[2] or 0)
        yield Kernel(name, arch, registers, shared, stack, stores + loads, opcodes=opcodes[mangled])


# ---- rules


def check(kernels: list[Kernel], rules: Mapping[str, Any]) -> list[str]:
    """Enter each kernel's errors into it; return those that belong to no kernel."""
    for kernel in kernels:
        kernel.errors.extend(broken_limits(kernel, rules["limits"].get(kernel.name)))
    errors = [f"limits for {n}: no such kernel" for n in rules["limits"] if n not in names(kernels)]
    for rule in rules["instructions"]:
        chosen = [kernel for kernel in kernels if applies(rule, kernel.name)]
        if not chosen:
            errors.append(f"instructions {rule['opcodes']}: no kernel matches {rule['kernels']}")
        for kernel in chosen:
            count = kernel.count(rule["opcodes"])
            low, high = rule.get("min", 0), rule.get("max", count)
            if not low <= count <= high:
                wanted = f"at most {high}" if count > high else f"at least {low}"
                kernel.errors.append(f"{count} {rule['opcodes']}, {wanted}: {rule['why']}")
    return errors


def names(kernels: Iterable[Kernel]) -> set[str]:
    """Return the kernels' names."""
    return {kernel.name for kernel in kernels}


def applies(rule: Mapping[str, Any], name: str) -> bool:
    """Say whether a rule about instructions is one about this kernel."""
    chosen, left_out = rule["kernels"], rule.get("except", [])
    return any(fnmatchcase(name, p) for p in chosen) and not any(
        fnmatchcase(name, p) for p in left_out
    )


def broken_limits(kernel: Kernel, limits: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what is wrong with a kernel's use of registers and memory."""
    if kernel.spilled_bytes:
        yield f"{kernel.spilled_bytes} bytes of registers spilled"
    if kernel.stack_bytes:
        yield f"{kernel.stack_bytes} bytes of stack"
    if local := kernel.count(r"(LDL|STL)\b.*"):
        yield f"{local} accesses to local memory"
    limit = (limits or {}).get(f"sm_{kernel.arch}")
    if limit is None:
        yield f"no limits in the rules for sm_{kernel.arch}"
        return
    if kernel.registers > limit["registers"]:
        yield f"{kernel.registers} registers, at most {limit['registers']}"
    if kernel.blocks < limit["blocks"]:
        yield f"{kernel.blocks} blocks per multiprocessor, at least {limit['blocks']}"


def updated(rules: Mapping[str, Any], kernels: list[Kernel], toolkit: str) -> str:
    """Return the rules' text with the kernels' own figures as limits; a rule or a kernel a line."""
    limits: dict[str, dict[str, Any]] = {name: {} for name in sorted(names(kernels))}
    for k in kernels:
        limits[k.name][f"sm_{k.arch}"] = {"registers": round_up(k.registers, 8), "blocks": k.blocks}
    instructions = ",\n".join(f"    {json.dumps(rule)}" for rule in rules["instructions"])
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(of)}" for name, of in limits.items())
    return (
        f'{{\n  "threads": {rules["threads"]},\n  "toolkit": "{toolkit}",\n'
        f'  "instructions": [\n{instructions}\n  ],\n  "limits": {{\n{lines}\n  }}\n}}\n'
    )


# ---- the program


def table(kernels: list[Kernel], errors: list[str]) -> Iterator[str]:
    """Yield one line per kernel and architecture, and below it what is wrong."""
    width = max((len(kernel.name) for kernel in kernels), default=0)
    yield (
        f"     {'kernel':{width}}  arch    regs  blocks  shared  spilled  code  ld128  st128  ffma"
    )
    for k in kernels:
        loads, stores = k.count(r"LDG?\.E\..*128.*"), k.count(r"STG?\.E\..*128.*")
        yield (
            f"{'FAIL' if k.errors else 'ok  '} {k.name:{width}}  sm_{k.arch:4} {k.registers:4}"
            f"{k.blocks:8}{k.shared_bytes:8}{k.spilled_bytes:9}{k.opcodes.total():6}"
            f"{loads:7}{stores:7}{k.count('FFMA.*'):6}"
        )
        yield from (f"       {error}" for error in k.errors)
    yield from (f"FAIL {error}" for error in errors)


def write_json(path: Path, kernels: list[Kernel]) -> None:
    """Write all figures, a kernel a line, so that two files can be compared with diff."""
    rows = (json.dumps({**vars(k), "opcodes": dict(sorted(k.opcodes.items()))}) for k in kernels)
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n", "utf-8")


def measured(
    sources: Path, archs: Iterable[str], nvcc: Path, folder: Path, threads: int
) -> list[Kernel]:
    """Return all kernels below `sources`, by name, for each of the architectures."""
    nvdisasm = find_nvdisasm(nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    key = content_key(sources, nvcc)
    kernels: list[Kernel] = []
    for arch in archs:
        for source in sorted(sources.rglob("*.cu")):
            cubin, log = compiled(source, arch, nvcc, folder, key)
            kernels.extend(kernels_of(cubin, log, arch, nvdisasm))
    for k in kernels:
        k.blocks = MULTIPROCESSORS[k.arch].resident_blocks(threads, k.registers, k.shared_bytes)
    return sorted(kernels, key=lambda k: (k.name, int(k.arch)))


def main() -> int:
    """Compile, disassemble, check, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for compiled kernels; kept between calls")
    parser.add_argument("--arch", nargs="+", choices=MULTIPROCESSORS, default=[*MULTIPROCESSORS])
    parser.add_argument("--sources", type=Path, default=REPOSITORY / "csrc")
    parser.add_argument("--rules", type=Path, default=RULES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--update", action="store_true", help="write the figures as new limits")
    options = parser.parse_args()
    if options.update and set(options.arch) != set(MULTIPROCESSORS):
        parser.error("--update needs all architectures")
    rules = json.loads(options.rules.read_text("utf-8"))
    try:
        nvcc = find_nvcc()
        if nvcc is None:
            raise CheckError("no nvcc in PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
        toolkit = "{}.{}".format(*toolkit_version(nvcc))
        kernels = measured(options.sources, options.arch, nvcc, options.folder, rules["threads"])
    except CheckError as error:
        print(f"check_sass.py: {error}", file=sys.stderr)
        return 2
    if options.update:
        options.rules.write_text(updated(rules, kernels, toolkit), "utf-8")
        rules = json.loads(options.rules.read_text("utf-8"))
    errors = check(kernels, rules)
    print("\n".join(table(kernels, errors)))
    if toolkit != rules["toolkit"]:
        print(f"(toolkit {toolkit}; the limits were taken with {rules['toolkit']})")
    if options.json is not None:
        write_json(options.json, kernels)
    return int(bool(errors) or any(kernel.errors for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
