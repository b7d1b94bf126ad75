"""exchange="auto": dense or sparse for each bucket, by costs that rank 0 has measured."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from typing import Any

import pytest
import ranks
import test_agreement
import torch
from ddp_models import SHAPES, Case, assert_same_bits, build, integers, normal, replace_in
from test_exchanges import (
    ENTRIES,
    WORLD_SIZES,
    gradient,
    in_pairs,
    train_from,
)

from compressed_ddp import AutoExchange, ExchangeCosts, TopKEFState, all_reduce_
from compressed_ddp._native import _C

# A network on which a collective costs 1 ms and a byte 10 ns; the stages cost next to nothing.
SLOW_NETWORK = ExchangeCosts(1e-3, 1e-8, 1e-12, 1e-12, 1e-12)
# One on which bytes are as good as free.
FAST_NETWORK = ExchangeCosts(1e-6, 1e-14, 1e-9, 1e-9, 1e-9)
# Of the buckets that DDP makes of SHAPES that of 1,584 entries travels sparse, and those of 2,040 and 2,407 dense.
LARGE_ARE_DENSE = ExchangeCosts(1e-3, 1e-12, 3.33e-7, 1e-12, 1e-12)
DENSITY = 0.01


def predicted(
    costs: ExchangeCosts, sparse: str, world_size: int, numel: int, itemsize: int
) -> tuple[float, float]:
    """docs/exchanges.md in Python: seconds sparse and dense of one tensor in scope "tensor"."""
    k = _C.selection_k(DENSITY, numel)
    payload = _C.payload_bytes([numel], [0], [k], "bf16")
    ring = 2 * (world_size - 1) / world_size
    dense = 2 * costs.latency_s + ring * numel * itemsize * costs.byte_s
    select = numel * costs.select_entry_s

    def decode(entries: float, selected: float) -> float:
        return entries * costs.decode_entry_s + selected * costs.decode_selected_s

    if sparse == "split":
        seconds = 2 * costs.latency_s + ring * payload * costs.byte_s
        seconds += select + decode(numel / world_size, k) + select / world_size + decode(numel, k)
    else:
        seconds = costs.latency_s + (world_size - 1) * payload * costs.byte_s
        seconds += select + decode(numel, world_size * k)
    return seconds, dense


def choose(
    rank: int, world_size: int, exchange: AutoExchange, numels: list[int], dtype: torch.dtype
) -> tuple[list[dict[str, Any]], list[dict[str, float]], list[str]]:
    state = TopKEFState(density=DENSITY, dense_steps=0, exchange=exchange)
    for step in range(2):
        metrics = []
        for numel in numels:
            name = f"t{numel}"
            tensor = gradient("normal", numel, rank, step, numel).to(dtype)
            all_reduce_(tensor, state, name=name)
            metrics.append(state.metrics())
    return state.exchange_choices(), metrics, sorted(state.state_dict()["residuals"])


NUMELS = [2000, 20_000, 200_000]


@in_pairs(
    world_size=[2, 3, 4],
    sparse=["allgather", "split", None],
    dense=["dense", "dense_bf16", "dense_fp32"],
    costs=[SLOW_NETWORK, FAST_NETWORK, ExchangeCosts(1e-4, 1e-8, 1e-9, 1e-9, 1e-9)],
    dtype=[torch.float32, torch.bfloat16],
)
def test_a_choice_is_what_the_model_says_and_what_the_bucket_does(
    pools: ranks.Pools,
    world_size: int,
    sparse: str | None,
    dense: str,
    costs: ExchangeCosts,
    dtype: torch.dtype,
) -> None:
    exchange = AutoExchange(sparse, dense, costs)
    itemsize = {"dense": dtype.itemsize, "dense_bf16": 2, "dense_fp32": 4}[dense]
    outcomes = pools.run(world_size, choose, exchange, NUMELS, dtype)
    for choices, _, residuals in outcomes:
        assert choices == outcomes[0][0], "the same on every rank"
        by_name = {choice["bucket"]: choice for choice in choices}
        for numel in NUMELS:
            seconds = predicted(costs, sparse or "allgather", world_size, numel, itemsize)
            choice = by_name[f"t{numel}"]
            assert (choice["sparse_s"], choice["dense_s"]) == pytest.approx(seconds, rel=1e-9)
            is_dense = seconds[0] > 0.8 * seconds[1]
            assert choice["exchange"] == (dense if is_dense else sparse or "allgather")
            assert (f"t{numel}" in residuals) == (not is_dense)
            assert choice["numel"] == numel


def test_some_costs_make_all_dense_and_some_all_sparse(pools: ranks.Pools) -> None:
    for costs, expected in ((SLOW_NETWORK, "allgather"), (FAST_NETWORK, "dense")):
        for choices, metrics, _ in pools.run(
            2, choose, AutoExchange(costs=costs), [200_000], torch.float32
        ):
            assert [choice["exchange"] for choice in choices] == [expected]
            sent = metrics[0]["compressed_ddp/bytes_sent_all_reduce"]
            assert (sent > 0) == (expected == "dense")


def measure(rank: int, world_size: int) -> tuple[Any, Any, list[str]]:
    said: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("compressed_ddp")
    handler = Notes()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        state = TopKEFState(density=0.1, dense_steps=0, exchange="auto")
        assert state.exchange_costs() is None
        all_reduce_(torch.ones(5000), state, name="w")
    finally:
        logger.removeHandler(handler)
    return state.exchange_costs(), state.exchange_choices(), said


@WORLD_SIZES
def test_rank_0_measures_and_all_ranks_go_by_it(pools: ranks.Pools, world_size: int) -> None:
    outcomes = pools.run(world_size, measure)
    for rank, (costs, choices, said) in enumerate(outcomes):
        assert costs == outcomes[0][0] and choices == outcomes[0][1]
        assert len(choices) == 1
        # Wide: a loaded machine, but seconds are not milliseconds, and nothing is made up.
        assert 1e-6 < costs.latency_s < 1 and 1e-12 < costs.byte_s < 1e-5
        assert 1e-11 < costs.select_entry_s < 1e-6
        if rank == 0:
            assert len(said) == 2
            assert "has measured" in said[0]
            assert f"travels by {choices[0]['exchange']}" in said[1]
        else:
            assert said == []


# ---- DDP and checkpoints


def auto_case(entry: str, costs: ExchangeCosts, steps: int = 6, **state: Any) -> Case:
    return Case(
        entry, steps, gradients_of=normal, state={"exchange": AutoExchange(costs=costs), **state}
    )


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("costs", "like"), [(SLOW_NETWORK, "allgather"), (FAST_NETWORK, "dense")])
def test_a_model_trains_as_with_the_exchange_that_was_chosen(
    pools: ranks.Pools, entry: str, costs: ExchangeCosts, like: str
) -> None:
    case = auto_case(entry, costs)
    same = dataclasses.replace(case, state={"exchange": like})
    for ours, theirs in zip(
        pools.run(2, train_from, case, 0, None), pools.run(2, train_from, same, 0, None)
    ):
        for one, other in zip(ours.gradients, theirs.gradients, strict=True):
            for name in SHAPES:
                assert_same_bits(one[name], other[name], name)


def test_a_resumed_run_goes_by_the_saved_costs(pools: ranks.Pools) -> None:
    """Whatever it would measure now."""
    given = auto_case("python", SLOW_NETWORK, 7)
    measuring = dataclasses.replace(given, state={"exchange": "auto"})
    half = pools.run(2, train_from, dataclasses.replace(given, steps=4), 0, None)
    whole = pools.run(2, train_from, given, 0, None)
    resumed = pools.run(2, train_from, measuring, 4, [run.saved for run in half])
    for ours, theirs in zip(resumed, whole):
        for saved in (ours.saved["auto"], theirs.saved["auto"]):
            assert saved["costs"] == dataclasses.asdict(SLOW_NETWORK)
            assert {choice["exchange"] for choice in saved["choices"]} == {"allgather"}
        for one, other in zip(ours.gradients, theirs.gradients[4:], strict=True):
            for name in SHAPES:
                assert_same_bits(one[name], other[name], name)


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AutoExchange(sparse="hierarchical"), "sparse must be None or one of"),
        (lambda: AutoExchange(dense="fp16"), "dense must be one of"),
        (lambda: AutoExchange(costs=(1.0,)), "costs must be None or ExchangeCosts"),
        (lambda: ExchangeCosts(0.0, 1.0, 1.0, 1.0, 1.0), "latency_s must be a positive, finite"),
        (lambda: ExchangeCosts(1.0, math.inf, 1.0, 1.0, 1.0), "byte_s must be a positive, finite"),
        (lambda: ExchangeCosts(1.0, float("nan"), 1.0, 1.0, 1.0), "byte_s must be a positive"),
        (lambda: ExchangeCosts(1.0, 1.0, True, 1.0, 1.0), "select_entry_s must be a positive"),
    ],
)
def test_wrong_values_are_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_damaged_costs_in_a_state_are_refused() -> None:
    state = TopKEFState(exchange="auto")
    saved = {**state.state_dict(), "auto": {"costs": {"latency_s": 1.0}}}
    with pytest.raises(TypeError, match="auto is not as it was saved"):
        state.load_state_dict(saved)


def test_ranks_of_which_one_chooses_disagree_in_words(pools: ranks.Pools) -> None:
    """Before anything is measured."""
    options = [{"density": 0.05, "exchange": exchange} for exchange in ("auto", "allgather")]
    outcomes = pools.run(2, test_agreement.disagree_about_options, "python", options, [None] * 2)
    case = Case(steps=3, state=test_agreement.FRESH)
    words = r"exchange: rank 0 has auto \(allgather or dense\), rank 1 has allgather"
    test_agreement.assert_clear_and_harmless(outcomes, case, words)


def load_behind_measurements(rank: int, world_size: int) -> tuple[str, str]:
    state = TopKEFState(density=0.1, dense_steps=0, exchange="auto")
    saved = {
        **state.state_dict(),
        "step": 3,
        "auto": {"costs": dataclasses.asdict(SLOW_NETWORK), "choices": []},
    }
    all_reduce_(torch.ones(2000), state, name="w")
    try:
        state.load_state_dict(saved)
        message = ""
    except ValueError as error:
        message = str(error)
    state.reset()
    state.load_state_dict(saved)
    all_reduce_(torch.ones(2000), state, name="w")
    return message, state.exchange_choices()[0]["exchange"]


def load_an_early_step(rank: int, world_size: int) -> str:
    """On one rank: it would begin a comparison that the other does not take part in."""
    state = TopKEFState(density=DENSITY, dense_steps=2, exchange=AutoExchange(costs=FAST_NETWORK))
    early = state.state_dict()
    for _ in range(3):
        all_reduce_(torch.ones(5000), state, name="w")
    assert [choice["exchange"] for choice in state.exchange_choices()] == ["dense"]
    message = ""
    if rank == 1:
        try:
            state.load_state_dict(early)
        except ValueError as error:
            message = str(error)
    all_reduce_(torch.ones(5000), state, name="w")
    return message


def test_a_rank_whose_buckets_all_travel_dense_does_not_go_back_to_the_dense_steps(
    pools: ranks.Pools,
) -> None:
    _, message = pools.run(2, load_an_early_step)
    assert "is past its dense steps and cannot go back to step 0 (dense_steps=2)" in message


def test_costs_are_not_exchanged_in_the_middle_of_a_run(pools: ranks.Pools) -> None:
    for message, exchange in pools.run(2, load_behind_measurements):
        assert "goes by others; load it before the first compressed step" in message
        assert exchange in ("allgather", "dense")


def reduce_with_inf_in_the_dense_bucket(rank: int, world_size: int) -> tuple[Any, ...]:
    case = Case(
        "python",
        4,
        gradients_of=replace_in(integers, {("first_weight", 1, 3): float("inf")}),
        state={
            "exchange": AutoExchange(costs=LARGE_ARE_DENSE),
            "value_format": "fp32",
            "dense_steps": 2,
        },
    )
    model, state = build(case)
    kept = []
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        kept.append(state.state_dict()["residuals"])
    kinds = sorted({choice["exchange"] for choice in state.exchange_choices()})
    good = all(
        torch.equal(after, kept[2][name] + case.gradients(rank, 3)[name])
        for name, after in kept[3].items()
    )
    return state.exchange_choices(), kinds, len(kept[3]), good


def test_a_non_finite_dense_bucket_gives_back_what_sparse_ones_sent_in_its_step(
    pools: ranks.Pools,
) -> None:
    for choices, kinds, count, good in pools.run(2, reduce_with_inf_in_the_dense_bucket):
        assert kinds == ["allgather", "dense"], choices
        assert count > 0 and good, "as if the step had sent nothing"


def reduce_alone(rank: int, world_size: int) -> tuple[bool, str]:
    state = TopKEFState(density=0.1, dense_steps=0, exchange="auto")
    tensor = gradient("normal", 0, 0, 0, 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = all_reduce_(tensor.clone(), state, name="w")
    return torch.equal(result, tensor), state.exchange_choices()[0]["exchange"]


def test_one_rank_sends_nothing_and_selects_nothing() -> None:
    assert ranks.run(1, reduce_alone) == [(True, "dense")]


def test_a_state_that_is_loaded_into_another_auto_exchange_is_warned_about() -> None:
    saved = TopKEFState(exchange=AutoExchange("allgather", "dense")).state_dict()
    assert saved["auto"] == {"sparse": "allgather", "dense": "dense"}
    other = TopKEFState(exchange=AutoExchange("split", "dense_bf16"))
    words = (
        r"AutoExchange.sparse \(saved 'allgather', now 'split'\), "
        r"AutoExchange.dense \(saved 'dense', now 'dense_bf16'\)$"
    )
    with pytest.warns(UserWarning, match=words):
        other.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKEFState(exchange=AutoExchange("allgather", "dense")).load_state_dict(saved)


def reduce_by_exchange_of_rank(rank: int, world_size: int, exchanges: list[AutoExchange]) -> str:
    state = TopKEFState(density=0.1, dense_steps=0, exchange=exchanges[rank])
    try:
        all_reduce_(torch.ones(2000), state, name="w")
        return ""
    except RuntimeError as error:
        return str(error)


def test_ranks_with_other_costs_disagree_in_words(pools: ranks.Pools) -> None:
    exchanges = [
        AutoExchange(costs=dataclasses.replace(SLOW_NETWORK, latency_s=latency_s))
        for latency_s in (1e-3, 2e-3)
    ]
    for message in pools.run(2, reduce_by_exchange_of_rank, exchanges):
        assert "costs of exchange='auto'" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"dense": "dense_bf16"},
            "auto (allgather or dense_bf16), rank 1 has auto (allgather or dense)",
        ),
        ({"sparse": "split"}, "auto (split or dense), rank 1 has auto (allgather or dense)"),
    ],
)
def test_ranks_with_other_choices_in_auto_disagree_in_words(
    pools: ranks.Pools, changes: dict[str, Any], words: str
) -> None:
    exchanges = [AutoExchange(costs=SLOW_NETWORK, **changes), AutoExchange(costs=SLOW_NETWORK)]
    for message in pools.run(2, reduce_by_exchange_of_rank, exchanges):
        assert words in message
