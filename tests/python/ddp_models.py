"""Tiny models whose gradients the test chooses, what a rank does with them, and the oracle that takes all ranks' steps at once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import contracts
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, register, topk_ef_hook

both_entries = pytest.mark.parametrize("entry", ["python", "cpp"])
both_scopes = pytest.mark.parametrize("scope", ["tensor", "bucket", "chunk"])

# Compressed, 1-D, compressed, below min_compress_numel, compressed, 1-D: several buckets of SMALL_BUCKETS.
SHAPES: dict[str, tuple[int, ...]] = {
    "first_weight": (40, 50),
    "first_bias": (40,),
    "second_weight": (48, 32),
    "tiny_weight": (8, 6),
    "third_weight": (5, 20, 24),
    "third_bias": (7,),
}
SMALL_BUCKETS = {"bucket_cap_mb": 0.006}

GradientRule = Callable[
    [str, int, int, tuple[int, ...]], Tensor | None
]  # (name, rank, step, shape); None = not used


def _generator(name: str, rank: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(name.encode()) * 10_000 + step * 100 + rank)


def normal(name: str, rank: int, step: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=_generator(name, rank, step))


def integers(name: str, rank: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Small integers: every fp32 sum of them is exact, and ties are everywhere."""
    return torch.randint(-8, 9, shape, generator=_generator(name, rank, step)).float()


def replaced(
    special: Mapping[tuple[str, int, int], float | None],
    rule: GradientRule,
    name: str,
    rank: int,
    step: int,
    shape: tuple[int, ...],
) -> Tensor | None:
    """`rule`, but at (name, rank, step) the first entry has another value, or the parameter is not used (None)."""
    gradient = rule(name, rank, step, shape)
    if (name, rank, step) in special:
        value = special[name, rank, step]
        if value is None:
            return None
        gradient.view(-1)[0] = value
    return gradient


def replace_in(
    rule: GradientRule, special: Mapping[tuple[str, int, int], float | None]
) -> GradientRule:
    return functools.partial(replaced, special, rule)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of a model, the same on every rank; `gradients_of` says what the ranks' gradients are."""

    entry: str | None = "python"  # None: DDP without a hook
    steps: int = 5
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: SHAPES)
    dtypes: Mapping[str, torch.dtype] = dataclasses.field(default_factory=dict)  # default: float32
    channels_last: tuple[str, ...] = ()
    gradients_of: GradientRule = normal
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ddp: Mapping[str, Any] = dataclasses.field(default_factory=lambda: SMALL_BUCKETS)
    wrapper: Callable[[Any], Any] | None = None  # around the Python hook

    def options(self) -> dict[str, Any]:
        return {"density": 0.05, "dense_steps": 2, "exchange": "allgather", **self.state}

    def gradients(self, rank: int, step: int) -> dict[str, Tensor]:
        gradients = {}
        for name, shape in self.shapes.items():
            gradient = self.gradients_of(name, rank, step, shape)
            if gradient is not None:
                gradients[name] = gradient.to(self.dtypes.get(name, torch.float32))
        return gradients


class GivenGradients(nn.Module):
    """A module whose gradients are the tensors given to forward, exactly. A parameter without one is not used."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for name, shape in case.shapes.items():
            values = torch.ones(shape, dtype=case.dtypes.get(name, torch.float32))
            if name in case.channels_last:
                values = values.to(memory_format=torch.channels_last)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        products = [
            (parameter * gradients[name]).sum()
            for name, parameter in self.named_parameters()
            if name in gradients
        ]
        return torch.stack([product.float() for product in products]).sum()


def add_hook(
    model: DistributedDataParallel,
    state: TopKEFState,
    entry: str,
    wrapper: Callable[[Any], Any] | None = None,
) -> None:
    if entry == "cpp":
        register(model, state)
    else:
        model.register_comm_hook(
            state.bind(model), wrapper(topk_ef_hook) if wrapper else topk_ef_hook
        )


def build(
    case: Case, process_group: dist.ProcessGroup | None = None
) -> tuple[DistributedDataParallel, TopKEFState]:
    model = DistributedDataParallel(GivenGradients(case), process_group=process_group, **case.ddp)
    state = TopKEFState(process_group, **case.options())
    if case.entry is not None:
        add_hook(model, state, case.entry, case.wrapper)
    return model, state


def gradients_on(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name.removeprefix("module."): None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


class BucketRecorder:
    """The same model again, whose hook only writes down which parameters DDP puts into which bucket, in each step."""

    def __init__(self, case: Case) -> None:
        self.model = DistributedDataParallel(GivenGradients(case), **case.ddp)
        self._names = {
            id(parameter): name.removeprefix("module.")
            for name, parameter in self.model.named_parameters()
        }
        self._buckets: list[list[str]] = []
        self.model.register_comm_hook(self, BucketRecorder._hook)

    @staticmethod
    def _hook(recorder, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations, and these would be strings
        recorder._buckets.append(
            [recorder._names[id(parameter)] for parameter in bucket.parameters()]
        )
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def step(self, gradients: dict[str, Tensor]) -> list[list[str]]:
        self._buckets = []
        self.model.zero_grad()
        self.model(gradients).backward()
        return self._buckets


@dataclasses.dataclass
class Record:
    """What one rank saw: per step the averaged gradients by name and DDP's buckets; at the end the state."""

    gradients: list[dict[str, Tensor | None]]
    buckets: list[list[list[str]]]
    residuals: dict[str, Tensor]
    metrics: list[dict[str, float]]
    hook_name: str


def train(rank: int, world_size: int, case: Case) -> Record:
    model, state = build(case)
    recorder = BucketRecorder(case)
    record = Record([], [], {}, [], "")
    for step in range(case.steps):
        gradients = case.gradients(rank, step)
        record.buckets.append(recorder.step(gradients))
        model.zero_grad()
        model(gradients).backward()
        record.gradients.append(gradients_on(model))
        record.metrics.append(state.metrics())
    if case.entry is not None:
        record.residuals = state.state_dict()["residuals"]
        record.hook_name = model._get_ddp_logging_data()["comm_hook"]
    return record


class Oracle:
    """All ranks' residuals, by parameter; `step` is one synchronised step of all ranks through compressed_ddp.reference."""

    def __init__(self, case: Case, world_size: int) -> None:
        self.case = case
        self.options = case.options()
        self.value_format = self.options.get("value_format", "bf16")
        self.world_size = world_size
        self.steps = 0
        # Of each bucket of the last step: its parameters, and what can put back what was sent.
        self._buckets: list[tuple[list[str], contracts.Oracle | contracts.SplitOracle]] = []
        self.residuals = [
            {
                name: torch.zeros(shape)
                for name, shape in case.shapes.items()
                if self.is_compressed(name)
            }
            for _ in range(world_size)
        ]

    def is_compressed(self, name: str) -> bool:
        shape = self.case.shapes[name]
        exempt = name in self.options.get("exempt", ())  # the tests' patterns are whole names
        return (
            len(shape) > 1
            and math.prod(shape) >= self.options.get("min_compress_numel", 1024)
            and not exempt
        )

    def density(self) -> float:
        density = self.options["density"]
        return density(self.steps) if callable(density) else density

    def k(self, numel: int) -> int:
        return max(1, math.ceil(self.density() * numel))

    def step(
        self, gradients: list[dict[str, Tensor]], buckets: list[list[str]] | None = None
    ) -> dict[str, Tensor]:
        """gradients[rank] by name; buckets of parameter names (default: one bucket per parameter). Returns the averages by name."""
        before = [
            {name: residual.clone() for name, residual in residuals.items()}
            for residuals in self.residuals
        ]
        results: dict[str, Tensor] = {}
        self._buckets = []
        for names in buckets or [[name] for name in self.case.shapes]:
            if self.steps < self.options["dense_steps"] or self.options.get("exchange") == "dense":
                results.update(self._dense(gradients, names))
            else:
                results.update(self._compressed(gradients, names))
        self.steps += 1
        if self.steps > self.options["dense_steps"] and any(
            torch.isnan(result.float()).any() for result in results.values()
        ):
            # The optimizer will skip this step, so nothing of it may be missing: all that is finite stays in the residual.
            self.rollback(gradients)
            if self.value_format != "sign":  # there, acc - scale was rounded
                for residuals, old, given in zip(self.residuals, before, gradients):
                    for name, residual in residuals.items():
                        acc = old[name] + given[name].float() if name in given else old[name]
                        assert torch.equal(
                            residual, torch.where(torch.isfinite(acc), acc, old[name])
                        )
        return results

    def rollback(self, gradients: list[dict[str, Tensor]]) -> None:
        """Puts back what the last step sent; `gradients` are those that `step` was given."""
        for names, bucket in self._buckets:
            bucket.rollback()
            given = (
                [dict.fromkeys(names)] * self.world_size
                if isinstance(bucket, contracts.SplitOracle)
                else gradients
            )
            self._keep_residuals(given, names, bucket.residuals)

    def _dense(self, gradients: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
        results = {}
        for name in names:
            parts = [given[name] / self.world_size for given in gradients if name in given]
            results[name] = (
                torch.stack(parts).sum(0) if parts else torch.zeros(self.case.shapes[name])
            )
        return results

    def _compressed(
        self, gradients: list[dict[str, Tensor]], names: list[str]
    ) -> dict[str, Tensor]:
        segments = [math.prod(self.case.shapes[name]) for name in names]
        scope = self.options.get("scope", "tensor")
        parts = contracts.parts_of(
            [(numel, not self.is_compressed(name)) for name, numel in zip(names, segments)], scope
        )
        if self.options.get("exchange") == "split":
            return self._split(gradients, names, segments, parts)
        dtype = self.case.dtypes.get(names[0], torch.float32)
        flat_residuals = []
        for given, residuals in zip(gradients, self.residuals):
            zeros = {name: torch.zeros(self.case.shapes[name]) for name in names}
            # The residual of a parameter that is not used on this rank waits, and the parameter sends zeros.
            waiting = {
                name: residuals[name] if name in residuals and name in given else zeros[name]
                for name in names
            }
            flat_residuals.append(torch.cat([self._flat(name, waiting[name]) for name in names]))
        layout = contracts.layout_of(parts, scope, self.density())
        bucket = contracts.Oracle(self.world_size, layout, self.value_format)
        bucket.residuals = flat_residuals
        average = bucket.step(self._flat_gradients(gradients, names, dtype))
        self._buckets.append((names, bucket))
        self._keep_residuals(gradients, names, flat_residuals)
        return {
            name: self._shaped(name, part) for name, part in zip(names, average.split(segments))
        }

    def _split(
        self,
        gradients: list[dict[str, Tensor]],
        names: list[str],
        segments: list[int],
        parts: list[contracts.Part],
    ) -> dict[str, Tensor]:
        bucket = contracts.SplitOracle(
            self.world_size,
            parts,
            scope=self.options.get("scope", "tensor"),
            density=self.density(),
            value_format=self.value_format,
            error_feedback=self.options.get("error_feedback", True),
        )
        used = []
        for rank, (given, residuals) in enumerate(zip(gradients, self.residuals)):
            used.append(torch.cat([torch.full((n,), m in given) for m, n in zip(names, segments)]))
            zeros = {name: torch.zeros(self.case.shapes[name]) for name in names}
            flat = [self._flat(name, residuals.get(name, zeros[name])) for name in names]
            bucket.residuals[rank] = torch.cat(flat)
        dtype = self.case.dtypes.get(names[0], torch.float32)
        average = bucket.step(self._flat_gradients(gradients, names, dtype), used)
        self._buckets.append((names, bucket))
        # Of a parameter without a gradient, too: its owner keeps there what the averages of others lost.
        self._keep_residuals([dict.fromkeys(names)] * self.world_size, names, bucket.residuals)
        return {
            name: self._shaped(name, part) for name, part in zip(names, average.split(segments))
        }

    def _flat_gradients(
        self, gradients: list[dict[str, Tensor]], names: list[str], dtype: torch.dtype
    ) -> list[Tensor]:
        zeros = {name: torch.zeros(self.case.shapes[name], dtype=dtype) for name in names}
        return [
            torch.cat([self._flat(name, given.get(name, zeros[name])) for name in names])
            for given in gradients
        ]

    def _keep_residuals(
        self,
        gradients: list[dict[str, Any]],  # by name; which parameters are used
        names: list[str],
        flat_residuals: list[Tensor],
    ) -> None:
        segments = [math.prod(self.case.shapes[name]) for name in names]
        for given, residuals, flat in zip(gradients, self.residuals, flat_residuals):
            for name, part in zip(names, flat.split(segments)):
                if name in residuals and name in given:
                    residuals[name] = self._shaped(name, part)

    def _flat(self, name: str, tensor: Tensor) -> Tensor:
        """In the order in which the parameter lies in memory."""
        return (tensor.permute(0, 2, 3, 1) if name in self.case.channels_last else tensor).reshape(
            -1
        )

    def _shaped(self, name: str, flat: Tensor) -> Tensor:
        shape = self.case.shapes[name]
        if name not in self.case.channels_last:
            return flat.view(shape).clone()
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2).clone()


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same dtype, shape and bits; any NaN is as good as another."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    integer = {4: torch.int32, 2: torch.int16}[actual.element_size()]
    same = actual.contiguous().view(integer) == expected.contiguous().view(integer)
    wrong = ~(same | (actual.isnan() & expected.isnan()))
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} entries differ, first {actual[wrong][:3]} != {expected[wrong][:3]}"
    )


def assert_equals_oracle(records: list[Record], case: Case) -> Oracle:
    """Every rank's gradients in every step, and its residuals at the end, bit for bit. Dense steps: exact for two ranks."""
    oracle = Oracle(case, len(records))
    for step in range(case.steps):
        gradients = [case.gradients(rank, step) for rank in range(len(records))]
        assert all(record.buckets[step] == records[0].buckets[step] for record in records)
        expected = oracle.step(gradients, records[0].buckets[step])
        assert expected.keys() == case.shapes.keys(), (
            f"step {step}: not every parameter is in a bucket"
        )
        for rank, record in enumerate(records):
            for name, actual in record.gradients[step].items():
                where = f"gradient of {name} on rank {rank} after step {step}"
                if all(name not in given for given in gradients):
                    assert actual is None, where
                else:
                    assert actual is not None, where
                    assert_same_bits(actual, expected[name], where)
    for rank, record in enumerate(records):
        assert_residuals(record.residuals, oracle, rank)
    return oracle


def assert_residuals(residuals: dict[str, Tensor], oracle: Oracle, rank: int) -> None:
    if oracle.steps > oracle.options["dense_steps"]:
        assert residuals.keys() == oracle.residuals[rank].keys()
    for name, residual in residuals.items():
        assert_same_bits(
            residual + 0.0, oracle.residuals[rank][name] + 0.0, f"residual of {name} on rank {rank}"
        )


def skip_unless_ddp_takes(**options: Any) -> None:
    missing = options.keys() - inspect.signature(DistributedDataParallel.__init__).parameters.keys()
    if missing:
        pytest.skip(f"this torch's DistributedDataParallel has no {', '.join(sorted(missing))}")
