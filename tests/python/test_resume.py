"""Saved and resumed in new processes, a run equals one that was never interrupted, bit for bit: model, optimizer, hook state."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
import ranks
import torch
from ddp_models import assert_same_bits, both_entries
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, register, topk_ef_hook

STEPS = 8
DENSE_STEPS = 2


@dataclasses.dataclass
class Plan:
    """Steps begin..end of a run that goes on from `folder` unless it begins at 0, and is saved there."""

    entry: str
    folder: str
    begin: int
    end: int
    scope: str = "tensor"
    ddp: dict[str, Any] = dataclasses.field(default_factory=lambda: {"bucket_cap_mb": 0.02})
    load_before_register: bool = False


@dataclasses.dataclass
class End:
    weights: dict[str, Tensor]
    momenta: list[Tensor]
    state: dict[str, Any]


def train(rank: int, world_size: int, plan: Plan) -> End:
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)
    )
    model = DistributedDataParallel(net, **plan.ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    state = TopKEFState(
        exchange="allgather", density=0.02, dense_steps=DENSE_STEPS, scope=plan.scope
    )
    path = pathlib.Path(plan.folder) / f"rank{rank}.pt"

    def load() -> None:
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.load_state_dict(saved["hook"])

    if plan.begin > 0 and plan.load_before_register:
        load()  # the state then waits for the names
    if plan.entry == "cpp":
        register(model, state)
    else:
        model.register_comm_hook(state.bind(model), topk_ef_hook)
    if plan.begin > 0 and not plan.load_before_register:
        load()
    assert state.step == plan.begin
    for step in range(plan.begin, plan.end):
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs, targets = (
            torch.randn(16, 48, generator=generator),
            torch.randn(16, 32, generator=generator),
        )
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    torch.save(
        {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "hook": state.state_dict(),
        },
        path,
    )
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    return End(dict(net.state_dict()), momenta, state.state_dict())


def assert_same_end(actual: list[End], expected: list[End]) -> None:
    for ours, theirs, rank in zip(actual, expected, range(len(expected))):
        for name, weight in theirs.weights.items():
            assert_same_bits(ours.weights[name], weight, f"{name} on rank {rank}")
        for ours_momentum, theirs_momentum in zip(ours.momenta, theirs.momenta):
            assert_same_bits(ours_momentum, theirs_momentum, f"momentum on rank {rank}")
        assert {**ours.state, "residuals": None} == {**theirs.state, "residuals": None}
        assert (
            ours.state["residuals"].keys()
            == theirs.state["residuals"].keys()
            == {"0.weight", "2.weight", "4.weight"}
        )
        for name, residual in theirs.state["residuals"].items():
            assert_same_bits(
                ours.state["residuals"][name], residual, f"residual of {name} on rank {rank}"
            )


@pytest.mark.parametrize("load_before_register", [False, True], ids=["load_last", "load_first"])
@pytest.mark.parametrize(
    "at", [1, DENSE_STEPS, 5], ids=["within_dense_steps", "at_their_end", "after_them"]
)
@both_entries
def test_a_resumed_run_equals_an_uninterrupted_one(
    entry: str, at: int, load_before_register: bool, tmp_path: pathlib.Path
) -> None:
    plan = Plan(entry, str(tmp_path), 0, STEPS)
    uninterrupted = ranks.run(2, train, plan)
    ranks.run(2, train, dataclasses.replace(plan, end=at))
    resumed = ranks.run(
        2, train, dataclasses.replace(plan, begin=at, load_before_register=load_before_register)
    )
    assert_same_end(resumed, uninterrupted)
    for name, weight in resumed[0].weights.items():
        assert_same_bits(weight, resumed[1].weights[name], "replicas")


@pytest.mark.parametrize("bucket_cap_mb", [0.001, 25])
@both_entries
def test_scope_tensor_resumes_bitwise_with_other_buckets(
    entry: str, bucket_cap_mb: float, tmp_path: pathlib.Path
) -> None:
    plan = Plan(entry, str(tmp_path), 0, STEPS)
    uninterrupted = ranks.run(2, train, plan)
    ranks.run(2, train, dataclasses.replace(plan, end=5))
    resumed = ranks.run(
        2, train, dataclasses.replace(plan, begin=5, ddp={"bucket_cap_mb": bucket_cap_mb})
    )
    assert_same_end(resumed, uninterrupted)


@both_entries
def test_scope_bucket_resumes_bitwise_where_ddp_keeps_its_buckets(
    entry: str, tmp_path: pathlib.Path
) -> None:
    """With find_unused_parameters DDP has the same buckets from the first step on."""
    plan = Plan(
        entry,
        str(tmp_path),
        0,
        STEPS,
        "bucket",
        {"bucket_cap_mb": 0.02, "find_unused_parameters": True},
    )
    uninterrupted = ranks.run(2, train, plan)
    ranks.run(2, train, dataclasses.replace(plan, end=5))
    assert_same_end(ranks.run(2, train, dataclasses.replace(plan, begin=5)), uninterrupted)


@both_entries
def test_scope_bucket_resumes_with_its_residuals_where_the_buckets_differ(
    entry: str, tmp_path: pathlib.Path
) -> None:
    """A resumed DDP has one bucket in its first step, so the selection differs; the residuals are there all the same."""
    plan = Plan(entry, str(tmp_path), 0, STEPS, "bucket")
    ranks.run(2, train, plan)
    saved = ranks.run(2, train, dataclasses.replace(plan, end=5))
    only_loaded = ranks.run(
        2, train, dataclasses.replace(plan, begin=5, end=5, ddp={"bucket_cap_mb": 0.001})
    )
    assert_same_end(only_loaded, saved)
    resumed = ranks.run(2, train, dataclasses.replace(plan, begin=5, ddp={"bucket_cap_mb": 0.001}))
    assert all(end.state["step"] == STEPS for end in resumed)
    for name, weight in resumed[0].weights.items():
        assert_same_bits(weight, resumed[1].weights[name], "replicas")


@both_entries
def test_the_hook_state_matters(entry: str, tmp_path: pathlib.Path) -> None:
    """Otherwise the tests above would say nothing about it."""
    plan = Plan(entry, str(tmp_path), 0, STEPS)
    uninterrupted = ranks.run(2, train, plan)
    ranks.run(2, train, dataclasses.replace(plan, end=5))
    for rank in range(2):
        path = tmp_path / f"rank{rank}.pt"
        saved = torch.load(path, weights_only=True)
        for residual in saved["hook"]["residuals"].values():
            residual.zero_()
        torch.save(saved, path)
    without_residuals = ranks.run(2, train, dataclasses.replace(plan, begin=5))
    assert not torch.equal(
        without_residuals[0].weights["2.weight"], uninterrupted[0].weights["2.weight"]
    )
