"""Ranks that disagree: a RuntimeError on every rank that names field, ranks and values; no hang, no abort, residuals as before."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import stand_in
import torch
from ddp_models import (
    SHAPES,
    SMALL_BUCKETS,
    Case,
    GivenGradients,
    Oracle,
    add_hook,
    assert_same_bits,
    both_entries,
    gradients_on,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, all_reduce_gradients


@dataclasses.dataclass
class Outcome:
    """What one rank saw."""

    message: str  # of the RuntimeError
    seconds: float
    residuals_before: dict[str, Tensor]
    residuals_after: dict[str, Tensor]
    gradients_of_a_fresh_run: list[dict[str, Tensor | None]]


def checkpoint(rank: int, world_size: int, step: int) -> dict[str, Any]:
    residuals = {
        name: torch.full(SHAPES[name], float(rank + 1))
        for name in ("first_weight", "second_weight", "third_weight")
    }
    return {
        "version": 1,
        "rank": rank,
        "world_size": world_size,
        "step": step,
        "residuals": residuals,
    }


def error_of(action: Any) -> tuple[str, float]:
    start = time.monotonic()
    try:
        action()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("the ranks disagree, but nothing was raised")


def fresh_run(rank: int, case: Case) -> list[dict[str, Tensor | None]]:
    """In the same group, after the disagreement."""
    model = DistributedDataParallel(GivenGradients(case), **SMALL_BUCKETS)
    add_hook(model, TopKEFState(**case.options()), case.entry)
    gradients = []
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        gradients.append(gradients_on(model))
    return gradients


def assert_clear_and_harmless(outcomes: list[Outcome], case: Case, *words: str) -> None:
    oracle = Oracle(case, len(outcomes))
    expected = [
        oracle.step([case.gradients(rank, step) for rank in range(len(outcomes))])
        for step in range(case.steps)
    ]
    for outcome in outcomes:
        assert outcome.message == outcomes[0].message, "every rank says the same"
        for word in words:
            assert re.search(word, outcome.message), f"{word!r} is not in: {outcome.message}"
        assert "Exception raised from" not in outcome.message
        assert outcome.seconds < 10, "well within the group's timeout"
        assert outcome.residuals_before.keys() == outcome.residuals_after.keys()
        for name, residual in outcome.residuals_before.items():
            assert_same_bits(outcome.residuals_after[name], residual, name)
        for step, gradients in enumerate(outcome.gradients_of_a_fresh_run):
            for name, gradient in gradients.items():
                assert_same_bits(
                    gradient, expected[step][name], f"{name} in step {step} of the fresh run"
                )


FRESH = {"density": 0.05, "dense_steps": 1}


def disagree_about_options(
    rank: int,
    world_size: int,
    entry: str,
    options: list[dict[str, Any]],
    start_steps: list[int | None],
) -> Outcome:
    model = DistributedDataParallel(GivenGradients(Case()), **SMALL_BUCKETS)
    state = TopKEFState(**{"exchange": "allgather", **options[rank]})
    add_hook(model, state, entry)
    start_step = start_steps[rank]
    if start_step is not None:
        state.load_state_dict(checkpoint(rank, world_size, start_step))
    before = state.state_dict()["residuals"]
    message, seconds = error_of(lambda: model(Case().gradients(rank, 0)).backward())
    after = state.state_dict()["residuals"]
    again, _ = error_of(
        lambda: model(Case().gradients(rank, 1)).backward()
    )  # nor does the second try
    assert "disagree" in again
    return Outcome(message, seconds, before, after, fresh_run(rank, Case(entry, 3, state=FRESH)))


def half(step: int) -> float:
    return 0.5


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "density": ({"density": 0.05}, {"density": 0.1}, r"density: rank 0 has 0\.05, rank 1 has 0\.1"),
    "density_by_a_hair": (
        {"density": 0.1},
        {"density": 0.1 + 1e-16},
        r"density: rank 0 has 0\.1, rank 1 has 0\.10+\d",
    ),
    "callable_density": (
        {"density": half},
        {"density": 0.5},
        "density is a callable: rank 0 has True, rank 1 has False",
    ),
    "scope": (
        {"scope": "bucket"},
        {"scope": "tensor"},
        "scope: rank 0 has bucket, rank 1 has tensor",
    ),
    "value_format": (
        {"value_format": "sign"},
        {},
        "value_format: rank 0 has sign, rank 1 has bf16",
    ),
    "exempt": ({}, {"exempt": ["^second"]}, r"exempt .*: rank 0 has \w+, rank 1 has \w+"),
    "dense_steps": (
        {"dense_steps": 1},
        {"dense_steps": 2},
        "dense_steps: rank 0 has 1, rank 1 has 2",
    ),
    "min_compress_numel": (
        {"min_compress_numel": 2**10},
        {"min_compress_numel": 2000},
        "min_compress_numel: rank 0 has 1024, rank 1 has 2000",
    ),
    "error_feedback": (
        {},
        {"error_feedback": False},
        "error_feedback: rank 0 has True, rank 1 has False",
    ),
}


@pytest.mark.parametrize("start_step", [None, 5], ids=["at_step_0", "after_a_load"])
@pytest.mark.parametrize("option", OPTIONS)
@both_entries
def test_another_option_on_one_rank(entry: str, option: str, start_step: int | None) -> None:
    on_rank_0, on_rank_1, words = OPTIONS[option]
    options = [{"density": 0.05, **on_rank_0}, {"density": 0.05, **on_rank_1}]
    if start_step is None and option in ("density", "density_by_a_hair"):
        options = [{**given, "dense_steps": 0} for given in options]
    outcomes = ranks.run(2, disagree_about_options, entry, options, [start_step] * 2)
    assert_clear_and_harmless(
        outcomes,
        Case(steps=3, state=FRESH),
        words,
        "begins with '\\w+'",
        "Nothing was sent and no residual changed",
    )


@both_entries
def test_dense_on_one_rank_and_sparse_on_the_other(entry: str) -> None:
    options = [{"dense_steps": 0}, {"dense_steps": 2}]
    outcomes = ranks.run(2, disagree_about_options, entry, options, [None, None])
    assert_clear_and_harmless(
        outcomes, Case(steps=3, state=FRESH), "dense_steps: rank 0 has 0, rank 1 has 2"
    )


@both_entries
def test_three_ranks_of_which_the_last_differs_in_two_options(entry: str) -> None:
    options = [
        {"dense_steps": 0},
        {"dense_steps": 0},
        {"dense_steps": 0, "density": 0.5, "scope": "bucket"},
    ]
    outcomes = ranks.run(3, disagree_about_options, entry, options, [None] * 3)
    case = Case(steps=3, state={**FRESH, "dense_steps": 0})
    for outcome in outcomes:
        outcome.gradients_of_a_fresh_run = []  # dense steps of three ranks have no fixed order of summation
    assert_clear_and_harmless(
        outcomes,
        case,
        r"density: rank 0 has 0\.01, rank 2 has 0\.5",
        "scope: rank 0 has tensor, rank 2 has bucket",
    )
    assert "rank 1 has" not in outcomes[0].message


@pytest.mark.parametrize(
    "start_steps",
    [[5, 6], [5, None], [None, 1]],
    ids=["two_checkpoints", "one_loaded", "one_loaded_within_dense_steps"],
)
@both_entries
def test_another_checkpoint_on_one_rank_before_the_first_step(
    entry: str, start_steps: list[int | None]
) -> None:
    outcomes = ranks.run(2, disagree_about_options, entry, [{"density": 0.05}] * 2, start_steps)
    words = f"step: rank 0 has {start_steps[0] or 0}, rank 1 has {start_steps[1] or 0}"
    assert_clear_and_harmless(outcomes, Case(steps=3, state=FRESH), words, "checkpoint step")


def load_in_the_middle(
    rank: int, world_size: int, entry: str, dense_steps: int, at: int, to: int
) -> tuple[str, float, bool, str]:
    case = Case(entry, 8, state={"dense_steps": dense_steps})
    model = DistributedDataParallel(GivenGradients(case), **SMALL_BUCKETS)
    state = TopKEFState(**case.options())
    add_hook(model, state, entry)
    for step in range(at):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
    if rank == 1:
        try:
            state.load_state_dict({**state.state_dict(), "step": to})
        except ValueError as refusal:
            return str(refusal), 0.0, True, ""
    model.zero_grad()
    before = state.state_dict()["residuals"]
    message, seconds = error_of(lambda: model(case.gradients(rank, at)).backward())
    after = state.state_dict()["residuals"]
    # What was selected is back: residual + gradient, as if nothing had been sent.
    given = case.gradients(rank, at)
    restored = all(torch.equal(after[name], before[name] + given[name]) for name in before)
    again, _ = error_of(lambda: model(case.gradients(rank, at + 1)).backward())
    return message, seconds, restored, again


@stand_in.host_contract
@pytest.mark.parametrize("to", [3, 9])
@both_entries
def test_one_rank_loads_another_step_in_the_middle_of_a_run(entry: str, to: int) -> None:
    for message, seconds, restored, again in ranks.run(2, load_in_the_middle, entry, 2, 5, to):
        assert (
            re.search("step", message)
            and re.search(r"rank \d", message)
            and str(to) in message
            and "5" in message
        ), message
        assert "disagree" in again or "step" in again
        assert restored and seconds < 10


@pytest.mark.parametrize("to", [3, 6], ids=["within_the_dense_steps", "behind_them"])
@both_entries
def test_one_rank_loads_another_step_while_all_are_in_the_dense_steps(entry: str, to: int) -> None:
    """A dense all-reduce carries no step number, so the ranks compare in each dense step."""
    for message, seconds, _, again in ranks.run(2, load_in_the_middle, entry, 4, 2, to):
        assert re.search(f"step: rank 0 has 2, rank 1 has {to}", message), message
        assert "disagree" in again
        assert seconds < 10


def disagree_about_the_last_bucket(
    rank: int, world_size: int, entry: str
) -> tuple[str, bool, bool]:
    case = Case(entry)
    # Two buckets from the first step on: third_* is exchanged, then the one with the exempt parameter is refused.
    model = DistributedDataParallel(
        GivenGradients(case), find_unused_parameters=True, **SMALL_BUCKETS
    )
    state = TopKEFState(exchange="allgather", density=0.05, exempt=["^first"] if rank == 0 else [])
    add_hook(model, state, entry)
    state.load_state_dict(checkpoint(rank, world_size, 5))
    before = state.state_dict()["residuals"]
    given = case.gradients(rank, 0)
    message, _ = error_of(lambda: model(given).backward())
    after = state.state_dict()["residuals"]
    came_back = torch.equal(after["third_weight"], before["third_weight"] + given["third_weight"])
    unchanged = all(
        torch.equal(after[name], before[name]) for name in ("first_weight", "second_weight")
    )
    return message, came_back, unchanged


@both_entries
def test_when_one_bucket_is_refused_the_others_give_back_what_they_sent(entry: str) -> None:
    for message, came_back, unchanged in ranks.run(2, disagree_about_the_last_bucket, entry):
        assert re.search(r"begins with 'first_\w+'.*exempt", message)
        assert came_back and unchanged


def falling(step: int) -> float:
    return 0.5 if step < 3 else 0.25


def disagree_about_the_schedule(rank: int, world_size: int, entry: str) -> Outcome:
    case = Case(entry, state={"density": falling if rank == 0 else half, "dense_steps": 1})
    model = DistributedDataParallel(GivenGradients(case), **SMALL_BUCKETS)
    state = TopKEFState(**case.options())
    add_hook(model, state, entry)
    for step in range(3):
        model(case.gradients(rank, step)).backward()
    before = state.state_dict()["residuals"]
    message, seconds = error_of(lambda: model(case.gradients(rank, 3)).backward())
    return Outcome(
        message,
        seconds,
        before,
        state.state_dict()["residuals"],
        fresh_run(rank, Case(entry, 3, state=FRESH)),
    )


@both_entries
def test_a_schedule_that_differs_at_step_3_fails_at_step_3(entry: str) -> None:
    outcomes = ranks.run(2, disagree_about_the_schedule, entry)
    assert_clear_and_harmless(
        outcomes, Case(steps=3, state=FRESH), r"density: rank 0 has 0\.25, rank 1 has 0\.5"
    )


def linear(features: int, outputs: int = 64, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(features, outputs, dtype=dtype)


def two_layers(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.Sequential(first, second)


def with_first_weight(change: Callable[[Tensor], Tensor]) -> nn.Module:
    """The plain model, with the same number of entries in another shape or order."""
    model = nn.Sequential(linear(48), linear(64))
    model[0].weight = nn.Parameter(change(model[0].weight.detach()))
    return model


def named_model(kind: str) -> nn.Module:
    models = {
        "plain": lambda: nn.Sequential(linear(48), linear(64)),
        "wider": lambda: nn.Sequential(linear(48), linear(64, 72)),
        "same_numel": lambda: nn.Sequential(linear(48), nn.Linear(128, 32), nn.Linear(32, 1)),
        "deeper": lambda: nn.Sequential(linear(48), linear(64), linear(64)),
        "other_names": lambda: nn.ModuleDict({"body": linear(48), "head": linear(64)}),
        "bf16": lambda: nn.Sequential(linear(48), linear(64)).bfloat16(),
        "half_bf16": lambda: nn.Sequential(linear(48), linear(64, dtype=torch.bfloat16)),
        "other_shape": lambda: with_first_weight(lambda weight: weight.reshape(48, 64)),
        "other_order": lambda: with_first_weight(lambda weight: weight.t().contiguous().t()),
        "huge": lambda: nn.Sequential(linear(48), linear(64), linear(4096, 2048)),
    }
    torch.manual_seed(0)
    return models[kind]()


def disagree_about_the_model(
    rank: int, world_size: int, kinds: list[str], dense_steps: int
) -> Outcome:
    model = named_model(kinds[rank])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = TopKEFState(exchange="allgather", density=0.1, dense_steps=dense_steps)
    message, seconds = error_of(lambda: all_reduce_gradients(model.named_parameters(), state))
    assert all(
        torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters()
    )
    residuals = state.state_dict()["residuals"]
    assert not any(residual.any() for residual in residuals.values())
    return Outcome(message, seconds, {}, {}, fresh_run(rank, Case("python", 3, state=FRESH)))


MODELS = {
    "wider": "numel of the bucket: rank 0 has \\d+, rank 1 has \\d+",
    "same_numel": "number of parameters in the bucket: rank 0 has 4, rank 1 has 6",
    "deeper": "number of parameters in the bucket: rank 0 has 4, rank 1 has 6",
    "other_names": r"names of the parameters in the bucket: rank 0 has \w+, rank 1 has \w+",
    "bf16": r"dtype of the gradient \(.*2 = bfloat16\): rank 0 has 0, rank 1 has 2",
    "half_bf16": "number of parameters in the bucket: rank 0 has 4, rank 1 has 2",
    "other_shape": r"layout of the bucket: rank 0 has \w+, rank 1 has \w+",
    "other_order": r"layout of the bucket: rank 0 has \w+, rank 1 has \w+",
    "huge": "number of parameters of the model: rank 0 has 4, rank 1 has 6",
}


@pytest.mark.parametrize("dense_steps", [0, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_another_model_on_one_rank_through_all_reduce_gradients(
    kind: str, dense_steps: int
) -> None:
    outcomes = ranks.run(2, disagree_about_the_model, ["plain", kind], dense_steps)
    assert_clear_and_harmless(
        outcomes, Case(steps=3, state=FRESH), MODELS[kind], "Give every rank the same model"
    )
