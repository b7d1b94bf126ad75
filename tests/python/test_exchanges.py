"""The exchanges "split" and "dense", and which one a state takes: against the oracle, in contracts, and when something goes wrong.

Every combination of all exchanges with the other options is here, too; test_hierarchical.py has the rest of "hierarchical".
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Any

import contracts
import pytest
import ranks
import stand_in
import test_agreement
import test_failures
import test_non_finite
import torch
import torch.distributed as dist
from contracts import SplitOracle, Step
from ddp_models import (
    SHAPES,
    BucketRecorder,
    Case,
    GivenGradients,
    Oracle,
    Record,
    assert_equals_oracle,
    assert_residuals,
    assert_same_bits,
    both_scopes,
    build,
    gradients_on,
    integers,
    normal,
    replace_in,
    train,
)
from process_groups import Between, changed_groups, needs_python_groups
from stage_cases import DTYPES, VALUE_FORMATS, each_value_format
from test_failures import VICTIM, Survived, assert_says, failing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import (
    AutoExchange,
    ExchangeCosts,
    TopKEFState,
    all_reduce_,
    all_reduce_gradients,
    topk_ef_hook,
)
from compressed_ddp._native import _C

SEGMENTS = [4300, 60, 1700, 9, 130]  # those of 60 and 9 are shorter than min_compress_numel
DENSITY, MIN_COMPRESS_NUMEL = 0.02, 100
DENSE_TYPES = {
    "dense_fp32": torch.float32,
    "dense_bf16": torch.bfloat16,
    "dense_fp16": torch.float16,
}
EXCHANGES = ["allgather", "split", "hierarchical", "dense", *DENSE_TYPES, "auto"]
# Bytes cost, and nothing else does: a bucket that is all dense part travels dense, any other one sparse.
BYTES_COST = ExchangeCosts(1e-12, 1e-8, 1e-18, 1e-18, 1e-18)
WORLD_SIZES = pytest.mark.parametrize("world_size", [2, 3, 4], ids="ranks={}".format)


def all_pairs(*columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations in which every two values of two columns come together; greedy, the same in every run."""
    columns_in_twos = list(itertools.combinations(range(len(columns)), 2))
    left = {
        (i, a, j, b) for i, j in columns_in_twos for a in range(len(columns[i])) for b in range(len(columns[j]))
    }  # fmt: skip
    everything = list(itertools.product(*(range(len(column)) for column in columns)))
    chosen = []
    while left:

        def new_pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
            return {(i, row[i], j, row[j]) for i, j in columns_in_twos} & left  # noqa: B023

        best = max(everything, key=lambda row: len(new_pairs(row)))
        left -= new_pairs(best)
        chosen.append(tuple(column[at] for column, at in zip(columns, best)))
    return chosen


def in_pairs(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parameters of a test, as all_pairs."""
    return pytest.mark.parametrize(
        list(factors),
        all_pairs(*factors.values()),
        ids=lambda value: value if isinstance(value, str) else None,
    )


SCOPES, ENTRIES = ["tensor", "bucket", "chunk"], ["python", "cpp"]


def parts_of(segments: list[int], scope: str) -> list[contracts.Part]:
    return contracts.parts_of([(n, n < MIN_COMPRESS_NUMEL) for n in segments], scope)


def gradient(kind: str, seed: int, rank: int, step: int, numel: int) -> Tensor:
    """The same for the same arguments, so that every process can rebuild every rank's."""
    generator = torch.Generator().manual_seed(seed + 1009 * rank + 9973 * step)
    if kind == "integers":
        return torch.randint(-8, 9, (numel,), generator=generator).float()
    return torch.randn(numel, generator=generator)


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps of one bucket through all_reduce_."""

    kind: str
    seed: int
    steps: int = 4
    segments: tuple[int, ...] = tuple(SEGMENTS)
    dtype: torch.dtype = torch.float32
    options: tuple[tuple[str, Any], ...] = ()

    def gradient(self, rank: int, step: int) -> Tensor:
        return gradient(self.kind, self.seed, rank, step, sum(self.segments)).to(self.dtype)

    def state(self, process_group: dist.ProcessGroup | None = None) -> TopKEFState:
        options = {
            "density": DENSITY,
            "dense_steps": 0,
            "min_compress_numel": MIN_COMPRESS_NUMEL,
            "exchange": "split",
            **dict(self.options),
        }
        return TopKEFState(process_group, **options)


def residual_of(state: TopKEFState, numel: int, name: str = "w") -> Tensor:
    return state.state_dict()["residuals"].get(name, torch.zeros(numel))


@dataclasses.dataclass
class Seen:
    before: Tensor
    after: Tensor
    result: Tensor
    metrics: dict[str, float]


def reduce_steps(rank: int, world_size: int, run: Run) -> list[Seen]:
    state = run.state()
    seen = []
    for step in range(run.steps):
        tensor = run.gradient(rank, step)
        before = residual_of(state, tensor.numel())
        all_reduce_(tensor, state, name="w", segments=run.segments)
        after = residual_of(state, tensor.numel())
        seen.append(Seen(before, after, tensor, state.metrics()))
    return seen


def reduce_steps_of_all(rank: int, world_size: int, runs: list[Run]) -> list[list[Seen]]:
    return [reduce_steps(rank, world_size, run) for run in runs]


def split_oracle(run: Run, world_size: int) -> SplitOracle:
    options = {"scope": "tensor", "density": DENSITY, **dict(run.options)}
    options.pop("exchange", None)
    parts = parts_of(list(run.segments), options["scope"])
    return SplitOracle(world_size, parts, **options)


def assert_equals_split_oracle(by_rank: list[list[Seen]], run: Run) -> None:
    oracle = split_oracle(run, len(by_rank))
    for step in range(run.steps):
        expected = oracle.step([run.gradient(rank, step) for rank in range(len(by_rank))])
        for rank, seen in enumerate(by_rank):
            where = f"on rank {rank} after step {step}"
            assert_same_bits(seen[step].result + 0, expected + 0, f"result {where}")
            assert_same_bits(seen[step].after + 0, oracle.residuals[rank] + 0, f"residual {where}")


# ---- the oracle


def test_ranges_are_those_of_the_oracle(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    for _ in range(30):
        tensors = [(1 + below(6000), below(3) == 0) for _ in range(1 + below(6))]
        scope, value_format = (
            ["tensor", "bucket", "chunk"][below(3)],
            ["fp32", "bf16", "sign"][below(3)],
        )
        parts = contracts.parts_of(tensors, scope)
        numel, world_size, density = (
            sum(n for n, _ in tensors),
            1 + below(9),
            0.001 + 0.1 * below(9),
        )
        ranges = contracts.cut(parts, world_size, scope, density, value_format)
        assert len(ranges) == world_size
        assert ranges[0][0] == 0 and ranges[-1][1] == numel
        for (_, end), (begin, _) in itertools.pairwise(ranges):
            assert end == begin and (end % 8 == 0 or end == numel)
        ends = _C.range_ends(
            [(part.numel, part.dense) for part in parts],
            world_size,
            density,
            value_format,
            scope == "bucket",
        )
        assert ends == [end for _, end in ranges]


@each_value_format
@both_scopes
@WORLD_SIZES
def test_results_and_residuals_equal_the_oracle_bit_for_bit(
    pools: ranks.Pools, world_size: int, scope: str, value_format: str, seed: int
) -> None:
    options = (("scope", scope), ("value_format", value_format))
    # From the second step on the residuals hold what came back.
    runs = [Run(kind, seed, n, options=options) for kind, n in (("integers", 2), ("normal", 3))]
    for run, by_rank in zip(runs, zip(*pools.run(world_size, reduce_steps_of_all, runs))):
        assert_equals_split_oracle(list(by_rank), run)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@each_value_format
def test_gradients_in_16_bits_equal_the_oracle(
    pools: ranks.Pools, value_format: str, dtype: torch.dtype, seed: int
) -> None:
    run = Run("normal", seed, dtype=dtype, options=(("value_format", value_format),))
    assert_equals_split_oracle(pools.run(3, reduce_steps, run), run)


@in_pairs(scope=SCOPES, value_format=VALUE_FORMATS)
def test_without_error_feedback_nothing_is_kept_and_results_equal_the_oracle(
    pools: ranks.Pools, scope: str, value_format: str, seed: int
) -> None:
    options = (("scope", scope), ("value_format", value_format), ("error_feedback", False))
    run = Run("normal", seed, options=options)
    by_rank = pools.run(3, reduce_steps, run)
    assert_equals_split_oracle(by_rank, run)
    assert not any(seen.after.any() for seen in itertools.chain(*by_rank))


@pytest.mark.parametrize(
    "segments",
    [(0,), (1,), (7,), (8,), (9,), (17,), (24,), (60, 0, 30), (6, 0, 3)],
    ids=str,
)
def test_buckets_smaller_than_8_entries_per_rank_leave_some_owners_without_a_range(
    pools: ranks.Pools, segments: tuple[int, ...], seed: int
) -> None:
    run = Run("integers", seed, segments=segments, options=(("density", 0.1),))
    by_rank = pools.run(4, reduce_steps, run)
    assert_equals_split_oracle(by_rank, run)


@pytest.mark.filterwarnings("ignore:.*one rank")
@each_value_format
def test_one_rank_alone_equals_the_oracle_and_sends_nothing(
    pools: ranks.Pools, value_format: str, seed: int
) -> None:
    run = Run("normal", seed, options=(("value_format", value_format),))
    by_rank = pools.run(1, reduce_steps, run)
    assert_equals_split_oracle(by_rank, run)
    assert all(seen.metrics["compressed_ddp/bytes_sent"] == 0 for seen in by_rank[0])


# ---- contracts


def steps_of(by_rank: list[list[Seen]], run: Run) -> list[Step]:
    steps = []
    for step in range(run.steps):
        seen = [of_rank[step] for of_rank in by_rank]
        steps.append(
            Step(
                [run.gradient(rank, step).float() for rank in range(len(by_rank))],
                [s.before for s in seen],
                [s.after for s in seen],
                [s.result for s in seen],
            )
        )
    return steps


def assert_replicas_are_identical(steps: list[Step]) -> None:
    for step in steps:
        for result in step.results[1:]:
            assert_same_bits(result, step.results[0], "replicas")


def compressed_of(segments: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.full((n,), n >= MIN_COMPRESS_NUMEL) for n in segments])


def not_conserved(steps: list[Step], compressed: Tensor) -> Tensor:
    """world_size * sum of results + residuals - sum of gradients, in double."""
    world_size = len(steps[0].gradients)
    total = sum(residual.double() for residual in steps[-1].residuals_after)
    for step in steps:
        total += world_size * step.results[0].double() - sum(g.double() for g in step.gradients)
    return total[compressed]


@in_pairs(world_size=[2, 4], scope=SCOPES, value_format=VALUE_FORMATS)
def test_on_integer_gradients_nothing_is_lost_or_made(
    pools: ranks.Pools, world_size: int, scope: str, value_format: str, seed: int
) -> None:
    """Bit for bit, but for mean magnitudes, which are rounded."""
    options = (("scope", scope), ("value_format", value_format))
    run = Run("integers", seed, 20, options=options)
    steps = steps_of(pools.run(world_size, reduce_steps, run), run)
    assert_replicas_are_identical(steps)
    off = not_conserved(steps, compressed_of(run.segments)).abs().max()
    if value_format == "sign":
        assert off <= 1e-5 * 8 * world_size * math.sqrt(run.steps)
    else:
        assert off == 0
    for step in steps:
        dense = ~compressed_of(run.segments)
        mean = sum(step.gradients) / world_size
        assert torch.equal(step.results[0][dense], mean[dense]), "dense segments are averaged"


@in_pairs(world_size=[2, 3], scope=SCOPES, value_format=VALUE_FORMATS)
def test_on_a_stationary_stream_the_residuals_stop_growing(
    pools: ranks.Pools, world_size: int, scope: str, value_format: str, seed: int
) -> None:
    options = (("scope", scope), ("value_format", value_format), ("density", 0.1))
    run = Run("normal", seed, 60, (3000, 60, 800), options=options)
    steps = steps_of(pools.run(world_size, reduce_steps, run), run)
    assert_replicas_are_identical(steps)
    off = not_conserved(steps, compressed_of(run.segments)).abs().max()
    assert off <= 1e-5 * 5 * world_size * math.sqrt(run.steps)

    def norm(step: Step) -> float:
        return math.sqrt(sum(e.double().square().sum().item() for e in step.residuals_after))

    assert norm(steps[-1]) <= 1.2 * norm(steps[len(steps) // 2])


@pytest.mark.parametrize("value_format", ["fp32", "bf16", "sign"])
def test_an_average_below_what_fp16_can_hold_goes_back_once(
    pools: ranks.Pools, value_format: str
) -> None:
    """What its rounding lost must not come on top of it."""
    seen = pools.run(3, reduce_a_tiny_entry, value_format)
    assert not any(of_rank.result.any() for of_rank in seen)
    expected = torch.zeros(4096, dtype=torch.float64)
    expected[7] = 2.0**-24
    assert torch.equal(sum(of_rank.after.double() for of_rank in seen), expected)


def reduce_a_tiny_entry(rank: int, world_size: int, value_format: str) -> Seen:
    """The average, 2 ** -24 / 3, is less than half of fp16's smallest number."""
    state = TopKEFState(density=1e-4, dense_steps=0, exchange="split", value_format=value_format)
    tensor = torch.zeros(4096, dtype=torch.float16)
    if rank == 0:
        tensor[7] = 2.0**-24
    all_reduce_(tensor, state, name="w")
    return Seen(torch.zeros(4096), residual_of(state, 4096), tensor, state.metrics())


def reduce_tiny_entries_once(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, sum of all results, number of results that are not 0, residual: in units of fp16's smallest number.

    After the first step all gradients are zero.
    """
    state = TopKEFState(density=0.01, dense_steps=0, exchange="split", value_format="sign")
    unit = 2.0**-24
    given = torch.randint(-2, 3, (4096,), generator=torch.Generator().manual_seed(rank)).float()
    results, applied = torch.zeros(4096), torch.zeros(4096)
    for step in range(20):
        tensor = (given * unit if step == 0 else torch.zeros(4096)).half()
        all_reduce_(tensor, state, name="w")
        results += tensor.float() / unit
        applied += tensor != 0
    return given, results, applied, residual_of(state, 4096) / unit


def test_averages_below_what_fp16_can_hold_do_not_grow_out_of_nothing(pools: ranks.Pools) -> None:
    given, results, applied, kept = zip(*pools.run(4, reduce_tiny_entries_once))
    off = 4 * results[0] + sum(kept) - sum(given)
    # A result that arrives is rounded to a unit: by half of one, for each of four ranks.
    assert torch.all(off.abs() <= 2 * applied[0] + 1e-4)
    assert applied[0].sum() > 0


# ---- every combination, in pairs

FACTORS: dict[str, list[Any]] = {
    "scope": ["tensor", "bucket", "chunk"],
    "exchange": EXCHANGES,
    "value_format": ["fp32", "bf16", "sign"],
    "entry": ["python", "cpp", "all_reduce_", "all_reduce_gradients"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "world_size": [2, 3, 4],
}
CELL_STEPS = 4


def case_of(
    scope: str, exchange: str, value_format: str, entry: str, dtype: torch.dtype, world_size: int
) -> Case:
    state = {
        "scope": scope,
        "exchange": exchange,
        "value_format": value_format,
        "dense_steps": 0,
        "density": 0.05,
    }
    if exchange == "hierarchical":
        state["ranks_per_node"] = 3 if world_size == 3 else 2
    if exchange == "auto":
        state["exchange"] = AutoExchange(costs=BYTES_COST)
    return Case(entry, CELL_STEPS, dtypes=dict.fromkeys(SHAPES, dtype), state=state)


def run_cell(rank: int, world_size: int, case: Case) -> Record:
    """As ddp_models.train, through any entry."""
    if case.entry in ("python", "cpp"):
        return train(rank, world_size, case)
    record = Record([], [], {}, [], "")
    state = TopKEFState(**case.options())
    model = {
        name: nn.Parameter(torch.ones(shape, dtype=case.dtypes[name]))
        for name, shape in case.shapes.items()
    }
    for step in range(case.steps):
        gradients = case.gradients(rank, step)
        if case.entry == "all_reduce_":
            for name, tensor in gradients.items():
                all_reduce_(tensor, state, name=name)
            record.gradients.append(gradients)
            record.buckets.append([[name] for name in gradients])
        else:
            for name, parameter in model.items():
                parameter.grad = gradients[name]
            all_reduce_gradients(model.items(), state)
            record.gradients.append({name: p.grad.clone() for name, p in model.items()})
            record.buckets.append([[*gradients, "presence"]])
        record.metrics.append(state.metrics())
    record.residuals = state.state_dict()["residuals"]
    return record


def with_presence(name: str, rank: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """all_reduce_gradients has one entry more per parameter: whether it has a gradient."""
    return torch.ones(shape) if name == "presence" else normal(name, rank, step, shape)


def check_cell(records: list[Record], case: Case) -> None:
    if case.entry == "all_reduce_gradients":
        presence = (len(case.shapes),)
        dtype = next(iter(case.dtypes.values()))
        case = dataclasses.replace(
            case,
            shapes={**case.shapes, "presence": presence},
            dtypes={**case.dtypes, "presence": dtype},
            gradients_of=with_presence,
        )
        for record in records:
            for gradients in record.gradients:
                gradients["presence"] = torch.ones(presence, dtype=dtype)
    for record in records[1:]:
        for ours, first in zip(record.gradients, records[0].gradients):
            for name, tensor in ours.items():
                assert_same_bits(tensor, first[name], f"replicas of {name}")
    exchange = case.state["exchange"]
    if exchange == "hierarchical":
        assert_equals_hierarchical_oracle(records, case)
    elif isinstance(exchange, AutoExchange):
        check_auto(records, case)
    elif exchange.startswith("dense"):
        for record in records:
            assert record.residuals == {}
        assert_are_means(records, case, case.shapes, DENSE_TYPES.get(exchange))
    else:
        assert_equals_oracle(records, case)


def assert_are_means(
    records: list[Record], case: Case, names: Iterable[str], sent_as: torch.dtype | None
) -> None:
    for record in records:
        for step, gradients in enumerate(record.gradients):
            given = [case.gradients(rank, step) for rank in range(len(records))]
            for name in names:
                tensor = gradients[name]
                mean = sum(g[name].double() for g in given) / len(records)
                eps = max(torch.finfo(tensor.dtype).eps, torch.finfo(sent_as or tensor.dtype).eps)
                torch.testing.assert_close(
                    tensor.double(), mean, rtol=4 * eps, atol=16 * eps, msg=name
                )


def check_auto(records: list[Record], case: Case) -> None:
    """Tensors that all_reduce_ sends by themselves and that no selection is made from travel dense; the others as with allgather."""
    oracle = Oracle(case, len(records))
    dense = {name for name in case.shapes if not oracle.is_compressed(name)}
    if case.entry != "all_reduce_":
        dense = set()  # each of them shares a bucket with others
    assert_are_means(records, case, dense, None)
    for record in records:
        for metrics in record.metrics:
            assert (metrics["compressed_ddp/bytes_sent_all_reduce"] > 0) == bool(dense)
            assert metrics["compressed_ddp/bytes_sent_all_gather"] > 0
        record.gradients = [
            {name: tensor for name, tensor in of_step.items() if name not in dense}
            for of_step in record.gradients
        ]
        record.buckets = [
            [names for names in of_step if not dense.intersection(names)]
            for of_step in record.buckets
        ]
    shapes = {name: shape for name, shape in case.shapes.items() if name not in dense}
    assert_equals_oracle(records, dataclasses.replace(case, shapes=shapes))


def hierarchical_steps(
    case: Case, world_size: int, buckets: list[list[list[str]]]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """buckets: names by step and bucket -> averages by step, and at the end the residuals of the nodes, both by name and flat."""
    options = case.options()
    ranks_per_node = options["ranks_per_node"]

    def is_dense(name: str) -> bool:
        return len(case.shapes[name]) <= 1 or math.prod(case.shapes[name]) < 1024

    numels = {name: math.prod(shape) for name, shape in case.shapes.items()}
    kept = [
        {name: torch.zeros(numel) for name, numel in numels.items()}
        for _ in range(world_size // ranks_per_node)
    ]
    averages: list[dict[str, Tensor]] = []
    for step, of_step in enumerate(buckets):
        given = [case.gradients(rank, step) for rank in range(world_size)]
        averages.append({})
        for names in of_step:
            oracle = contracts.HierarchicalOracle(
                world_size,
                ranks_per_node,
                [[(numels[name], is_dense(name))] for name in names],
                scope=options.get("scope", "tensor"),
                density=options["density"],
                value_format=options.get("value_format", "bf16"),
            )
            sizes = [numels[name] for name in names]
            oracle.take_node_residuals(
                [torch.cat([residuals[name] for name in names]) for residuals in kept]
            )
            average = oracle.step(
                [torch.cat([gradients[n].reshape(-1) for n in names]) for gradients in given]
            )
            averages[-1].update(zip(names, average.split(sizes)))
            for residuals, node in zip(kept, oracle.node_residuals()):
                residuals.update(zip(names, node.split(sizes)))
    return averages, kept


def assert_equals_hierarchical_oracle(records: list[Record], case: Case) -> None:
    """Results bit for bit in every step, and at the end the shards put together."""
    ranks_per_node = case.options()["ranks_per_node"]
    averages, kept = hierarchical_steps(case, len(records), records[0].buckets)
    for rank, record in enumerate(records):
        for step, expected in enumerate(averages):
            for name, average in expected.items():
                got = record.gradients[step][name].reshape(-1)
                assert_same_bits(got + 0, average + 0, f"{name} on rank {rank}, step {step}")
        for name, residual in record.residuals.items():
            whole = kept[rank // ranks_per_node][name]
            shard = contracts.shard_of(whole.numel(), rank % ranks_per_node, ranks_per_node)
            assert_same_bits(residual + 0, whole[shard] + 0, f"residual of {name} on rank {rank}")


@pytest.mark.parametrize(
    "cell",
    all_pairs(*FACTORS.values()),
    ids=lambda cell: "-".join(str(value).removeprefix("torch.") for value in cell),
)
def test_all_pairs_of_options_entries_and_dtypes(pools: ranks.Pools, cell: tuple[Any, ...]) -> None:
    case = case_of(*cell)
    check_cell(pools.run(cell[-1], run_cell, case), case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    os.environ.get("COMPRESSED_DDP_FULL_MATRIX") != "1",
    reason="takes minutes: set COMPRESSED_DDP_FULL_MATRIX=1",
)
def test_the_whole_matrix_on_eight_ranks(
    pools: ranks.Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    world_size = 8
    names = ("scope", "exchange", "value_format", "entry")
    broken = []
    for number, cell in enumerate(itertools.product(*(FACTORS[name] for name in names))):
        dtype = FACTORS["dtype"][number % len(FACTORS["dtype"])]  # each with many others
        case, start = case_of(*cell, dtype, world_size), time.monotonic()
        try:
            check_cell(pools.run(world_size, run_cell, case, timeout_s=120), case)
            outcome = "ok"
        except AssertionError as error:
            broken.append(cell)
            outcome = f"BROKEN {str(error)[:200]!r}"
        with capsys.disabled():
            words = " ".join(str(value).removeprefix("torch.") for value in (*cell, dtype))
            print(f"{words}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
    assert broken == []


# ---- non-finite values, rollback, checkpoints

SPLIT: dict[str, Any] = {"exchange": "split"}
BAD_STEP = 3
# DDP's buckets from the second step on, as ddp_models.SMALL_BUCKETS cuts them.
BUCKETS = [
    ["third_bias", "third_weight"],
    ["tiny_weight", "second_weight"],
    ["first_bias", "first_weight"],
]


def assert_each_step_equals_the_oracle(
    seen: list[Any], case: Case, rolled_back: int | None = None
) -> None:
    """`seen`: of test_non_finite.train_and_look_at_residuals."""
    oracle = Oracle(case, len(seen))
    for step in range(case.steps):
        given = [case.gradients(rank, step) for rank in range(len(seen))]
        expected = oracle.step(given, BUCKETS)
        if step == rolled_back:
            oracle.rollback(given)
        for rank, of_rank in enumerate(seen):
            gradients, residuals = of_rank[step]
            for name in SHAPES:
                if step >= case.options()["dense_steps"]:
                    where = f"{name} on rank {rank} in step {step}"
                    assert_same_bits(gradients[name] + 0, expected[name] + 0, where)
            if residuals:
                assert_residuals(residuals, oracle, rank)


@in_pairs(
    entry=ENTRIES,
    value_format=VALUE_FORMATS,
    value=[math.inf, math.nan],
    name=["first_weight", "second_weight", "third_bias"],
)
def test_one_non_finite_value_makes_the_whole_bucket_nan_on_every_rank_and_is_undone(
    pools: ranks.Pools, entry: str, value_format: str, value: float, name: str
) -> None:
    bad = replace_in(integers, {(name, 1, BAD_STEP): value})
    case = Case(entry, 6, gradients_of=bad, state={**SPLIT, "value_format": value_format})
    seen = pools.run(2, test_non_finite.train_and_look_at_residuals, case, None)
    assert_each_step_equals_the_oracle(seen, case)
    for of_rank in seen:
        nan_in = {n for n, g in of_rank[BAD_STEP][0].items() if g.isnan().all()}
        assert nan_in == next(set(bucket) for bucket in BUCKETS if name in bucket)
        assert all(g.isfinite().all() for g in of_rank[BAD_STEP + 1][0].values())


def reduce_to_overflow(rank: int, world_size: int, options: dict[str, Any]) -> list[Tensor]:
    state = TopKEFState(density=0.01, dense_steps=0, value_format="fp32", **options)
    tensor = gradient("normal", 5, rank, 0, 2000)
    tensor[700] = 3e38
    given = tensor.clone()
    result = all_reduce_(tensor, state, name="w")
    return [result, given, state.state_dict()["residuals"]["w"]]


@pytest.mark.parametrize(
    "options",
    [
        {"exchange": "allgather"},
        {"exchange": "split"},
        {"exchange": "hierarchical", "ranks_per_node": 2},
    ],
    ids=lambda options: options["exchange"],
)
def test_finite_gradients_whose_sum_overflows_make_a_bad_step(
    pools: ranks.Pools, options: dict[str, Any]
) -> None:
    for result, given, residual in pools.run(2, reduce_to_overflow, options):
        if options["exchange"] == "allgather":
            assert result[700].isinf() and result.isinf().sum() == 1 and not result.isnan().any()
        else:  # the average, or the node's, is sent once more
            assert result.isnan().all()
        if options["exchange"] != "hierarchical":  # whose node has no finite mean to keep
            assert torch.equal(residual, given)


def test_a_non_finite_value_in_the_range_of_any_of_three_owners_reaches_all_of_them(
    pools: ranks.Pools,
) -> None:
    for seen in pools.run(3, reduce_with_nan_at, [0, 2999, 5999]):
        for before, result, after, good in seen:
            assert result.isnan().all()
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)  # NaN is never kept
            assert good.isfinite().all()


def reduce_with_nan_at(
    rank: int, world_size: int, positions: list[int]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    state = Run("", 0).state()
    seen = []
    for position in positions:
        good = all_reduce_(gradient("integers", position, rank, 0, 6000), state, name="w")
        before = residual_of(state, 6000)
        bad = torch.zeros(6000)
        if rank == 1:
            bad[position] = torch.nan
        all_reduce_(bad, state, name="w")
        seen.append((before, bad, residual_of(state, 6000), good))
    return seen


@in_pairs(world_size=[2, 4], entry=ENTRIES, value_format=VALUE_FORMATS)
def test_rollback_gives_back_exactly_what_a_good_step_took(
    pools: ranks.Pools, world_size: int, entry: str, value_format: str
) -> None:
    case = Case(entry, 5, gradients_of=integers, state={**SPLIT, "value_format": value_format})
    seen = pools.run(world_size, test_non_finite.train_and_look_at_residuals, case, 3)
    assert_each_step_equals_the_oracle(seen, case, rolled_back=3)
    # Against the definition, too: as if nothing had been sent.
    oracle = Oracle(case, world_size)
    for step in range(3):
        oracle.step([case.gradients(rank, step) for rank in range(world_size)], BUCKETS)
    for rank, of_rank in enumerate(seen):
        for name, residual in of_rank[3][1].items():
            expected = oracle.residuals[rank][name] + case.gradients(rank, 3)[name]
            atol = 1e-5 if value_format == "sign" else 0
            torch.testing.assert_close(residual, expected, rtol=0, atol=atol)


@dataclasses.dataclass
class Resumed:
    gradients: list[dict[str, Tensor | None]]
    saved: dict[str, Any]


def train_from(
    rank: int, world_size: int, case: Case, begin: int, saved: list[dict[str, Any]] | None
) -> Resumed:
    model, state = build(case)
    if saved is not None:
        state.load_state_dict(saved[rank])
    gradients = []
    for step in range(begin, case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        gradients.append(gradients_on(model))
    return Resumed(gradients, copy.deepcopy(state.state_dict()))


@in_pairs(entry=ENTRIES, scope=SCOPES, value_format=VALUE_FORMATS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    pools: ranks.Pools, entry: str, scope: str, value_format: str
) -> None:
    options = {**SPLIT, "dense_steps": 1, "scope": scope, "value_format": value_format}
    # Ranges are those of a bucket: DDP has the same ones from the first step on.
    ddp = {"bucket_cap_mb": 0.006, "find_unused_parameters": True}
    case = Case(entry, 7, state=options, ddp=ddp)
    whole = pools.run(2, train_from, case, 0, None)
    half = pools.run(2, train_from, dataclasses.replace(case, steps=4), 0, None)
    resumed = pools.run(2, train_from, case, 4, [run.saved for run in half])
    for ours, theirs in zip(resumed, whole):
        assert {**ours.saved, "residuals": None} == {**theirs.saved, "residuals": None}
        assert ours.saved["exchange"] == "split" and ours.saved["step"] == 7
        for name, residual in theirs.saved["residuals"].items():
            assert_same_bits(ours.saved["residuals"][name], residual, name)
        for one, other in zip(ours.gradients, theirs.gradients[4:], strict=True):
            for name in SHAPES:
                assert_same_bits(one[name], other[name], name)


@in_pairs(entry=ENTRIES, scope=SCOPES, value_format=["fp32", "bf16"])
def test_parameters_that_are_not_used_keep_their_residual_and_send_nothing(
    pools: ranks.Pools, entry: str, scope: str, value_format: str
) -> None:
    unused = {
        ("second_weight", 1, 2): None,  # on one rank
        ("first_weight", 0, 3): None,
        ("third_weight", 1, 3): None,
        **{("first_weight", rank, 4): None for rank in range(3)},  # on all
    }
    case = Case(
        entry,
        6,
        gradients_of=replace_in(normal, unused),
        state={**SPLIT, "dense_steps": 0, "scope": scope, "value_format": value_format},
        ddp={"bucket_cap_mb": 0.006, "find_unused_parameters": True},
    )
    assert_equals_oracle(pools.run(3, train, case), case)


# ---- what goes wrong between the ranks


def build_between(case: Case, first: Between, second: Between) -> tuple[Any, TopKEFState]:
    """As ddp_models.build, with a state whose payloads pass through a test's hands."""
    model = DistributedDataParallel(GivenGradients(case), **case.ddp)
    state = TopKEFState(changed_groups(first, second), **case.options())
    model.register_comm_hook(state.bind(model), topk_ef_hook)
    return model, state


def train_until(
    rank: int, world_size: int, case: Case, first: Between, second: Between
) -> tuple[Survived, Survived, list[list[list[str]]]]:
    """A failing step on all ranks, in which the victim's groups do `first` and `second`; then one more."""
    quiet_first, quiet_second = Between(), Between()
    model, state = build_between(case, quiet_first, quiet_second)
    recorder, buckets = BucketRecorder(case), []
    for step in range(case.steps):
        buckets.append(recorder.step(case.gradients(rank, step)))
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
    if rank == VICTIM:
        quiet_first.__dict__.update(first.__dict__)
        quiet_second.__dict__.update(second.__dict__)
    model.zero_grad()
    message, seconds = failing(lambda: model(case.gradients(rank, case.steps)).backward())
    failed = Survived(message, seconds, state.state_dict()["residuals"], gradients_on(model))
    quiet_first.__dict__.update(Between().__dict__)
    quiet_second.__dict__.update(Between().__dict__)
    model.zero_grad()
    start = time.monotonic()
    try:
        model(case.gradients(rank, case.steps + 1)).backward()
        message = ""
    except RuntimeError as error:
        message = str(error)
    residuals = state.state_dict()["residuals"]
    after = Survived(message, time.monotonic() - start, residuals, gradients_on(model))
    return failed, after, buckets


def die(payload: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return payload


def stall(payload: Tensor) -> Tensor:
    time.sleep(5.0)
    return payload


# Of three ranks, whose averages are rounded: fp32 values lose nothing all the same.
FAILING = Case(
    "python", 3, gradients_of=integers, state={**SPLIT, "dense_steps": 0, "value_format": "fp32"}
)
ONE_BUCKET = dataclasses.replace(FAILING, ddp={"gradient_as_bucket_view": True})
ONE_BUCKET_BF16 = dataclasses.replace(ONE_BUCKET, state={**SPLIT, "dense_steps": 0})


def assert_nothing_is_lost(
    failed: Survived, case: Case, rank: int, world_size: int, buckets: list[list[list[str]]]
) -> Oracle:
    """The residual is as if the failed step had sent nothing. Returns the oracle before that step."""
    oracle = Oracle(case, world_size)
    for step, names in enumerate(buckets):
        oracle.step([case.gradients(r, step) for r in range(world_size)], names)
    assert failed.residuals.keys() == oracle.residuals[rank].keys()
    for name, residual in failed.residuals.items():
        expected = oracle.residuals[rank][name] + case.gradients(rank, case.steps)[name]
        if case.state.get("value_format") == "fp32":
            assert_same_bits(residual + 0.0, expected + 0.0, name)
        else:  # 3 * lost was added and taken away
            torch.testing.assert_close(residual, expected, rtol=1e-6, atol=1e-5)
    return oracle


@needs_python_groups
@pytest.mark.parametrize(
    "case",
    [FAILING, ONE_BUCKET_BF16],
    ids=["several_buckets", "one_bucket_in_bf16"],
)
def test_a_rank_killed_between_the_two_collectives_gives_words_and_nothing_is_lost(
    case: Case,
) -> None:
    outcomes = ranks.run(
        3, train_until, case, Between(), Between(before_all_gather=die), allow_death=True
    )
    assert outcomes[VICTIM] == ranks.Died(-signal.SIGKILL)
    for rank in (0, 2):
        failed, after, buckets = outcomes[rank]
        assert_says(
            failed.message,
            "failed at step 3",
            f"on rank {rank} of 3",
            "another rank has died or is stalled",
            r"state\.state_dict\(\)",
        )
        assert_says(after.message, "failed at step 4")
        assert max(failed.seconds, after.seconds) < 10, "at once"
        assert_nothing_is_lost(failed, case, rank, 3, buckets)


@needs_python_groups
def test_a_rank_stalled_between_the_two_collectives_is_an_error_after_the_groups_timeout() -> None:
    outcomes = ranks.run(
        3,
        train_until,
        ONE_BUCKET,
        Between(),
        Between(before_all_gather=stall),
        group_timeout_s=3.0,
    )
    for rank, (failed, _, buckets) in enumerate(outcomes):
        assert_says(
            failed.message,
            "failed at step 3",
            f"on rank {rank} of 3",
            "stalled beyond the process group's timeout",
        )
        assert 2.5 < failed.seconds < 12
        assert_nothing_is_lost(failed, ONE_BUCKET, rank, 3, buckets)


@pytest.mark.parametrize(
    ("entry", "fatal_parameter"),
    [("python", "third_bias"), ("cpp", "first_weight")],
    ids=["before_its_first_hook", "after_its_first_hook"],
)
def test_a_killed_peer_gives_words_at_once_and_a_residual_that_lost_nothing(
    entry: str, fatal_parameter: str
) -> None:
    case = Case(entry, 3, gradients_of=integers, state={**SPLIT, "dense_steps": 1})
    outcomes = ranks.run(
        2, test_failures.train_until_a_peer_dies, case, fatal_parameter, allow_death=True
    )
    assert outcomes[VICTIM] == ranks.Died(-signal.SIGKILL)
    survived = outcomes[0]
    assert_says(survived.message, "failed at step 3", "another rank has died or is stalled")
    assert_says(survived.message_of_next_step, "failed at step 4")
    assert max(survived.seconds, survived.seconds_of_next_step) < 10
    oracle = Oracle(case, 2)
    for step in range(3):
        oracle.step(
            [case.gradients(r, step) for r in range(2)], BUCKETS if step else [list(SHAPES)]
        )
    for name, residual in survived.residuals.items():
        expected = oracle.residuals[0][name] + case.gradients(0, 3)[name]
        assert_same_bits(residual + 0.0, expected + 0.0, name)


class Damage:
    """Of bytes that begin at `begin`: those of a payload's header, index bits, or everything behind the header."""

    def __init__(self, what: str, begin: int = 0) -> None:
        self.what, self.begin = what, begin

    def __call__(self, payload: Tensor) -> Tensor:
        payload = payload.clone()
        match self.what:
            case "version":
                payload[self.begin] ^= 1
            case "step":
                payload[self.begin + 4] ^= 1
            case "rank":
                payload[self.begin + 2] ^= 3
            case "index_bits":
                payload[self.begin + 8 + 8] ^= 255
        return payload


DAMAGES = {
    "version": "wire format version",
    "step": "step: expected 3, got 2",
    "rank": "rank: expected 1, got 2",
    "index_bits": "index",
}


def assert_failed_without_a_trace(outcomes: list[Any]) -> None:
    """No bucket was touched, no residual has lost anything, and the next step is a good one."""
    world_size = len(outcomes)
    for rank, (failed, _, buckets) in enumerate(outcomes):
        assert failed.seconds < 10
        oracle = assert_nothing_is_lost(failed, ONE_BUCKET, rank, world_size, buckets)
        for name, tensor in failed.gradients.items():
            assert_same_bits(tensor, ONE_BUCKET.gradients(rank, 3)[name], f"bucket of {name}")
    for rank, residuals in enumerate(oracle.residuals):
        for name, residual in residuals.items():
            residual += ONE_BUCKET.gradients(rank, 3)[name]
    expected = oracle.step([ONE_BUCKET.gradients(r, 4) for r in range(world_size)], buckets[-1])
    for rank, (_, after, _) in enumerate(outcomes):
        assert after.message == ""
        for name, tensor in after.gradients.items():
            assert_same_bits(tensor + 0.0, expected[name] + 0.0, name)
        assert_residuals(after.residuals, oracle, rank)


@stand_in.host_contract
@needs_python_groups
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_payload_is_named_by_its_owner_and_refused_by_all(
    pools: ranks.Pools, damage: str
) -> None:
    first = Between(before_all_to_all=Damage(damage))  # the part for owner 0
    outcomes = pools.run(3, train_until, ONE_BUCKET, first, Between())
    assert_says(outcomes[0][0].message, "the payload of rank 1", DAMAGES[damage], "at step 3")
    for rank in (1, 2):
        assert_says(
            outcomes[rank][0].message,
            "the payload of rank 0",
            "its rank had nothing to send",
            f"on rank {rank} of 3",
        )
    assert_failed_without_a_trace(outcomes)


@stand_in.host_contract
@needs_python_groups
@pytest.mark.parametrize("damage", ["version", "index_bits"])
def test_a_damaged_average_is_refused_by_all(pools: ranks.Pools, damage: str) -> None:
    second = Between(before_all_gather=Damage(damage))
    outcomes = pools.run(3, train_until, ONE_BUCKET, Between(), second)
    for rank, (failed, _, _) in enumerate(outcomes):
        assert_says(
            failed.message, "the payload of rank 1", DAMAGES[damage], f"on rank {rank} of 3"
        )
    assert_failed_without_a_trace(outcomes)


def test_a_model_goes_on_after_destroy_process_group(pools: ranks.Pools) -> None:
    """As with allgather (test_failures.py): DDP keeps its group alive."""
    case = Case("cpp", state={**SPLIT, "dense_steps": 0})
    for gradients in pools.run(2, test_failures.train_across_destroy, case):
        assert len(gradients) == case.steps


@pytest.mark.parametrize(
    ("on_rank_0", "on_rank_1", "start_step"),
    [
        ("split", "allgather", None),
        ("split", "allgather", 5),  # after a load
        ("dense", "split", None),
        ("dense", "split", 5),
        (None, "split", None),
        ("allgather", "dense", 5),
    ],
)
def test_ranks_with_different_exchanges_disagree_in_words(
    pools: ranks.Pools, on_rank_0: str | None, on_rank_1: str, start_step: int | None
) -> None:
    options = [{"density": 0.05, "exchange": exchange} for exchange in (on_rank_0, on_rank_1)]
    outcomes = pools.run(
        2, test_agreement.disagree_about_options, "python", options, [start_step] * 2
    )
    case = Case(steps=3, state=test_agreement.FRESH)
    words = f"exchange: rank 0 has {on_rank_0 or 'allgather'}, rank 1 has {on_rank_1}"
    test_agreement.assert_clear_and_harmless(outcomes, case, words)


def reduce_with_own_exchange(rank: int, world_size: int, exchanges: list[str | None]) -> Tensor:
    state = TopKEFState(density=0.1, dense_steps=0, exchange=exchanges[rank])
    return all_reduce_(torch.ones(2000), state, name="w")


def test_none_agrees_with_the_exchange_that_it_stands_for(pools: ranks.Pools) -> None:
    one, other = pools.run(2, reduce_with_own_exchange, [None, "allgather"])
    assert_same_bits(one, other, "replicas")


# ---- order

NAMES = [f"tensor{i}" for i in range(6)]


def delay_by_rank(rank: int, call: int) -> float:
    """A few milliseconds, in another order on every rank."""
    return 0.004 * ((5 * call + 7 * rank * (call + 1)) % 6)


class DelayOf:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, call: int) -> float:
        return delay_by_rank(self.rank, call)


def reduce_at_once(
    rank: int, world_size: int, run: Run, delayed: bool
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Several tensors at a time; delayed: each all-to-all is late, in another order on every rank."""
    group = None
    if delayed:
        late = DelayOf(rank)
        group = changed_groups(Between(delay_all_to_all=late), Between(delay_all_to_all=late))
    state = run.state(group)
    results = []
    for step in range(run.steps):
        tensors = {
            name: gradient("normal", run.seed + i, rank, step, 500 * (1 + i))
            for i, name in enumerate(NAMES)
        }
        futures = [all_reduce_(t, state, name=n, async_op=True) for n, t in tensors.items()]
        for future in futures:
            future.wait()
        results.append(tensors)
    return results, state.state_dict()["residuals"]


def assert_delays_change_nothing(pools: ranks.Pools, world_size: int, run: Run) -> None:
    on_time = pools.run(world_size, reduce_at_once, run, False)
    delayed = pools.run(world_size, reduce_at_once, run, True)
    for (results, residuals), (expected, expected_residuals) in zip(delayed, on_time):
        for name in NAMES:
            assert_same_bits(residuals[name], expected_residuals[name], name)
            for tensors, expected_tensors, replica in zip(results, expected, on_time[0][0]):
                assert_same_bits(tensors[name], expected_tensors[name], name)
                assert_same_bits(tensors[name], replica[name], name)


@needs_python_groups
def test_buckets_that_come_to_their_second_collective_in_another_order_on_each_rank_give_the_same(
    pools: ranks.Pools, seed: int
) -> None:
    assert_delays_change_nothing(pools, 3, Run("normal", seed, 5))


def reduce_in_two_groups(
    rank: int, world_size: int, run: Run, same_ranks: bool
) -> list[list[tuple[Tensor, Tensor]]]:
    """Two states at once: {0, 1} {2, 3} and {0, 2} {1, 3}, or two groups of all ranks."""
    everyone = list(range(world_size))
    first, second = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    made = [
        [(members, dist.new_group(members)) for members in partition]
        for partition in ([[everyone], [everyone]] if same_ranks else [first, second])
    ]
    groups = [next(g for members, g in groups if rank in members) for groups in made]
    states = [run.state(group) for group in groups]
    seen = []
    for step in range(run.steps):
        tensors = [
            dataclasses.replace(run, seed=run.seed + i).gradient(rank, step) for i in range(2)
        ]
        futures = [
            all_reduce_(t, state, name="w", segments=run.segments, async_op=True)
            for t, state in zip(tensors, states)
        ]
        for future in reversed(futures):
            future.wait()
        numel = tensors[0].numel()
        seen.append([(t, residual_of(s, numel)) for t, s in zip(tensors, states)])
    return seen


@pytest.mark.parametrize("same_ranks", [False, True], ids=["of_two_ranks_each", "of_all_ranks"])
def test_two_states_on_two_process_groups_at_once_do_not_disturb_each_other(
    pools: ranks.Pools, same_ranks: bool, seed: int
) -> None:
    run = Run("normal", seed)
    by_rank = pools.run(4, reduce_in_two_groups, run, same_ranks)
    everyone = [[0, 1, 2, 3]]
    partitions = [everyone] * 2 if same_ranks else [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    for which, partition in enumerate(partitions):
        of_state = dataclasses.replace(run, seed=run.seed + which)
        for members in partition:
            oracle = split_oracle(of_state, len(members))
            for step in range(run.steps):
                expected = oracle.step([of_state.gradient(rank, step) for rank in members])
                for residual, rank in zip(oracle.residuals, members):
                    result, kept = by_rank[rank][step][which]
                    assert_same_bits(result + 0, expected + 0, f"rank {rank}, step {step}")
                    assert_same_bits(kept + 0, residual + 0, f"rank {rank}, step {step}")


# ---- exchange="dense"


@in_pairs(entry=ENTRIES, world_size=[2, 3, 4], kind=[integers, normal])
def test_dense_equals_ddp_without_a_hook_and_keeps_nothing(
    pools: ranks.Pools, entry: str, world_size: int, kind: Any
) -> None:
    options = {"exchange": "dense", "dense_steps": 0}
    dense = pools.run(world_size, train, Case(entry, 4, gradients_of=kind, state=options))
    plain = pools.run(world_size, train, Case(None, 4, gradients_of=kind))
    for ours, theirs in zip(dense, plain):
        assert ours.residuals == {}
        for step in range(4):
            for name in SHAPES:
                one, other = ours.gradients[step][name], theirs.gradients[step][name]
                if world_size == 3:  # a third is rounded
                    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
                else:
                    assert_same_bits(one, other, name)
                assert_same_bits(one, dense[0].gradients[step][name], "replicas")


@WORLD_SIZES
def test_figures_of_dense(pools: ranks.Pools, world_size: int, seed: int) -> None:
    run = Run("normal", seed, 3, options=(("exchange", "dense"),))
    ring = 2 * (world_size - 1) / world_size * sum(SEGMENTS) * 4
    for rank, seen in enumerate(pools.run(world_size, reduce_steps, run)):
        for step, of_step in enumerate(seen):
            agreement = 224 * (world_size - 1) if step == 0 else 0
            assert figures(of_step) == {
                "bytes_sent": ring + agreement,
                "bytes_sent_all_gather": 0,
                "bytes_sent_all_to_all": 0,
                "bytes_sent_all_reduce": ring,
                "bytes_sent_agreement": agreement,
                "bytes_sent_in_node": 0,
                "bytes_sent_in_node_all_to_all": 0,
                "bytes_sent_in_node_all_gather": 0,
            }
            metrics = of_step.metrics
            assert metrics["compressed_ddp/dense_bytes"] == ring
            assert metrics["compressed_ddp/compression_ratio"] == 1
            assert metrics["compressed_ddp/residual_norm"] == 0
            assert metrics["compressed_ddp/captured_energy"] == 1
            norm = run.gradient(rank, step).double().norm().item()
            assert metrics["compressed_ddp/gradient_norm"] == pytest.approx(norm, rel=1e-5)


def reduce_in(rank: int, world_size: int, exchange: str, dtype: torch.dtype) -> Seen:
    """Of sums beyond fp16, whose averages are not: rank 0 has 65000, the others 60000."""
    state = TopKEFState(exchange=exchange, dense_steps=0)
    tensor = torch.full((3000,), 65000.0 if rank == 0 else 60000.0).to(dtype)
    all_reduce_(tensor, state, name="w")
    return Seen(torch.zeros(0), torch.zeros(0), tensor, state.metrics())


@in_pairs(exchange=list(DENSE_TYPES), dtype=FACTORS["dtype"])
def test_dense_travels_in_the_type_that_it_names(
    pools: ranks.Pools, exchange: str, dtype: torch.dtype
) -> None:
    sent_as = DENSE_TYPES[exchange]
    for seen in pools.run(4, reduce_in, exchange, dtype):
        assert seen.result.dtype == dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(sent_as).eps)
        torch.testing.assert_close(
            seen.result.double(), torch.full((3000,), 61250.0).double(), rtol=3 * eps, atol=0
        )
        ring = 2 * 3 / 4 * 3000
        metrics = seen.metrics
        assert metrics["compressed_ddp/bytes_sent_all_reduce"] == ring * sent_as.itemsize
        assert metrics["compressed_ddp/dense_bytes"] == ring * dtype.itemsize
        assert metrics["compressed_ddp/compression_ratio"] == dtype.itemsize / sent_as.itemsize


# ---- figures


def figures(seen: Seen) -> dict[str, float]:
    return {
        key.removeprefix("compressed_ddp/"): value
        for key, value in seen.metrics.items()
        if "bytes_sent" in key
    }


@in_pairs(world_size=[2, 3, 4], scope=SCOPES, value_format=VALUE_FORMATS)
def test_bytes_sent_are_those_of_the_layouts(
    pools: ranks.Pools, world_size: int, scope: str, value_format: str, seed: int
) -> None:
    options = (("scope", scope), ("value_format", value_format))
    run = Run("normal", seed, 2, options=options)
    oracle = split_oracle(run, world_size)
    of_range = [_C.payload_bytes(*layout.arguments, value_format) for layout in oracle.layouts]
    for rank, seen in enumerate(pools.run(world_size, reduce_steps, run)):
        for step, of_step in enumerate(seen):
            expected = {
                "bytes_sent_all_gather": (world_size - 1) * max(of_range),
                "bytes_sent_all_to_all": sum(of_range) - of_range[rank],
                "bytes_sent_all_reduce": 0,
                "bytes_sent_agreement": 224 * (world_size - 1) if step == 0 else 0,
            }
            assert figures(of_step) == {
                **expected,
                "bytes_sent": sum(expected.values()),
                "bytes_sent_in_node": 0,
                "bytes_sent_in_node_all_to_all": 0,
                "bytes_sent_in_node_all_gather": 0,
            }
            ratio = sum(SEGMENTS) * 4 / sum(of_range)
            assert of_step.metrics["compressed_ddp/compression_ratio"] == ratio


@each_value_format
def test_norms_are_those_of_what_is_there_after_the_step(
    pools: ranks.Pools, value_format: str, seed: int
) -> None:
    run = Run("normal", seed, 6, options=(("value_format", value_format),))
    for rank, seen in enumerate(pools.run(3, reduce_steps, run)):
        for step, of_step in enumerate(seen):
            metrics = of_step.metrics
            norm = run.gradient(rank, step).double().norm().item()
            assert metrics["compressed_ddp/gradient_norm"] == pytest.approx(norm, rel=1e-5)
            kept = of_step.after.double().norm().item()
            assert metrics["compressed_ddp/residual_norm"] == pytest.approx(kept, rel=1e-5)
            assert 0 <= metrics["compressed_ddp/captured_energy"] <= 1


# ---- the default


def reduce_by_default(rank: int, world_size: int) -> list[dict[str, float]]:
    """One step in a group of 16 ranks, and one in that of all."""
    sixteen = dist.new_group(list(range(16)))
    seen = []
    for group in [sixteen, None] if rank < 16 else [None]:
        state = TopKEFState(group, density=0.1, dense_steps=0)
        all_reduce_(torch.ones(4096), state, name="w")
        seen.append(state.metrics())
    return seen


def test_by_default_up_to_16_ranks_gather_and_17_split() -> None:
    for rank, seen in enumerate(ranks.run(17, reduce_by_default)):
        of_17 = seen[-1]
        assert of_17["compressed_ddp/bytes_sent_all_to_all"] > 0
        if rank < 16:
            assert seen[0]["compressed_ddp/bytes_sent_all_to_all"] == 0
            assert seen[0]["compressed_ddp/bytes_sent_all_gather"] > 0


def test_a_state_shows_its_exchange() -> None:
    assert "exchange='split'" in repr(TopKEFState(exchange="split"))
    assert TopKEFState().exchange is None
    for exchange in EXCHANGES:
        with pytest.raises(
            ValueError, match=f"must be None, an AutoExchange or one of .*'{exchange}'.* got 'ring'"
        ):
            TopKEFState(exchange="ring")
