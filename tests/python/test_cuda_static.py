"""The machine code of the CUDA kernels keeps the rules of tests/cuda_static, and the checker notices where some do not."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CHECKER = REPOSITORY / "tests" / "cuda_static" / "check_sass.py"
sys.path.insert(0, str(CHECKER.parent))  # a script, not a package

import check_sass  # noqa: E402

REQUIRE_TOOLKIT = os.environ.get("COMPRESSED_DDP_REQUIRE_CUDA_TOOLKIT") == "1"
OLDEST_TOOLKIT = (12, 8)  # csrc/cuda/toolkit.cmake

# Kernels below keep or break these.
RULES = {
    "threads": 256,
    "toolkit": "1.0",
    "instructions": [
        {"kernels": ["*"], "opcodes": "FFMA.*", "max": 0, "why": "sums round twice"},
        {"kernels": ["axpy_*"], "opcodes": "LDG.*128.*", "min": 2, "why": "it streams"},
    ],
    "limits": {"axpy_kernel": {"sm_90": {"registers": 32, "blocks": 8}}},
}
AXPY = """
__global__ void axpy_kernel(float4* y, const float4* x) {
  const float4 a = x[threadIdx.x], b = y[threadIdx.x];
  y[threadIdx.x] = {2.5f * a.x + b.x, 2.5f * a.y + b.y, 2.5f * a.z + b.z, 2.5f * a.w + b.w};
}
"""
AXPY_FUSED = AXPY.replace("2.5f * a.x + b.x", "__fmaf_rn(2.5f, a.x, b.x)")
AXPY_BY_ENTRY = """
__global__ void axpy_kernel(float* y, const float* x) { y[threadIdx.x] += 2.5f * x[threadIdx.x]; }
"""
# 64 values that are all needed in every turn, in 32 registers.
AXPY_SPILLED = """
__global__ void __launch_bounds__(1024, 2) axpy_kernel(float* y, const float4* x, int n) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = y[i * n + threadIdx.x];
  for (int j = 0; j < n; ++j) {
    const float4 a = x[2 * j], b = x[2 * j + 1];
    for (int i = 0; i < 64; ++i) v[i] = v[i] * (i % 2 ? a.x : b.y) + v[(i + 7) % 64];
  }
  for (int i = 0; i < 64; ++i) y[i * n + threadIdx.x] = v[i];
}
"""


@pytest.fixture(scope="module", autouse=True)
def _toolkit() -> None:
    """Skips without a CUDA toolkit of the right age; fails where one is required."""
    nvcc = check_sass.find_nvcc()
    if nvcc is None:
        reason = "needs the CUDA toolkit: no nvcc in PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda"
    elif check_sass.toolkit_version(nvcc) < OLDEST_TOOLKIT:
        reason = f"needs CUDA toolkit 12.8 or newer, {nvcc} is older"
    else:
        return
    if REQUIRE_TOOLKIT:
        pytest.fail(f"COMPRESSED_DDP_REQUIRE_CUDA_TOOLKIT=1: {reason}", pytrace=False)
    pytest.skip(reason)


def run_checker(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the checker as CI does."""
    command = [sys.executable, str(CHECKER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def check_text(
    folder: pathlib.Path, text: str, **changed_rules: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the checker on one source file, with RULES but for those that are named."""
    (folder / "axpy.cu").write_text(text, "utf-8")
    (folder / "rules.json").write_text(json.dumps({**RULES, **changed_rules}), "utf-8")
    return run_checker(
        folder / "build", "--arch", "90", "--sources", folder, "--rules", folder / "rules.json",
        "--json", folder / "figures.json",
    )  # fmt: skip


# ---- the kernels


@pytest.mark.slow
@pytest.mark.parametrize("arch", check_sass.MULTIPROCESSORS)
def test_machine_code_keeps_the_rules(arch: str) -> None:
    done = run_checker(REPOSITORY / "build" / "sass", "--arch", arch)
    assert done.returncode == 0, "\n" + done.stdout + done.stderr


def test_rules_and_flags_are_those_of_the_build() -> None:
    rules = json.loads(check_sass.RULES.read_text("utf-8"))
    plan = (REPOSITORY / "csrc" / "cuda" / "plan.h").read_text("utf-8")
    assert f"constexpr int kThreads = {rules['threads']};" in plan

    cmake = (REPOSITORY / "csrc" / "CMakeLists.txt").read_text("utf-8")
    assert "PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -lineinfo" in cmake
    assert "$<$<BOOL:${COMPRESSED_DDP_WERROR}>:-Werror=all-warnings>>" in cmake
    assert "CUDA_STANDARD 20" in cmake
    assert {"--fmad=false", "-lineinfo", "-Werror=all-warnings", "-std=c++20"} < {*check_sass.FLAGS}

    toolkit = (REPOSITORY / "csrc" / "cuda" / "toolkit.cmake").read_text("utf-8")
    for arch in check_sass.MULTIPROCESSORS:
        assert f" {arch}-real " in toolkit or f" {arch}\n" in toolkit


# ---- the checker


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "blocks"),
    [
        ("80", 32, 0, 8),
        ("80", 33, 0, 6),
        ("90", 64, 0, 4),
        ("90", 65, 0, 3),
        ("80", 40, 34820, 4),
        ("90", 40, 34820, 6),
        ("120", 40, 34820, 2),
        ("120", 16, 0, 6),
    ],
)
def test_resident_blocks_are_those_of_cuda_occupancy_h(
    arch: str, registers: int, shared_bytes: int, blocks: int
) -> None:
    multiprocessor = check_sass.MULTIPROCESSORS[arch]
    assert multiprocessor.resident_blocks(256, registers, shared_bytes) == blocks


def test_a_kernel_that_keeps_the_rules_passes_and_is_compiled_once(tmp_path: pathlib.Path) -> None:
    done = check_text(tmp_path, AXPY)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert (figures["name"], figures["arch"], figures["blocks"]) == ("axpy_kernel", "90", 8)
    assert figures["opcodes"]["FMUL"] == figures["opcodes"]["FADD"] == 4

    (cubin,) = (tmp_path / "build").glob("*.cubin")
    compiled_at = cubin.stat().st_mtime_ns
    assert check_text(tmp_path, AXPY).stdout == done.stdout
    assert cubin.stat().st_mtime_ns == compiled_at
    check_text(tmp_path, AXPY_FUSED)
    assert not cubin.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXPY_FUSED, "1 FFMA.*, at most 0: sums round twice"),
        (AXPY_BY_ENTRY, "0 LDG.*128.*, at least 2: it streams"),
        (AXPY_SPILLED, "bytes of registers spilled"),
        (AXPY_SPILLED, "accesses to local memory"),
        (AXPY.replace("axpy", "axpy_2"), "no limits in the rules for sm_90"),
        (AXPY.replace("axpy", "axpy_2"), "limits for axpy_kernel: no such kernel"),
        (AXPY.replace("axpy", "other"), "instructions LDG.*128.*: no kernel matches ['axpy_*']"),
    ],
)
def test_a_kernel_that_breaks_a_rule_fails(tmp_path: pathlib.Path, text: str, message: str) -> None:
    done = check_text(tmp_path, text)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout


def test_limits_are_the_least_that_passes(tmp_path: pathlib.Path) -> None:
    limits = {"axpy_kernel": {"sm_90": {"registers": 8, "blocks": 9}}}
    done = check_text(tmp_path, AXPY, limits=limits)
    assert done.returncode == 1
    assert "registers, at most 8" in done.stdout
    assert "8 blocks per multiprocessor, at least 9" in done.stdout


def test_what_does_not_compile_is_no_broken_rule(tmp_path: pathlib.Path) -> None:
    done = check_text(tmp_path, "__global__ void axpy_kernel() { int unused_variable; }\n")
    assert done.returncode == 2
    assert "unused_variable" in done.stderr  # a warning, which is an error here as in CI
