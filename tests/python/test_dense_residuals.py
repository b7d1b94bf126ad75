"""What travels dense takes along what this rank had held back: a residual of parameters that were in a sparse bucket, or were loaded."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import pytest
import ranks
import stand_in
import torch
import torch.distributed as dist
from ddp_models import SHAPES, Case, assert_same_bits, both_entries, build, integers, replace_in
from test_auto import FAST_NETWORK, LARGE_ARE_DENSE
from test_exchanges import gradient, in_pairs, residual_of, train_from
from torch import Tensor

from compressed_ddp import AutoExchange, ExchangeCosts, TopKEFState, all_reduce_

DENSE = AutoExchange(costs=FAST_NETWORK)  # every bucket
NUMEL = 5000


def whole(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return gradient("integers", 0, rank, step, NUMEL).to(dtype)


def saved_behind_sparse_steps(rank: int) -> dict[str, Any]:
    """Its residual holds integers up to 24."""
    state = TopKEFState(density=0.01, dense_steps=0, exchange="allgather", value_format="fp32")
    for step in range(3):
        all_reduce_(whole(rank, step), state, name="w")
    return state.state_dict()


def going_on(
    rank: int, exchange: Any, held_back: Tensor | None = None, **options: Any
) -> TopKEFState:
    state = TopKEFState(
        density=0.01, dense_steps=0, exchange=exchange, value_format="fp32", **options
    )
    saved = saved_behind_sparse_steps(rank)
    if held_back is not None:
        saved["residuals"]["w"] = held_back
    state.load_state_dict(saved)
    return state


@dataclasses.dataclass
class Sent:
    """Of two steps: the residual before the first, the result of each, and what residuals there are in the end."""

    before: Tensor
    results: list[Tensor]
    names: list[str]
    metrics: dict[str, float]


def send_twice(rank: int, world_size: int, exchange: Any, dtype: torch.dtype) -> Sent:
    state = going_on(rank, exchange)
    before = residual_of(state, NUMEL)
    results, metrics = [], {}
    for step in (3, 4):
        results.append(all_reduce_(whole(rank, step, dtype), state, name="w"))
        metrics = metrics or state.metrics()
    return Sent(before, results, sorted(state.state_dict()["residuals"]), metrics)


@in_pairs(
    world_size=[2, 4],
    exchange=[DENSE, "dense", "dense_fp32", "dense_bf16", "dense_fp16"],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_a_residual_travels_whole_with_the_first_dense_bucket_and_is_gone(
    pools: ranks.Pools, world_size: int, exchange: Any, dtype: torch.dtype
) -> None:
    """Sums of integers up to 32, over a power of two: exact in each of these types."""
    by_rank = pools.run(world_size, send_twice, exchange, dtype)
    first = sum(whole(rank, 3) + sent.before for rank, sent in enumerate(by_rank)) / world_size
    second = sum(whole(rank, 4) for rank in range(world_size)) / world_size
    for rank, sent in enumerate(by_rank):
        assert sent.before.any(), "there is something to send"
        assert_same_bits(sent.results[0] + 0.0, first.to(dtype) + 0.0, "with the residual")
        assert_same_bits(sent.results[1] + 0.0, second.to(dtype) + 0.0, "and without")
        assert sent.names == [], "its memory is free"
        norm = whole(rank, 3).norm().item()
        assert sent.metrics["compressed_ddp/gradient_norm"] == pytest.approx(norm, rel=1e-6)
        assert sent.metrics["compressed_ddp/residual_norm"] == 0


def send_what_only_the_average_holds(
    rank: int, world_size: int, exchange: Any, dtype: torch.dtype, value: float, held_back: float
) -> tuple[Tensor, list[str]]:
    state = going_on(rank, exchange, torch.full((NUMEL,), held_back if rank == 0 else 0.0))
    gradient = torch.full((NUMEL,), value if rank == 0 else -value).to(dtype)
    return all_reduce_(gradient, state, name="w"), sorted(state.state_dict()["residuals"])


@pytest.mark.parametrize(
    ("exchange", "dtype", "value", "held_back", "average"),
    [
        # 70,016 is more than float16 holds, its half is not.
        (DENSE, torch.float16, 0.0, 70_016.0, 35_008.0),
        ("dense", torch.float16, 0.0, -70_016.0, -35_008.0),
        ("dense_fp16", torch.float32, 0.0, 70_016.0, 35_008.0),
        # bfloat16 has no number between 256 and 258; float32, in which it travels, has.
        ("dense_fp32", torch.bfloat16, 256.0, 0.5, 0.25),
    ],
)
def test_gradient_and_residual_are_added_and_divided_in_fp32(
    pools: ranks.Pools,
    exchange: Any,
    dtype: torch.dtype,
    value: float,
    held_back: float,
    average: float,
) -> None:
    outcomes = pools.run(2, send_what_only_the_average_holds, exchange, dtype, value, held_back)
    expected = torch.full((NUMEL,), average).to(dtype)
    for result, names in outcomes:
        assert_same_bits(result, expected, "the average")
        assert names == []


def reduce_in_dense_steps(rank: int, world_size: int) -> tuple[list[Tensor], Tensor]:
    state = TopKEFState(density=0.01, dense_steps=2, exchange=DENSE)
    state.load_state_dict({**saved_behind_sparse_steps(rank), "step": 0})
    results = [all_reduce_(whole(rank, step), state, name="w") for step in range(2)]
    return results, residual_of(state, NUMEL)


def test_the_dense_steps_leave_residuals_alone(pools: ranks.Pools) -> None:
    for results, residual in pools.run(2, reduce_in_dense_steps):
        for step, result in enumerate(results):
            assert_same_bits(result, sum(whole(r, step) for r in range(2)) / 2, f"step {step}")
        assert residual.any()


def skip_steps(rank: int, world_size: int, exchange: Any) -> dict[str, Tensor]:
    state = going_on(rank, exchange)
    seen = {"before": residual_of(state, NUMEL)}
    bad = whole(rank, 3)
    bad[17] = torch.inf if rank == 1 else bad[17]
    seen["result"] = all_reduce_(bad, state, name="w")
    seen["behind a bad step"] = residual_of(state, NUMEL)
    all_reduce_(whole(rank, 4), state, name="w")
    for _ in range(2):  # the second time there is nothing to give back
        state.rollback()
    seen["behind a step that was rolled back"] = residual_of(state, NUMEL)
    seen["sent"] = all_reduce_(whole(rank, 5), state, name="w")
    return seen


@pytest.mark.parametrize("exchange", [DENSE, "dense", "dense_bf16"], ids=["auto", "dense", "bf16"])
def test_a_skipped_step_leaves_the_residual_for_the_next_one(
    pools: ranks.Pools, exchange: Any
) -> None:
    by_rank = pools.run(2, skip_steps, exchange)
    sent = sum(whole(rank, 5) + seen["before"] for rank, seen in enumerate(by_rank)) / 2
    for seen in by_rank:
        assert not seen["result"].isfinite().all()
        for when in ("behind a bad step", "behind a step that was rolled back"):
            assert_same_bits(seen[when], seen["before"], when)
        assert_same_bits(seen["sent"] + 0.0, sent + 0.0, "in the end")


def lose_a_peer(rank: int, world_size: int, exchange: Any) -> tuple[str, Tensor, Tensor]:
    state = going_on(rank, exchange)
    before = residual_of(state, NUMEL)
    # A first dense step: so the ranks have compared the bucket, and the peer is missed in the all-reduce itself.
    all_reduce_(whole(rank, 3), state, name="w")
    state.rollback()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        all_reduce_(whole(rank, 4), state, name="w")
        return "", before, before
    except RuntimeError as error:
        return str(error), before, residual_of(state, NUMEL)


@pytest.mark.parametrize("exchange", [DENSE, "dense_bf16"], ids=["auto", "bf16"])
def test_a_failed_all_reduce_gives_the_residual_back(exchange: Any) -> None:
    (message, before, after), _ = ranks.run(2, lose_a_peer, exchange, allow_death=True)
    assert "another rank has died or is stalled" in message
    assert_same_bits(after, before, "the residual")


def ignore_residuals(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    state = going_on(rank, "dense", error_feedback=False)
    before = residual_of(state, NUMEL)
    result = all_reduce_(whole(rank, 3), state, name="w")
    return before, result, residual_of(state, NUMEL)


def test_without_error_feedback_a_loaded_residual_stays_where_it_is(pools: ranks.Pools) -> None:
    average = sum(whole(rank, 3) for rank in range(2)) / 2
    for before, result, after in pools.run(2, ignore_residuals):
        assert_same_bits(result, average, "the average")
        assert_same_bits(after, before, "the residual")


# ---- models

# LARGE_ARE_DENSE the other way round. With either, the one bucket of the whole model, in the first step of a process, goes like the
# large ones.
LARGE_ARE_SPARSE = ExchangeCosts(1e-15, 1e-9, 2.894e-9, 1e-15, 1e-15)


def mixed_case(entry: str, costs: ExchangeCosts, steps: int = 8) -> Case:
    options = {"exchange": AutoExchange(costs=costs), "value_format": "fp32", "dense_steps": 2}
    return Case(entry, steps, gradients_of=integers, state=options)


def kinds_of(saved: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {c["bucket"]: (c["exchange"], c["numel"]) for c in saved["auto"]["choices"]}


@both_entries
@pytest.mark.parametrize(
    "costs", [LARGE_ARE_DENSE, LARGE_ARE_SPARSE], ids=["large_dense", "large_sparse"]
)
def test_a_resumed_run_chooses_as_before_and_loses_nothing(
    pools: ranks.Pools, entry: str, costs: ExchangeCosts
) -> None:
    """The first step of the new process has the whole model in one bucket; what it leaves in residuals of dense buckets, they send."""
    case = mixed_case(entry, costs)
    whole_run = pools.run(2, train_from, case, 0, None)
    half = pools.run(2, train_from, dataclasses.replace(case, steps=5), 0, None)
    resumed = pools.run(2, train_from, case, 5, [run.saved for run in half])
    kinds = kinds_of(whole_run[0].saved)
    assert {kind for kind, _ in kinds.values()} == {"allgather", "dense"}, kinds
    sparse = sorted(whole_run[0].saved["residuals"])
    assert 0 < len(sparse) < len(SHAPES)
    for ours in resumed:
        assert sorted(ours.saved["residuals"]) == sparse
        of_buckets = {
            bucket: kind for bucket, kind in kinds_of(ours.saved).items() if kind[1] < 6000
        }
        assert of_buckets == kinds
    for name, shape in SHAPES.items():
        kept = sum(run.saved["residuals"].get(name, torch.zeros(shape)) for run in resumed)
        came = sum(run.saved["residuals"].get(name, torch.zeros(shape)) for run in half)
        applied = sum(2 * run_step[name] for run_step in resumed[0].gradients)
        given = sum(case.gradients(rank, step)[name] for rank in range(2) for step in range(5, 8))
        assert_same_bits(applied + kept + 0.0, given + came + 0.0, name)


def train_with_unused(
    rank: int, world_size: int, case: Case, saved: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    model, state = build(case)
    state.load_state_dict(saved[rank])
    kept = [state.state_dict()["residuals"]]
    for step in range(6, 8):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        kept.append(state.state_dict()["residuals"])
    return kept


@both_entries
def test_a_parameter_without_a_gradient_keeps_its_residual_until_it_has_one(
    pools: ranks.Pools, entry: str
) -> None:
    ddp = {"find_unused_parameters": True}
    rule = replace_in(integers, {("first_weight", 1, 6): None})
    sparse = Case(entry, 6, gradients_of=rule, state={"exchange": "allgather"}, ddp=ddp)
    dense = dataclasses.replace(sparse, state={"exchange": DENSE, "dense_steps": 2})
    saved = [run.saved for run in pools.run(2, train_from, sparse, 0, None)]
    for rank, kept in enumerate(pools.run(2, train_with_unused, dense, saved)):
        assert len(kept[0]) > 1
        assert sorted(kept[1]) == (["first_weight"] if rank == 1 else [])
        if rank == 1:
            assert_same_bits(kept[1]["first_weight"], kept[0]["first_weight"], "unused")
        assert kept[2] == {}


def lose_a_step_of_a_model(
    rank: int, world_size: int, case: Case, saved: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """Inf in a parameter whose bucket travels sparse: those that travelled dense have sent their residuals for nothing."""
    model, state = build(case)
    kept = []
    for step in range(4):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
    state.load_state_dict(saved[rank])
    for step in range(4, 6):
        kept.append(state.state_dict()["residuals"])
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
    return [*kept, state.state_dict()["residuals"]]


@both_entries
def test_the_buckets_of_a_model_give_their_residuals_back_together(
    pools: ranks.Pools, entry: str
) -> None:
    rule = replace_in(integers, {("third_weight", 1, 4): torch.inf})
    case = mixed_case(entry, LARGE_ARE_SPARSE, 6)
    sparse = dataclasses.replace(case, state={"exchange": "allgather", "value_format": "fp32"})
    saved = [run.saved for run in pools.run(2, train_from, sparse, 0, None)]
    case = dataclasses.replace(case, gradients_of=rule)
    for rank, (before, behind_bad, behind_good) in enumerate(
        pools.run(2, lose_a_step_of_a_model, case, saved)
    ):
        dense = before.keys() - behind_good.keys()
        assert dense and "third_weight" in behind_good
        for name in dense:
            assert_same_bits(behind_bad[name], before[name], f"{name} on rank {rank}")


# ---- a bucket that was sparse


def become_dense(rank: int, world_size: int, store: str) -> list[Tensor]:
    """Sparse, dense and sparse again, as the density of the first step in each process group asks for."""
    densities = {0: 0.01, 1: 0.01, 2: 1.0, 3: 1.0, 4: 0.01, 5: 0.01}
    costs = ExchangeCosts(1e-6, 1e-8, 1e-12, 1e-12, 1e-12)
    state = TopKEFState(
        density=densities.__getitem__,
        dense_steps=0,
        value_format="fp32",
        exchange=AutoExchange(costs=costs),
    )
    total = torch.zeros(NUMEL)
    seen = []
    for step in range(6):
        if step in (2, 4):
            dist.destroy_process_group()
            dist.init_process_group(
                "gloo", store=dist.FileStore(f"{store}{step}", 2), rank=rank, world_size=2
            )
        tensor = whole(rank, step)
        total += tensor
        total -= 2 * all_reduce_(tensor, state, name="w") / 2
        kind = state.exchange_choices()[0]["exchange"]
        assert kind == ("dense" if step in (2, 3) else "allgather"), (step, kind)
        seen.append(total - residual_of(state, NUMEL))
    return seen


def test_a_bucket_turns_dense_and_sparse_again_with_the_process_group(tmp_path: Any) -> None:
    """Its exchange pointed at residuals that are gone."""
    by_rank = ranks.run(2, become_dense, str(tmp_path / "store"))
    for step, lost in enumerate(zip(*by_rank, strict=True)):
        assert not sum(lost).any(), f"step {step}"


# ---- CUDA graphs


def capture_behind(rank: int, world_size: int) -> list[str]:
    from test_cuda_engine import Runtime, message_of

    sparse = {"density": 0.1, "dense_steps": 0, "value_format": "fp32"}
    # "small" travels sparse and "w" dense.
    costs = LARGE_ARE_DENSE
    state = TopKEFState(exchange=AutoExchange(costs=costs), **sparse)
    runtime, messages = Runtime(), []
    small = torch.arange(1200.0) - 600

    def reduce_small() -> None:
        all_reduce_(small.clone(), state, name="small")

    state.load_state_dict(saved_behind_sparse_steps(rank))
    for _ in range(2):
        reduce_small()
        all_reduce_(whole(rank, 3), state, name="w")
        kinds = {c["bucket"]: c["exchange"] for c in state.exchange_choices()}
        assert kinds == {"small": "allgather", "w": "dense"}, kinds
        runtime.capture(lambda: messages.append(message_of(reduce_small)))
    return messages


@pytest.mark.skipif(stand_in.PATH is None, reason="COMPRESSED_DDP_STAND_IN names no module")
def test_no_graph_begins_behind_a_step_that_sent_residuals_dense() -> None:
    for first, second in ranks.run(2, capture_behind):
        assert "a CUDA graph cannot begin behind a failed step, nor behind one in which" in first
        assert second == "", "the step behind it is like any other"
