"""Marks and skips, in one place. A skip for a missing device becomes a failure where the device is required."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest
import torch

sys.path.insert(
    0, str(pathlib.Path(__file__).parent)
)  # `import ranks`, in this process and in forked ranks

import ranks
import stand_in  # noqa: F401  before anything imports compressed_ddp

# Threads that spin for one another cost a multiple of the work itself where others use the cores, too.
torch.set_num_threads(1)

REQUIRE_CUDA = os.environ.get("COMPRESSED_DDP_REQUIRE_CUDA") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") is None or torch.cuda.is_available():
        return
    if REQUIRE_CUDA:
        pytest.fail("COMPRESSED_DDP_REQUIRE_CUDA=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed per test, the same in every run, printed so that a failure can be repeated."""
    value = int.from_bytes(request.node.name.encode()[-4:], "little") % 2**31
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="module")
def pools() -> Iterator[ranks.Pools]:
    """Ranks that stay alive from test to test of a file: pools.run(world_size, function, *args)."""
    made = ranks.Pools()
    yield made
    made.close()
