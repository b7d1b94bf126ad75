"""`python -m compressed_ddp.info`: the report and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import compressed_ddp
from compressed_ddp._native import _C


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def info() -> subprocess.CompletedProcess[str]:
    return report("-m", "compressed_ddp.info")


def test_it_ends_with_0_and_without_a_word_on_stderr_where_the_package_works(info):
    assert (info.returncode, info.stderr) == (0, ""), info.stdout


def test_it_says_what_is_installed_and_that_the_stages_agree(info):
    lines = dict(line.split(":", 1) for line in info.stdout.splitlines())
    values = {label: value.strip() for label, value in lines.items()}
    assert values["torch"] == torch.__version__
    assert values["compressed_ddp"] == compressed_ddp.__version__
    assert values["built against torch"] == _C.torch_version
    assert values["instruction set"] == _C.instruction_set
    assert values["compiled module"] == _C.__file__
    assert values["wire format version"] == str(_C.wire_version)
    assert values["engine"].startswith("CPU and CUDA" if _C.built_with_cuda else "CPU, built")
    assert values["self check"].startswith("passed")
    assert "values as fp32, bf16 and sign" in values["self check"]
    assert "FAILED" not in info.stdout


BROKEN_PAYLOADS = """
import sys
from compressed_ddp import info, reference
reference.encode = lambda *arguments, **options: __import__("torch").zeros(64)
sys.exit(info.main())
"""
NO_PACKAGE = """
import sys
from compressed_ddp import info
sys.modules["torch"] = None
sys.exit(info.main())
"""


@pytest.mark.parametrize(
    ("program", "words"),
    [
        pytest.param(BROKEN_PAYLOADS, "self check:", id="self-check"),
        pytest.param(NO_PACKAGE, "torch:", id="import"),
    ],
)
def test_a_failed_probe_is_a_line_of_the_report_and_exit_code_1(program, words):
    failed = report("-c", program)
    assert failed.returncode == 1
    (line,) = [line for line in failed.stdout.splitlines() if "FAILED" in line]
    assert line.startswith(words)
    assert "Traceback" not in failed.stdout + failed.stderr


# ---- where the package cannot be imported

TORCHES = {  # __init__.py of a torch that comes first on the path, and what is said about it
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        "compressed_ddp needs torch >= 2.11, which is not installed; run `pip install 'torch>=2.11'`, then rebuild it",
    ),
    "too-old": (
        "__version__ = '2.10.1+cpu'",
        "compressed_ddp needs torch >= 2.11, but torch 2.10.1 is installed; run `pip install 'torch>=2.11'`, then rebuild it",
    ),
    "another": (
        "__version__ = '2.99.0'",
        f"compressed_ddp was built against torch {_C.torch_version}, but torch 2.99.0 is installed; rebuild it",
    ),
}


@pytest.fixture(params=TORCHES)
def torch_and_words(request, tmp_path) -> tuple[str, str, dict[str, str]]:
    code, words = TORCHES[request.param]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    return request.param, words, {"PYTHONPATH": str(tmp_path)}


def test_without_its_torch_the_import_fails_with_one_line_and_the_remedy(torch_and_words):
    _, words, environment = torch_and_words
    for module in ("compressed_ddp", "compressed_ddp.info", "compressed_ddp.ops"):
        failed = report("-c", f"import {module}", **environment)
        assert failed.returncode == 1
        lines = failed.stderr.splitlines()
        assert lines[-1].startswith(f"ImportError: {words}")
        assert sum("Error" in line for line in lines if not line.startswith(" ")) == 1, (
            "no second exception before or behind it"
        )


def test_without_its_torch_the_report_says_why_and_ends_with_1(torch_and_words):
    case, words, environment = torch_and_words
    failed = report("-m", "compressed_ddp.info", **environment)
    assert (failed.returncode, failed.stderr) == (1, "")
    lines = dict(line.split(":", 1) for line in failed.stdout.splitlines())
    values = {label: value.strip() for label, value in lines.items()}
    if case == "missing":
        assert values["torch"] == "FAILED: ModuleNotFoundError: No module named 'torch'"
    else:
        assert values["torch"] in TORCHES[case][0]
    assert values["compressed_ddp"] == compressed_ddp.__version__
    assert values["built against torch"] == _C.torch_version
    assert values["compiled module"].startswith(f"FAILED: ImportError: {words}")
