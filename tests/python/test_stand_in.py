"""The CUDA path without a GPU: with COMPRESSED_DDP_STAND_IN, the tests of the hook run on it; here, that they really do.

`make test` runs the files named in the Makefile once more in that way. Without the variable there is nothing to test here.
"""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import ranks
import stand_in
import torch

pytestmark = pytest.mark.skipif(
    stand_in.PATH is None,
    reason="COMPRESSED_DDP_STAND_IN names no module (make test-without-gpu does)",
)


def calls_of_one_step(rank, world_size):
    import compressed_ddp

    calls = ctypes.CDLL(compressed_ddp._native._C.__file__).compressed_ddp_stand_in_calls
    calls.restype = ctypes.c_uint64
    before = calls()
    state = compressed_ddp.TopKEFState(exchange="allgather", density=0.1, dense_steps=0)
    tensor = torch.arange(5000.0)
    compressed_ddp.all_reduce_(tensor, state, name="x")
    return compressed_ddp._native._C.__file__, calls() - before, torch.cuda.is_initialized()


def test_the_stages_run_on_the_stand_in_and_the_real_runtime_is_left_alone():
    for path, calls, cuda_is_initialized in ranks.run(2, calls_of_one_step):
        assert path == stand_in.PATH
        assert calls > 10  # six launches or fewer, their buffers, copies and waits
        assert not cuda_is_initialized


def test_the_module_takes_no_symbol_of_the_runtime_from_elsewhere():
    listed = subprocess.run(
        ["nm", "-D", str(stand_in.PATH)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert "compressed_ddp_stand_in_calls" in names
    assert [name for name in names if name.startswith(("cuda", "__cuda"))] == []
