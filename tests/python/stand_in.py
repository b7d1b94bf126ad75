"""Imported before compressed_ddp: with COMPRESSED_DDP_STAND_IN=FILE, puts that build of `_C` in its place.

It is the module in which CPU tensors take the CUDA path, with the kernels' PTX interpreted
(tests/cpp/cuda). The whole package above it is the one that is tested everywhere else.
"""

import importlib.util
import os
import sys

import pytest
import torch  # noqa: F401  its libraries must be loaded before a module that needs them

PATH = os.environ.get("COMPRESSED_DDP_STAND_IN")

if PATH is not None and "compressed_ddp._C" not in sys.modules:
    spec = importlib.util.spec_from_file_location("compressed_ddp._C", PATH)
    if spec is None or spec.loader is None:
        raise ImportError(f"COMPRESSED_DDP_STAND_IN={PATH!r} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["compressed_ddp._C"] = module

host_contract = pytest.mark.skipif(
    PATH is not None,
    reason="the CUDA path learns of a hostile payload later, and answers with NaN: test_failures.py tests that",
)
too_slow = pytest.mark.skipif(PATH is not None, reason="takes minutes when kernels are interpreted")
