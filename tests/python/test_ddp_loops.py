"""Loops around DDP that are not one backward per step on every rank with every parameter: unused parameters, accumulation, uneven
inputs, several models, other groups, compiled models. Against the oracle, on both entries."""

from __future__ import annotations

import datetime
import pathlib
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ddp_models import (
    SHAPES,
    SMALL_BUCKETS,
    BucketRecorder,
    Case,
    GivenGradients,
    Oracle,
    Record,
    add_hook,
    assert_equals_oracle,
    assert_residuals,
    assert_same_bits,
    both_entries,
    both_scopes,
    build,
    gradients_on,
    integers,
    normal,
    replace_in,
    skip_unless_ddp_takes,
    train,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, register, topk_ef_hook

UNUSED = {"find_unused_parameters": True, **SMALL_BUCKETS}
UNUSED_MODES: dict[str, dict[str, Any]] = {
    "find_unused": UNUSED,
    "bucket_view": {"gradient_as_bucket_view": True, **UNUSED},
    "skip_all_reduce_unused_params": {"skip_all_reduce_unused_params": True, **UNUSED},
}


@pytest.mark.parametrize("mode", UNUSED_MODES)
@both_scopes
@both_entries
def test_a_globally_unused_parameter_keeps_its_residual_and_its_grad_stays_none(
    entry: str, scope: str, mode: str
) -> None:
    skip_unless_ddp_takes(**UNUSED_MODES[mode])
    special = {("second_weight", rank, step): None for rank in range(2) for step in (2, 4)}
    state = {"scope": scope, "dense_steps": 1}
    case = Case(
        entry, 6, gradients_of=replace_in(integers, special), ddp=UNUSED_MODES[mode], state=state
    )
    records = ranks.run(2, train_with_full_buckets, case)
    assert records[0].gradients[2]["second_weight"] is None
    assert_equals_oracle(records, case)
    # Nothing that DDP threw away was taken out of the residual.
    for name in records[0].residuals:
        steps = [step for step in range(case.steps) if records[0].gradients[step][name] is not None]
        received = 2 * sum(records[0].gradients[step][name] for step in steps)
        produced = sum(case.gradients(rank, step)[name] for rank in range(2) for step in steps)
        assert torch.equal(
            received + records[0].residuals[name] + records[1].residuals[name], produced
        )


@pytest.mark.parametrize("value_format", ["bf16", "sign"])
@both_scopes
@both_entries
def test_a_parameter_used_on_one_rank_only_takes_nothing_from_the_other_ranks_residual(
    entry: str, scope: str, value_format: str
) -> None:
    special = {
        ("third_weight", 0, 2): None,
        ("third_weight", 1, 3): None,
        ("first_weight", 1, 3): None,
    }
    case = Case(
        entry,
        5,
        gradients_of=replace_in(normal, special),
        ddp=UNUSED,
        state={"scope": scope, "dense_steps": 1, "value_format": value_format},
    )
    assert_equals_oracle(ranks.run(2, train, case), case)


def train_with_full_buckets(rank: int, world_size: int, case: Case) -> Record:
    """As `train`; with skip_all_reduce_unused_params DDP leaves out buckets, but for the oracle all parameters have one."""
    record = train(rank, world_size, case)
    for step, buckets in enumerate(record.buckets):
        seen = {name for bucket in buckets for name in bucket}
        record.buckets[step] = buckets + [[name] for name in case.shapes if name not in seen]
    return record


def accumulate(rank: int, world_size: int, case: Case) -> Record:
    """Each step is two backward passes; only the second is synchronised."""
    model, state = build(case)
    recorder = BucketRecorder(case)
    record = Record([], [], {}, [], "")
    for step in range(case.steps):
        first, second = case.gradients(rank, 2 * step), case.gradients(rank, 2 * step + 1)
        record.buckets.append(recorder.step(first))
        model.zero_grad()
        with model.no_sync():
            model(first).backward()
        assert state.step == step
        model(second).backward()
        record.gradients.append(gradients_on(model))
    record.residuals = state.state_dict()["residuals"]
    return record


def sum_of_two(name: str, rank: int, step: int, shape: tuple[int, ...]) -> Tensor:
    return integers(name, rank, 2 * step, shape) + integers(name, rank, 2 * step + 1, shape)


@pytest.mark.parametrize("bucket_view", [False, True])
@both_entries
def test_no_sync_accumulates_and_the_sum_is_one_step(entry: str, bucket_view: bool) -> None:
    ddp = {"gradient_as_bucket_view": bucket_view, **SMALL_BUCKETS}
    records = ranks.run(2, accumulate, Case(entry, 4, gradients_of=integers, ddp=ddp))
    assert_equals_oracle(records, Case(entry, 4, gradients_of=sum_of_two, ddp=ddp))


def join_uneven(
    rank: int, world_size: int, case: Case, inputs: list[int], zero_grad_first: bool
) -> Record:
    model, state = build(case)
    record = Record([], [], {}, [], "")
    with model.join():
        for step in range(inputs[rank]):
            if zero_grad_first:
                model.zero_grad()
            model(case.gradients(rank, step)).backward()
            record.gradients.append(gradients_on(model))
            if not zero_grad_first:
                model.zero_grad()  # as some loops do at the end: .grad is None while the rank has joined
    record.residuals = state.state_dict()["residuals"]
    return record


@pytest.mark.parametrize("residual_flows", [True, False])
@both_entries
def test_join_a_rank_without_inputs_sends_its_residual_or_keeps_it_but_loses_nothing(
    entry: str, residual_flows: bool
) -> None:
    """It goes on sending while its last .grad is there; after zero_grad() its parameters count as unused and the residual waits."""
    inputs = [3, 6]
    case = Case(entry, gradients_of=integers, state={"dense_steps": 1})
    records = ranks.run(2, join_uneven, case, inputs, residual_flows)
    oracle = Oracle(case, 2)
    for step in range(max(inputs)):
        zeros = (
            {name: torch.zeros(shape) for name, shape in SHAPES.items()} if residual_flows else {}
        )
        expected = oracle.step(
            [case.gradients(rank, step) if step < inputs[rank] else zeros for rank in range(2)]
        )
        for rank in range(2):
            if step < inputs[rank]:
                for name, actual in records[rank].gradients[step].items():
                    assert_same_bits(
                        actual, expected[name], f"{name} on rank {rank} in step {step}"
                    )
    for rank in range(2):
        assert_residuals(records[rank].residuals, oracle, rank)


class WithFrozen(GivenGradients):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.frozen = nn.Parameter(torch.ones(64, 64), requires_grad=False)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        self.steps += 1
        return super().forward(gradients) + 0.0 * self.frozen.sum()


def train_two_models_in_turn(rank: int, world_size: int, cases: list[Case]) -> list[Record]:
    models = []
    for case in cases:
        model = DistributedDataParallel(WithFrozen(case), **case.ddp)
        state = TopKEFState(**case.options())
        add_hook(model, state, case.entry)
        models.append((case, model, state, Record([], [], {}, [], "")))
    for step in range(cases[0].steps):
        for case, model, _, record in models:
            model.zero_grad()
            model(case.gradients(rank, step)).backward()
            record.gradients.append(gradients_on(model))
            record.buckets.append(
                [[name] for name in case.shapes]
            )  # scope "tensor" does not depend on them
            del record.gradients[-1]["frozen"]
    for _, _, state, record in models:
        record.residuals = state.state_dict()["residuals"]
    return [record for *_, record in models]


@both_entries
def test_several_models_with_a_state_each_and_with_frozen_parameters_and_buffers(
    entry: str,
) -> None:
    cases = [
        Case(entry),
        Case(entry, gradients_of=integers, state={"density": 0.3, "dense_steps": 0}),
    ]
    for case, records in zip(cases, zip(*ranks.run(2, train_two_models_in_turn, cases))):
        assert_equals_oracle(list(records), case)


def train_in_a_subset(
    rank: int, world_size: int, case: Case, members: list[int], state_has_group: bool
) -> Record | None:
    group = dist.new_group(members)
    if rank not in members:
        return None
    model = DistributedDataParallel(GivenGradients(case), process_group=group, **case.ddp)
    # `register` takes the model's group; a Python hook cannot see the model, so its state has to be given the group.
    state = TopKEFState(group if state_has_group else None, **case.options())
    add_hook(model, state, case.entry)
    record = Record([], [], {}, [], "")
    group_rank = members.index(rank)
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(group_rank, step)).backward()
        record.gradients.append(gradients_on(model))
        record.buckets.append([[name] for name in case.shapes])
    state_dict = state.state_dict()
    assert (state_dict["rank"], state_dict["world_size"]) == (group_rank, len(members))
    record.residuals = state_dict["residuals"]
    state.load_state_dict(state_dict)
    return record


@pytest.mark.parametrize(
    ("entry", "state_has_group"), [("python", True), ("cpp", True), ("cpp", False)]
)
def test_a_group_of_some_ranks(entry: str, state_has_group: bool) -> None:
    case = Case(entry)
    records = ranks.run(3, train_in_a_subset, case, [0, 2], state_has_group)
    assert records[1] is None
    assert_equals_oracle([records[0], records[2]], case)


def state_before_group(rank: int, world_size: int, case: Case, store: str) -> Record:
    dist.destroy_process_group()
    TopKEFState(**case.options())  # runs no collective, needs no group
    net = GivenGradients(case)
    state = TopKEFState(**case.options(), named_parameters=net.named_parameters())
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=ranks.GROUP_TIMEOUT_S),
    )
    model = DistributedDataParallel(net, **case.ddp)
    if case.entry == "cpp":
        register(model, state)
    else:
        model.register_comm_hook(state, topk_ef_hook)
    record = Record([], [], {}, [], "")
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        record.gradients.append(gradients_on(model))
        record.buckets.append([[name] for name in case.shapes])
    record.residuals = state.state_dict()["residuals"]
    return record


@both_entries
def test_a_state_made_before_init_process_group(entry: str, tmp_path: pathlib.Path) -> None:
    case = Case(entry)
    assert_equals_oracle(ranks.run(2, state_before_group, case, str(tmp_path / "store")), case)


class MiB3Net(nn.Module):
    """Large enough for DDPOptimizer to split: its buckets have 1 MiB at least."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(256, 1024)
        self.head = nn.Linear(1024, 512)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).relu())


def train_compiled(rank: int, world_size: int, entry: str, compiled: str) -> list[Tensor]:
    torch.manual_seed(3)
    net: Any = MiB3Net()
    if compiled == "inside":
        net = torch.compile(net, backend="aot_eager")
    model: Any = DistributedDataParallel(net, bucket_cap_mb=1)
    # A gradient that differs in its last bit may be another bfloat16.
    state = TopKEFState(exchange="allgather", density=0.1, dense_steps=1, value_format="fp32")
    add_hook(model, state, entry)
    step_model = torch.compile(model, backend="aot_eager") if compiled == "outside" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        inputs = torch.randn(4, 256, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        step_model(inputs).square().mean().backward()
        optimizer.step()
    assert sorted(state.state_dict()["residuals"]) == ["body.weight", "head.weight"], (
        "names without wrappers' prefixes"
    )
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["inside", "outside"])
@both_entries
def test_torch_compile_trains_as_the_eager_model_does(entry: str, compiled: str) -> None:
    """Backend aot_eager: DDPOptimizer splits the graph as it would for inductor, and no C++ is compiled."""
    with_compile = ranks.run(2, train_compiled, entry, compiled)
    eager = ranks.run(2, train_compiled, entry, "no")
    for ours, theirs, other_rank in zip(with_compile[0], eager[0], with_compile[1]):
        assert_same_bits(ours, other_rank, "replicas")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
