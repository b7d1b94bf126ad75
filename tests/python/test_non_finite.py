"""Inf and NaN on one rank: every rank sees NaN in that bucket, the optimizer skips the step, and the residual loses nothing."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
from ddp_models import (
    SHAPES,
    Case,
    Oracle,
    add_hook,
    assert_residuals,
    assert_same_bits,
    both_entries,
    both_scopes,
    build,
    gradients_on,
    integers,
    replace_in,
)
from stage_cases import each_value_format
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState

BAD_STEP = 3


def train_and_look_at_residuals(
    rank: int, world_size: int, case: Case, rolled_back: int | None
) -> list[tuple[dict[str, Tensor | None], dict[str, Tensor]]]:
    model, state = build(case)
    seen = []
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        if step == rolled_back:
            state.rollback()
        look_every_step = rolled_back is None or step >= rolled_back
        seen.append(
            (gradients_on(model), state.state_dict()["residuals"] if look_every_step else {})
        )
    return seen


in_compressed_and_dense = pytest.mark.parametrize(
    "name", ["second_weight", "third_bias"], ids=["in_a_compressed_parameter", "in_a_dense_one"]
)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@in_compressed_and_dense
@both_scopes
@both_entries
def test_one_ranks_non_finite_value_makes_the_bucket_nan_on_every_rank_and_is_undone_in_all_buckets(
    entry: str, scope: str, name: str, value: float
) -> None:
    check_a_bad_step(entry, {"scope": scope}, name, value)


@pytest.mark.parametrize("value_format", ["fp32", "sign"])
@in_compressed_and_dense
@both_entries
def test_the_same_with_the_other_value_formats(entry: str, name: str, value_format: str) -> None:
    check_a_bad_step(entry, {"value_format": value_format}, name, math.inf)


def check_a_bad_step(entry: str, state: dict[str, str], name: str, value: float) -> None:
    bad = {(name, 1, BAD_STEP): value}
    case = Case(entry, 6, gradients_of=replace_in(integers, bad), state=state)
    seen = ranks.run(2, train_and_look_at_residuals, case, None)
    # DDP's buckets from the second step on, as ddp_models.SMALL_BUCKETS cuts them.
    buckets = [
        ["third_bias", "third_weight"],
        ["tiny_weight", "second_weight"],
        ["first_bias", "first_weight"],
    ]
    oracle = Oracle(case, 2)
    for step in range(case.steps):
        expected = oracle.step([case.gradients(rank, step) for rank in range(2)], buckets)
        for rank in range(2):
            gradients, residuals = seen[rank][step]
            for parameter in SHAPES:
                assert_same_bits(
                    gradients[parameter],
                    expected[parameter],
                    f"{parameter} on rank {rank} in step {step}",
                )
            if residuals:
                assert_residuals(residuals, oracle, rank)
    nan_in = {
        parameter for parameter, gradient in seen[0][BAD_STEP][0].items() if gradient.isnan().all()
    }
    assert nan_in == next(set(bucket) for bucket in buckets if name in bucket)
    assert not any(gradient.isnan().any() for gradient in seen[0][BAD_STEP + 1][0].values())


@each_value_format
@both_entries
def test_rollback_gives_back_what_a_good_step_sent(entry: str, value_format: str) -> None:
    case = Case(entry, 5, gradients_of=integers, state={"value_format": value_format})
    seen = ranks.run(2, train_and_look_at_residuals, case, 3)
    oracle = Oracle(case, 2)
    for step in range(case.steps):
        before = [dict(residuals) for residuals in oracle.residuals]
        given = [case.gradients(rank, step) for rank in range(2)]
        expected = oracle.step(given)
        if step == 3:
            oracle.rollback(given)
            for rank in range(2):
                for name, residual in oracle.residuals[rank].items():
                    torch.testing.assert_close(
                        residual,
                        before[rank][name] + given[rank][name],
                        rtol=0,
                        atol=1e-5 if value_format == "sign" else 0,
                    )
        for rank in range(2):
            gradients, residuals = seen[rank][step]
            for name in SHAPES:
                assert_same_bits(gradients[name], expected[name], f"{name} in step {step}")
            if residuals:
                assert_residuals(residuals, oracle, rank)


@both_entries
def test_a_non_finite_value_in_a_dense_step_reaches_every_rank_and_leaves_no_trace(
    entry: str,
) -> None:
    case = Case(entry, 4, gradients_of=replace_in(integers, {("second_weight", 0, 1): math.inf}))
    seen = ranks.run(2, train_and_look_at_residuals, case, None)
    oracle = Oracle(case, 2)
    for step in range(case.steps):
        expected = oracle.step([case.gradients(rank, step) for rank in range(2)])
        for rank in range(2):
            assert_same_bits(
                seen[rank][step][0]["second_weight"], expected["second_weight"], f"step {step}"
            )
    assert_residuals(seen[0][-1][1], oracle, 0)


def train_with_a_scaler(
    rank: int, world_size: int, entry: str
) -> tuple[list[float], list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(64, 32))
    state = TopKEFState(exchange="allgather", density=0.1, dense_steps=1)
    add_hook(model, state, entry)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scales, weights = [], []
    for step in range(6):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(2 * step + rank))
        if step == 3 and rank == 1:
            inputs[0, 0] = math.inf
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        weights.append(model.module.weight.detach().clone())
    return scales, weights, state.state_dict()["residuals"]


@both_entries
def test_grad_scaler_skips_the_step_on_every_rank_and_training_goes_on(entry: str) -> None:
    (scales, weights, residuals), other = ranks.run(2, train_with_a_scaler, entry)
    assert scales == other[0] == [8.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    assert torch.equal(weights[3], weights[2]), "the step was skipped"
    assert not torch.equal(weights[4], weights[3]) and weights[-1].isfinite().all()
    assert residuals["weight"].isfinite().all()
    for ours, theirs in zip(weights, other[1]):
        assert_same_bits(ours, theirs, "replicas")
