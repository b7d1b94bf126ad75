"""`python -m compressed_ddp.info`: the report and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import compressed_ddp
from compressed_ddp._native import _C


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    assert values["wire format version"] == str(_C.wire_version)
    assert values["self check"].startswith("passed")
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
