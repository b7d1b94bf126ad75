"""exchange="hierarchical": whole gradients inside a node, payloads between nodes, a shard of every residual on each of its ranks."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import signal
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import contracts
import pytest
import ranks
import stand_in
import test_agreement
import torch
from contracts import HierarchicalOracle
from ddp_models import SHAPES, Case, assert_same_bits, integers, normal, train
from process_groups import Between, changed_groups, needs_python_groups
from stage_cases import VALUE_FORMATS
from test_exchanges import (
    DENSITY,
    ENTRIES,
    MIN_COMPRESS_NUMEL,
    SCOPES,
    Run,
    Seen,
    assert_delays_change_nothing,
    die,
    figures,
    gradient,
    hierarchical_steps,
    in_pairs,
    reduce_steps,
    train_from,
    train_until,
)
from test_failures import VICTIM, failing
from torch import Tensor

from compressed_ddp import TopKEFState, all_reduce_, all_reduce_gradients
from compressed_ddp._native import _C
from compressed_ddp.groups import ranks_per_node_of

# (world_size, ranks_per_node)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NODES = [(4, 2), (3, 1), (3, 3), (2, 2), (6, 3)]


def options_of(ranks_per_node: int, **options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple({"exchange": "hierarchical", "ranks_per_node": ranks_per_node, **options}.items())


def oracle_of(run: Run, world_size: int) -> HierarchicalOracle:
    options = {"scope": "tensor", "density": DENSITY, **dict(run.options)}
    options.pop("exchange")
    segments = [(n, n < MIN_COMPRESS_NUMEL) for n in run.segments]
    return HierarchicalOracle(world_size, options.pop("ranks_per_node"), [segments], **options)


def reduce_shards(rank: int, world_size: int, run: Run) -> list[Seen]:
    """As test_exchanges.reduce_steps, whose residuals are whole tensors."""
    state = run.state()
    seen = []
    for step in range(run.steps):
        tensor = run.gradient(rank, step)
        before = state.state_dict()["residuals"].get("w", torch.zeros(0))
        all_reduce_(tensor, state, name="w", segments=run.segments)
        after = state.state_dict()["residuals"].get("w", torch.zeros(0))
        seen.append(Seen(before, after, tensor, state.metrics()))
    return seen


def assert_equals_hierarchical_oracle(by_rank: list[list[Seen]], run: Run) -> None:
    oracle = oracle_of(run, len(by_rank))
    for step in range(run.steps):
        expected = oracle.step([run.gradient(rank, step) for rank in range(len(by_rank))])
        for rank, seen in enumerate(by_rank):
            where = f"on rank {rank} after step {step}"
            assert_same_bits(seen[step].result + 0, expected + 0, f"result {where}")
            expected_kept = oracle.residual(rank)
            kept = seen[step].after.reshape(-1)
            if kept.numel() == 0:  # everything travels dense
                kept = torch.zeros_like(expected_kept)
            assert_same_bits(kept + 0, expected_kept + 0, f"residual {where}")


@pytest.mark.filterwarnings("ignore:.*one rank")
@in_pairs(nodes=NODES, scope=SCOPES, value_format=VALUE_FORMATS, dtype=DTYPES)
def test_results_and_shards_equal_the_oracle_bit_for_bit(
    pools: ranks.Pools,
    nodes: tuple[int, int],
    scope: str,
    value_format: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    world_size, ranks_per_node = nodes
    options = options_of(ranks_per_node, scope=scope, value_format=value_format)
    for kind in ("integers", "normal"):
        run = Run(kind, seed, 3, dtype=dtype, options=options)
        assert_equals_hierarchical_oracle(pools.run(world_size, reduce_shards, run), run)


@pytest.mark.parametrize(
    "segments", [(0,), (1,), (7,), (8,), (17,), (60, 0, 30), (200, 40)], ids=str
)
def test_tensors_of_fewer_entries_than_ranks_leave_some_without_a_shard(
    pools: ranks.Pools, segments: tuple[int, ...], seed: int
) -> None:
    run = Run("integers", seed, segments=segments, options=options_of(2, density=0.1))
    assert_equals_hierarchical_oracle(pools.run(4, reduce_shards, run), run)


@in_pairs(nodes=[(4, 2), (4, 4), (2, 1)], scope=SCOPES, value_format=["fp32", "bf16"])
def test_over_all_nodes_nothing_is_lost_or_made(
    pools: ranks.Pools, nodes: tuple[int, int], scope: str, value_format: str, seed: int
) -> None:
    """nodes * sum of results + residuals == sum of the nodes' means, bit for bit: all numbers are multiples of 1/4."""
    world_size, ranks_per_node = nodes
    options = options_of(ranks_per_node, scope=scope, value_format=value_format)
    run = Run("integers", seed, 20, options=options)
    by_rank = pools.run(world_size, reduce_shards, run)
    numel = sum(run.segments)
    total = torch.zeros(numel, dtype=torch.float64)
    for step in range(run.steps):
        total += world_size // ranks_per_node * by_rank[0][step].result.double()
        for rank in range(world_size):
            total -= run.gradient(rank, step).double() / ranks_per_node
            assert_same_bits(by_rank[rank][step].result, by_rank[0][step].result, "replicas")
    for rank, seen in enumerate(by_rank):
        shard = contracts.shard_of(numel, rank % ranks_per_node, ranks_per_node)
        total[shard] += seen[-1].after.reshape(-1).double()
    compressed = torch.cat([torch.full((n,), n >= MIN_COMPRESS_NUMEL) for n in run.segments])
    assert not total[compressed].any()


def without_warnings(
    rank: int, world_size: int, function: Callable[..., Any], *arguments: Any
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(rank, world_size, *arguments)


def test_above_16_nodes_the_shards_travel_by_split(seed: int) -> None:
    """One rank per node: bit for bit what "split" alone gives."""
    run = Run("normal", seed, 2, options=options_of(1))
    plain = Run("normal", seed, 2, options=(("exchange", "split"),))
    hierarchical = ranks.run(17, without_warnings, reduce_shards, run, timeout_s=120)
    split = ranks.run(17, reduce_steps, plain, timeout_s=120)
    for ours, theirs in zip(hierarchical, split):
        for one, other in zip(ours, theirs):
            assert_same_bits(one.result + 0, other.result + 0, "result")
            assert_same_bits(one.after + 0, other.after + 0, "residual")
            assert one.metrics["compressed_ddp/bytes_sent_all_to_all"] > 0


# ---- figures


@in_pairs(nodes=[(4, 2), (6, 3), (2, 2)], value_format=VALUE_FORMATS, dtype=DTYPES)
def test_bytes_are_those_of_the_layouts_inside_a_node_and_between_nodes(
    pools: ranks.Pools, nodes: tuple[int, int], value_format: str, dtype: torch.dtype, seed: int
) -> None:
    world_size, ranks_per_node = nodes
    run = Run(
        "normal",
        seed,
        2,
        dtype=dtype,
        options=options_of(ranks_per_node, value_format=value_format),
    )
    oracle = oracle_of(run, world_size)
    size = dtype.itemsize
    numels = [shard.numel() for shard in oracle.shards]
    slot = -(-(64 + max(numels) * size) // 64) * 64
    for rank, seen in enumerate(pools.run(world_size, reduce_shards, run)):
        own = rank % ranks_per_node
        payload = _C.payload_bytes(*oracle.owners[own].layout.arguments, value_format)
        # And whether the tensor is used; multiples of 8.
        others = [-(-(n + 1) // 8) * 8 for i, n in enumerate(numels) if i != own]
        for step, of_step in enumerate(seen):
            between = (world_size // ranks_per_node - 1) * payload
            agreement = 224 * (world_size - 1) if step == 0 else 0
            assert figures(of_step) == {
                "bytes_sent": between + agreement,
                "bytes_sent_all_gather": between,
                "bytes_sent_all_to_all": 0,
                "bytes_sent_all_reduce": 0,
                "bytes_sent_agreement": agreement,
                "bytes_sent_in_node": size * sum(others) + (ranks_per_node - 1) * slot,
                "bytes_sent_in_node_all_to_all": size * sum(others),
                "bytes_sent_in_node_all_gather": (ranks_per_node - 1) * slot,
            }


def test_norms_are_those_of_the_shard(pools: ranks.Pools, seed: int) -> None:
    run = Run("normal", seed, 3, options=options_of(2, value_format="fp32"))
    by_rank = pools.run(4, reduce_shards, run)
    for rank, seen in enumerate(by_rank):
        shard = contracts.shard_of(sum(run.segments), rank % 2, 2)
        for step, of_step in enumerate(seen):
            first = rank // 2 * 2
            mean = (run.gradient(first, step) + run.gradient(first + 1, step))[shard] / 2
            metrics = of_step.metrics
            norm = mean.double().norm().item()
            assert metrics["compressed_ddp/gradient_norm"] == pytest.approx(norm, rel=1e-5)
            kept = of_step.after.double().norm().item()
            assert metrics["compressed_ddp/residual_norm"] == pytest.approx(kept, rel=1e-5)


def reduce_small(rank: int, world_size: int, numel: int) -> dict[str, float]:
    state = TopKEFState(density=0.05, dense_steps=0, exchange="hierarchical", ranks_per_node=2)
    all_reduce_(torch.ones(numel), state, name="w")
    return state.metrics()


@pytest.mark.parametrize("numel", [8, 2012])
def test_the_compression_ratio_is_that_of_the_whole_node(pools: ranks.Pools, numel: int) -> None:
    """Borders of shards are multiples of 8 entries: of 8 the first rank has none."""
    shards = [contracts.shard_of(numel, index, 2) for index in range(2)]
    numels = [shard.stop - shard.start for shard in shards]
    payload_bytes = 0
    for shard_numel in numels:
        if numel < 1024 and shard_numel:
            payload_bytes += _C.payload_bytes([shard_numel], [-1], [], "bf16")
        elif shard_numel:
            k = _C.selection_k(0.05, shard_numel)
            payload_bytes += _C.payload_bytes([shard_numel], [0], [k], "bf16")
    assert numels[0] != numels[1]
    for metrics in pools.run(4, reduce_small, numel):
        assert metrics["compressed_ddp/compression_ratio"] == 4 * numel / payload_bytes


# ---- DDP


def hierarchical_case(entry: str, steps: int = 6, ranks_per_node: int = 2, **changes: Any) -> Case:
    state = {
        "exchange": "hierarchical",
        "ranks_per_node": ranks_per_node,
        "dense_steps": 0,
        "value_format": "fp32",
        **changes.pop("state", {}),
    }
    return Case(entry, steps, state=state, **changes)


def whole_residuals(
    by_rank: Sequence[dict[str, Tensor]], ranks_per_node: int
) -> list[dict[str, Tensor]]:
    """Of every node: its shards put together, in the parameters' shapes."""
    nodes = []
    for first in range(0, len(by_rank), ranks_per_node):
        node = by_rank[first : first + ranks_per_node]
        nodes.append(
            {
                name: torch.cat([shards[name].reshape(-1) for shards in node]).reshape(SHAPES[name])
                for name in node[0]
            }
        )
    return nodes


@pytest.mark.parametrize("entry", ENTRIES)
def test_over_ddp_with_rebuilt_buckets_nothing_is_lost(pools: ranks.Pools, entry: str) -> None:
    """From the first step on, when the whole model is one bucket, and later in several: a shard belongs to a parameter."""
    case = hierarchical_case(entry, gradients_of=integers)
    records = pools.run(4, train, case)
    assert records[0].buckets[0] != records[0].buckets[-1], "the buckets were rebuilt"
    nodes = whole_residuals([record.residuals for record in records], 2)
    for name in nodes[0]:
        total = sum(node[name].double() for node in nodes)
        for step in range(case.steps):
            total += 2 * records[0].gradients[step][name].double()
            total -= sum(case.gradients(rank, step)[name].double() for rank in range(4)) / 2
        assert not total.any(), name
    for record in records[1:]:
        for step in range(case.steps):
            for name in SHAPES:
                one, other = record.gradients[step][name], records[0].gradients[step][name]
                assert_same_bits(one, other, f"replicas of {name}")


def reduce_with_unused(
    rank: int, world_size: int, unused: dict[int, list[int]]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """unused: by step, the ranks on which the parameter has no gradient."""
    options = dict(options_of(2, density=0.1, dense_steps=0, value_format="fp32"))
    state = TopKEFState(**options)
    used, sometimes = (torch.nn.Parameter(torch.zeros(40, 50)) for _ in range(2))
    results, residuals = [], []
    for step in range(6):
        used.grad = gradient("integers", 1, rank, step, 2000).reshape(40, 50)
        sometimes.grad = (
            None
            if rank in unused.get(step, [])
            else gradient("integers", 2, rank, step, 2000).reshape(40, 50)
        )
        all_reduce_gradients([("used", used), ("sometimes", sometimes)], state)
        results.append(None if sometimes.grad is None else sometimes.grad.clone())
        residuals.append(state.state_dict()["residuals"]["sometimes"].clone())
    return results, residuals


def test_a_parameter_is_unused_by_a_node_when_no_rank_of_it_has_a_gradient(
    pools: ranks.Pools,
) -> None:
    unused = {2: [0], 3: [0, 1], 4: [0, 1, 2, 3]}
    by_rank = pools.run(4, reduce_with_unused, unused)
    total = torch.zeros(2000, dtype=torch.float64)
    for step in range(6):
        for rank in range(4):
            if rank not in unused.get(step, []):
                total -= gradient("integers", 2, rank, step, 2000).double() / 2
        result = by_rank[0][0][step]
        if step == 4:
            assert result is None, "nobody used it: nobody gets one"
        else:
            total += 2 * result.double().reshape(-1)
    for rank, (_, residuals) in enumerate(by_rank):
        total[contracts.shard_of(2000, rank % 2, 2)] += residuals[-1].double()
        assert_same_bits(residuals[4], residuals[3], "unused by all")
        if rank < 2:
            assert_same_bits(residuals[3], residuals[2], "unused by the node")
        else:
            assert not torch.equal(residuals[3], residuals[2])
    assert not total.any()


def reduce_with_nan(rank: int, world_size: int, positions: list[int]) -> list[tuple[Any, ...]]:
    state = Run("", 0, options=options_of(2)).state()
    seen = []
    for position in positions:
        good = all_reduce_(gradient("integers", position, rank, 0, 6000), state, name="w")
        before = state.state_dict()["residuals"]["w"]
        bad = torch.zeros(6000)
        if rank == 1:
            bad[position] = torch.nan
        all_reduce_(bad, state, name="w")
        seen.append((before, bad, state.state_dict()["residuals"]["w"], good))
    return seen


def test_a_non_finite_value_in_any_shard_reaches_all_ranks_and_is_undone(
    pools: ranks.Pools,
) -> None:
    for seen in pools.run(4, reduce_with_nan, [0, 2999, 3000, 5999]):
        for before, result, after, good in seen:
            assert result.isnan().all()
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)  # NaN is never kept
            assert good.isfinite().all()


def reduce_and_roll_back(rank: int, world_size: int, run: Run, rolled_back: int) -> list[Tensor]:
    state = run.state()
    kept = []
    for step in range(run.steps):
        all_reduce_(run.gradient(rank, step), state, name="w", segments=run.segments)
        if step == rolled_back:
            state.rollback()
        kept.append(state.state_dict()["residuals"]["w"])
    return kept


def test_rollback_gives_back_what_a_step_took(pools: ranks.Pools, seed: int) -> None:
    run = Run("integers", seed, options=options_of(2))
    by_rank = pools.run(4, reduce_and_roll_back, run, 2)
    oracle = oracle_of(run, 4)
    for step in range(run.steps):
        oracle.step([run.gradient(rank, step) for rank in range(4)])
        if step == 2:
            oracle.rollback()
        for rank in range(4):
            assert_same_bits(by_rank[rank][step] + 0, oracle.residual(rank) + 0, f"step {step}")


# ---- checkpoints


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    pools: ranks.Pools, entry: str
) -> None:
    # A rebuilt bucket may select in other company, but not in scope "tensor".
    case = hierarchical_case(entry, 7, gradients_of=normal, state={"value_format": "bf16"})
    whole = pools.run(4, train_from, case, 0, None)
    half = pools.run(4, train_from, dataclasses.replace(case, steps=4), 0, None)
    resumed = pools.run(4, train_from, case, 4, [run.saved for run in half])
    for rank, (our_run, their_run) in enumerate(zip(resumed, whole)):
        our_state, their_state = our_run.saved, their_run.saved
        assert {**our_state, "residuals": None} == {**their_state, "residuals": None}
        assert our_state["shard"]["index"] == rank % 2 and our_state["shard"]["count"] == 2
        assert our_state["shard"]["ranks"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        for name, residual in their_state["residuals"].items():
            place = our_state["shard"]["places"][name]
            assert residual.shape == (place["end"] - place["begin"],)
            assert_same_bits(our_state["residuals"][name], residual, name)
        for one, other in zip(our_run.gradients, their_run.gradients[4:], strict=True):
            for name in SHAPES:
                assert_same_bits(one[name], other[name], name)


def load_changed(rank: int, world_size: int) -> dict[str, str]:
    """What load_state_dict or the next step says to states that do not fit."""

    def state(**options: Any) -> TopKEFState:
        given = {"density": 0.1, "dense_steps": 0, "exchange": "hierarchical", "ranks_per_node": 2}
        return TopKEFState(**{**given, **options})

    def reduced(of: TopKEFState, shape: tuple[int, ...] = (40, 50)) -> dict[str, Any]:
        all_reduce_(torch.ones(shape), of, name="w")
        return of.state_dict()

    saved = reduced(state())
    whole = reduced(state(exchange="allgather", ranks_per_node=None))
    flat = copy.deepcopy(saved)
    flat["shard"]["places"]["w"]["strides"] = [1, 40]
    damaged = copy.deepcopy(saved)
    del damaged["shard"]["count"]
    nameless = copy.deepcopy(saved)
    nameless["shard"]["places"] = {}
    said = {}

    def note(what: str, call: Any) -> None:
        try:
            call()
            said[what] = ""
        except (ValueError, TypeError, RuntimeError) as error:
            said[what] = f"{type(error).__name__}: {error}"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = state(exchange="allgather", ranks_per_node=None)
        note("shard into whole", lambda: plain.load_state_dict(saved))
        other = state()
        other.load_state_dict(whole)
        note("whole into shard", lambda: reduced(other))
        three = state(ranks_per_node=4)
        three.load_state_dict(saved)
        note("other node", lambda: reduced(three))
        running = state(ranks_per_node=4)
        reduced(running)
        note("other node, running", lambda: running.load_state_dict(saved))
        settled = state()
        reduced(settled)
        note("whole into settled", lambda: settled.load_state_dict(whole))
        reduced(settled)
        alone = state(ranks_per_node=1)
        reduced(alone)
        note("shard into one", lambda: alone.load_state_dict(saved))
        reduced(alone)
        strided = state()
        strided.load_state_dict(flat)
        note("strides", lambda: reduced(strided))
        shape = state()
        shape.load_state_dict(saved)
        note("shape", lambda: reduced(shape, (2000,)))
        note("damaged", lambda: state().load_state_dict(damaged))
        note("nameless", lambda: state().load_state_dict(nameless))
        again = state()
        again.load_state_dict(saved)
        note("fits", lambda: reduced(again))
    return said


def test_a_state_that_does_not_fit_is_refused_in_words(pools: ranks.Pools) -> None:
    for said in pools.run(4, load_changed):
        assert re.search(
            "ValueError.*holds shards.*use the same exchange", said["shard into whole"]
        )
        assert re.search("asks for shard . of 2.*ranks_per_node", said["whole into shard"])
        assert re.search("keeps shard . of 2.*shard . of 4.*ranks_per_node", said["other node"])
        assert re.search("holds shard . of 2.*keeps shard . of 4", said["other node, running"])
        assert re.search("holds shard 0 of 1.*keeps shard . of 2", said["whole into settled"])
        assert re.search("holds shard . of 2.*keeps shard 0 of 1", said["shard into one"])
        assert re.search(r"strides \[1, 40\].*strides \[50, 1\]", said["strides"])
        assert re.search(r"shape \[40, 50\].*shape \[2000\]", said["shape"])
        assert re.search("TypeError.*shard is not as it was saved", said["damaged"])
        assert re.search("ValueError.*shard says nothing of 'w'", said["nameless"])
        assert said["fits"] == ""


# ---- nodes


@pytest.mark.parametrize(
    ("nodes", "count"),
    [("a", 1), ("aa", 2), ("ab", 1), ("aabb", 2), ("aaabbbccc", 3), ("abcdef", 1)],
)
def test_ranks_of_a_node_are_counted(nodes: str, count: int) -> None:
    assert ranks_per_node_of(list(nodes)) == count


@pytest.mark.parametrize("nodes", ["aab", "abb", "abab", "abba", "aabbb", "aabbaa", "aabcc"])
def test_irregular_nodes_are_refused_in_words(nodes: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"equally many consecutive ranks.*\[0, .*ranks_per_node"
    ):
        ranks_per_node_of(list(nodes))


def reduce_found(rank: int, world_size: int) -> tuple[Tensor, Any]:
    state = TopKEFState(density=0.1, dense_steps=0, exchange="hierarchical")
    result = all_reduce_(gradient("integers", 0, rank, 0, 4000), state, name="w")
    return result, state.state_dict()["shard"]


def test_ranks_on_one_machine_are_found_to_be_one_node(pools: ranks.Pools) -> None:
    for rank, (result, shard) in enumerate(pools.run(2, reduce_found)):
        assert shard["index"] == rank and shard["count"] == 2
        assert result.count_nonzero() > 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"ranks_per_node": 2},
            ValueError,
            "belongs to exchange='hierarchical', but exchange is None",
        ),
        ({"exchange": "hierarchical", "ranks_per_node": 0}, ValueError, ">= 1"),
        ({"exchange": "hierarchical", "ranks_per_node": 1.5}, TypeError, "integer"),
    ],
)
def test_ranks_per_node_is_checked(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TopKEFState(**options)


def reduce_in_nodes_of(
    rank: int, world_size: int, counts: list[int | None], dense_steps: int = 0
) -> str:
    state = TopKEFState(
        density=0.1, dense_steps=dense_steps, exchange="hierarchical", ranks_per_node=counts[rank]
    )
    try:
        all_reduce_(torch.ones(2000), state, name="w")
        return ""
    except (ValueError, RuntimeError) as error:
        return str(error)


def test_nodes_that_do_not_divide_the_world_size_are_refused(pools: ranks.Pools) -> None:
    for dense_steps in (0, 2):  # in the first step, even if it needs no nodes yet
        for message in pools.run(3, reduce_in_nodes_of, [2, 2, 2], dense_steps):
            assert "2 ranks per node do not divide the world size 3" in message


def test_ranks_with_other_nodes_disagree_in_words(pools: ranks.Pools) -> None:
    for message in pools.run(2, reduce_in_nodes_of, [2, 1]):
        assert "ranks_per_node (0 = by host): rank 0 has 2, rank 1 has 1" in message


def test_ranks_of_which_one_is_hierarchical_disagree_in_words(pools: ranks.Pools) -> None:
    options = [{"density": 0.05, "exchange": exchange} for exchange in ("hierarchical", "split")]
    outcomes = pools.run(2, test_agreement.disagree_about_options, "python", options, [None] * 2)
    case = Case(steps=3, state=test_agreement.FRESH)
    words = "exchange: rank 0 has hierarchical, rank 1 has split"
    test_agreement.assert_clear_and_harmless(outcomes, case, words)


# ---- order and failures


@needs_python_groups
def test_buckets_that_overtake_each_other_between_collectives_give_the_same(
    pools: ranks.Pools, seed: int
) -> None:
    assert_delays_change_nothing(pools, 4, Run("normal", seed, 4, options=options_of(2)))


def damage_slot(payload: Tensor) -> Tensor:
    payload = payload.clone()
    payload[0] ^= 1
    return payload


def reduce_with_damage(rank: int, world_size: int, victim: int) -> tuple[str, Tensor, Tensor, str]:
    """Every all-gather of the victim is damaged in one step: between the nodes, or inside of them."""
    between = Between()
    state = Run("integers", 0, options=options_of(2)).state(changed_groups(Between(), between))

    def reduce(step: int) -> None:
        all_reduce_(gradient("integers", 0, rank, step, 4000), state, name="w")

    reduce(0)
    before = state.state_dict()["residuals"]["w"]
    if rank == victim:
        between.before_all_gather = damage_slot
    message, _ = failing(lambda: reduce(1))
    between.before_all_gather = None
    after = state.state_dict()["residuals"]["w"]
    try:
        reduce(2)
        last = ""
    except RuntimeError as error:
        last = str(error)
    return message, before, after, last


def mean_of_the_damaged_step(rank: int) -> Tensor:
    """Of the gradients of its node, this rank's shard."""
    node = [gradient("integers", 0, rank // 2 * 2 + other, 1, 4000) for other in range(2)]
    return sum(node)[contracts.shard_of(4000, rank % 2, 2)] / 2


@stand_in.host_contract
@needs_python_groups
def test_a_damaged_payload_between_nodes_is_refused_by_every_rank_that_it_reaches(
    pools: ranks.Pools,
) -> None:
    outcomes = pools.run(4, reduce_with_damage, 1)
    for rank, (message, before, after, _) in enumerate(outcomes):
        assert "failed at step 1" in message, rank
        assert re.search("the (payload|shard) of rank [13]", message), "of the owners of that shard"
        expected = before + mean_of_the_damaged_step(rank)
        assert_same_bits(after + 0, expected + 0, "nothing is lost")


@stand_in.host_contract
@needs_python_groups
def test_above_16_nodes_a_damaged_average_is_refused_by_every_rank_and_nothing_is_lost() -> None:
    """Of an owner of odd rank: those that own the same shard refuse its bytes, and tell the others of their nodes."""
    victim = 5
    outcomes = ranks.run(34, without_warnings, reduce_with_damage, victim, timeout_s=120)
    for rank, (message, before, after, last) in enumerate(outcomes):
        assert "failed at step 1" in message and last == "", (rank, message, last)
        if rank % 2 == victim % 2:
            assert f"the payload of rank {victim} is not what this rank expects" in message
        else:
            assert f"the shard of rank {rank + 1} is not what this rank expects" in message
            # The victim's mate gets damaged bytes inside the node, too.
            assert ("its rank had nothing to send" in message) == (rank != victim - 1)
        expected = before + mean_of_the_damaged_step(rank)
        # Averages of 17 nodes are rounded, and what their owners took over of that has been given back.
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


@needs_python_groups
def test_a_rank_killed_between_two_collectives_gives_words_and_nothing_is_lost() -> None:
    """At its node's payload. Rank 3 waits for it, and tells rank 2, which waits for rank 3."""
    case = Case(
        "python",
        3,
        gradients_of=integers,
        state={"exchange": "hierarchical", "ranks_per_node": 2, "dense_steps": 0},
        ddp={"gradient_as_bucket_view": True},
    )
    outcomes = ranks.run(
        4,
        train_until,
        case,
        Between(),
        Between(before_all_gather=die),
        allow_death=True,
        group_timeout_s=4.0,
    )
    assert outcomes[VICTIM] == ranks.Died(-signal.SIGKILL)
    for rank in (0, 2, 3):
        failed, after, buckets = outcomes[rank]
        assert "failed at step 3" in failed.message and f"on rank {rank} of 4" in failed.message
        words = "another rank has died or is stalled"
        if rank == 2 and stand_in.PATH is None:  # on a device nothing is known in time
            words = (
                "the shard of rank 3 is not what this rank expects (its rank had nothing to send"
            )
        assert words in failed.message
        assert failed.message.count("failed at step") == 1
        assert "loaded another checkpoint" not in failed.message
        assert failed.seconds < 12 and after.message != ""
        _, kept = hierarchical_steps(case, 4, buckets)
        node = [case.gradients(r, 3) for r in (rank // 2 * 2, rank // 2 * 2 + 1)]
        for name, residual in failed.residuals.items():
            shard = contracts.shard_of(math.prod(SHAPES[name]), rank % 2, 2)
            mean = sum(gradients[name].reshape(-1)[shard] for gradients in node) / 2
            expected = kept[rank // 2][name][shard] + mean
            assert_same_bits(residual + 0, expected + 0, f"{name} on rank {rank}")
