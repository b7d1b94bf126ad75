"""What a communication hook costs per bucket, apart from the work on the gradient.

    python benchmarks/bench_hook.py

One rank over Gloo, so that no other process is waited for. A model of 200 parameters of 16,384 fp32
entries (64 KiB), each of which is a bucket of its own. One model per hook, all in one process; the
models take turns, and `backward()` is timed:

    built-in            DDP's C++ all-reduce hook (BuiltinCommHookType.ALLREDUCE)
    no hook             DDP's all-reduce without any hook
    Python no-op        a Python hook that returns the bucket at once
    Python all-reduce   PyTorch's default_hooks.allreduce_hook
    C++ entry           compressed_ddp.register(model, state)
    Python entry        model.register_comm_hook(state, topk_ef_hook)
    stages              no model: the same stages (compensate_select_, encode, decode_apply_) on 200
                        other buckets of that size, through the operators
    stages, one entry   the same calls on buckets of one entry

The kernels' own time is `stages` - `stages, one entry`: what grows with the bucket. The fixed part of
an operator call (its arguments, plan and outputs; the engine has none of these) is taken out, and
with it the kernels' own fixed part, which therefore counts as orchestration below. Then, per bucket
and in each turn,

    orchestration = (entry - kernels) - built-in

Goal: <= 30 us for the C++ entry. DDP measures itself in the first ten iterations and in every
hundredth; these are left out. With more than one core the exchange overlaps with the rest of the
backward pass; on one core (--cpus 1) every microsecond counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timing import (
    RESULTS,
    goal,
    keep_freed_memory,
    paired_difference,
    quartiles,
    system_metadata,
    warn_when_busy,
    write,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks
from torch.nn.parallel import DistributedDataParallel

import compressed_ddp
from compressed_ddp import ops

WIDTH = 128  # 128 x 128 fp32 are 64 KiB
NUM_GRADIENTS = 4  # that take turns, so that the residual is in a steady state
WARM_UP_ITERATIONS = 10  # in which DDP collects runtime statistics
STATISTICS_PERIOD = 100  # and in every so many'th afterwards
GOAL_US = 30.0
BUILT_IN, CPP_ENTRY, PYTHON_ENTRY = "built-in", "C++ entry", "Python entry"
STAGES, STAGES_ONE_ENTRY, KERNELS = "stages", "stages, one entry", "kernels"


Times = tuple[float, float]  # on the clock, and on all processors together


class ManyBuckets(nn.Module):
    """`num_buckets` matrices whose gradients are given Gaussian numbers; no other computation."""

    def __init__(self, num_buckets: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.zeros(WIDTH, WIDTH) for _ in range(num_buckets))

    def forward(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return a scalar whose gradient with respect to matrix i is gradients[i], [numel]."""
        products = [torch.dot(m.view(-1), g) for m, g in zip(self.matrices, gradients.unbind())]
        return torch.stack(products).sum()


def no_hook(model: DistributedDataParallel, density: float) -> None:
    """Leave DDP as it is."""


def built_in(model: DistributedDataParallel, density: float) -> None:
    """DDP's own C++ hook."""
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)


def python_no_op(model: DistributedDataParallel, density: float) -> None:
    """A hook that does nothing."""
    model.register_comm_hook(None, debugging_hooks.noop_hook)


def python_all_reduce(model: DistributedDataParallel, density: float) -> None:
    """PyTorch's Python hook."""
    model.register_comm_hook(None, default_hooks.allreduce_hook)


def cpp_entry(model: DistributedDataParallel, density: float) -> None:
    """The engine as a C++ hook."""
    compressed_ddp.register(model, compressed_ddp.TopKEFState(density=density))


def python_entry(model: DistributedDataParallel, density: float) -> None:
    """The engine behind a Python hook."""
    state = compressed_ddp.TopKEFState(density=density)
    model.register_comm_hook(state.bind(model), compressed_ddp.topk_ef_hook)


HOOKS: dict[str, Callable[[DistributedDataParallel, float], None]] = {
    BUILT_IN: built_in,
    CPP_ENTRY: cpp_entry,
    PYTHON_ENTRY: python_entry,
    "no hook": no_hook,
    "Python no-op": python_no_op,
    "Python all-reduce": python_all_reduce,
}


def timed(run: Callable[[], object]) -> Times:
    """Call `run` and return its time on the clock and on all processors, us."""
    cpu = time.process_time_ns()
    clock = time.perf_counter_ns()
    run()
    clock = time.perf_counter_ns() - clock
    return clock / 1e3, (time.process_time_ns() - cpu) / 1e3


class Training:
    """A model behind one hook."""

    def __init__(self, name: str, num_buckets: int, density: float) -> None:
        bucket_mib = WIDTH * WIDTH * 4 / 2**20
        self.model = DistributedDataParallel(ManyBuckets(num_buckets), bucket_cap_mb=bucket_mib)
        HOOKS[name](self.model, density)

    def backward(self, gradients: torch.Tensor) -> Times:
        """Run one iteration and return the times of backward()."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(gradients)
        return timed(loss.backward)


class Stages:
    """The stages on as many buckets of their own, without DDP, exchange or engine."""

    def __init__(self, num_buckets: int, numel: int, density: float) -> None:
        self.layout = ([numel], [0], [max(1, round(density * numel))])
        self.residuals = torch.zeros(num_buckets, numel).unbind()
        self.buckets = torch.zeros(num_buckets, numel).unbind()

    def run(self, gradients: torch.Tensor) -> Times:
        """Run all stages on all buckets and return the times."""
        numel = self.layout[0][0]
        given = [gradient[:numel] for gradient in gradients.unbind()]

        def run_all() -> None:
            for gradient, residual, bucket in zip(given, self.residuals, self.buckets):
                values, indices, _ = ops.compensate_select_(gradient, residual, *self.layout)
                payload = ops.encode(values, indices, gradient, *self.layout, rank=0)
                ops.decode_apply_(bucket, payload.unsqueeze(0), *self.layout)

        return timed(run_all)


def measure(
    cpus: int, num_buckets: int, iterations: int, density: float, seed: int
) -> dict[str, list[Times]]:
    """Return the us per bucket of every arm, in turns; runs in a process of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    torch.set_num_threads(1)  # as torchrun sets it
    keep_freed_memory()
    warnings.filterwarnings("ignore", "compressed_ddp: the process group has one rank")
    generator = torch.Generator().manual_seed(seed)
    numel = WIDTH * WIDTH
    gradients = torch.randn(NUM_GRADIENTS, num_buckets, numel, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            trainings = {name: Training(name, num_buckets, density) for name in HOOKS}
            arms = {name: training.backward for name, training in trainings.items()}
            arms[STAGES] = Stages(num_buckets, numel, density).run
            arms[STAGES_ONE_ENTRY] = Stages(num_buckets, 1, density).run
            samples = take_turns(arms, gradients, iterations)
            check_buckets(trainings, num_buckets)
        finally:
            dist.destroy_process_group()
    return {
        name: [(clock / num_buckets, cpu / num_buckets) for clock, cpu in values]
        for name, values in samples.items()
    }


def take_turns(
    arms: dict[str, Callable[[torch.Tensor], Times]], gradients: torch.Tensor, iterations: int
) -> dict[str, list[Times]]:
    """Run every arm once per iteration, in order, until so many iterations have been kept."""
    samples: dict[str, list[Times]] = {name: [] for name in arms}
    iteration = 0
    while len(samples[STAGES]) < iterations:
        iteration += 1
        kept = iteration > WARM_UP_ITERATIONS and iteration % STATISTICS_PERIOD != 0
        for name, arm in arms.items():
            times = arm(gradients[iteration % len(gradients)])
            if kept:
                samples[name].append(times)
    return samples


def check_buckets(trainings: dict[str, Training], num_buckets: int) -> None:
    """Fail unless every parameter was a bucket of its own: the figures are per bucket."""
    for name, training in trainings.items():
        sizes = training.model._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")
        found = len(str(sizes).split(","))
        if found != num_buckets:
            raise RuntimeError(
                f"bench_hook: expected {num_buckets} buckets for '{name}', DDP made {found}"
            )


def rows_and_goal(
    cpus: int, samples: dict[str, list[Times]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return one row per arm, and the goal beside its figure."""
    clock = {name: [times[0] for times in values] for name, values in samples.items()}
    cpu = {name: [times[1] for times in values] for name, values in samples.items()}
    for arms in (clock, cpu):
        pairs = zip(arms[STAGES], arms[STAGES_ONE_ENTRY])
        arms[KERNELS] = [whole - call for whole, call in pairs]
    rows: list[dict[str, Any]] = []
    for name, values in clock.items():
        row: dict[str, Any] = {"cpus": cpus, "hook": name, "us_per_bucket": quartiles(values)}
        if name in HOOKS and name != BUILT_IN:
            row["over_built_in_us"] = paired_difference(values, clock[BUILT_IN])
        row["cpu_us_per_bucket"] = quartiles(cpu[name])
        if name in (CPP_ENTRY, PYTHON_ENTRY):
            for key, arms in (("orchestration_us", clock), ("orchestration_cpu_us", cpu)):
                row[key] = paired_difference(arms[name], arms[BUILT_IN], arms[KERNELS])
        rows.append(row)
    orchestration = next(
        row["orchestration_us"]["median"] for row in rows if row["hook"] == CPP_ENTRY
    )
    text = f"orchestration of the C++ entry, us per bucket, {cpus} CPU(s)"
    return rows, [goal(text, orchestration, at_most=GOAL_US)]


def show(rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    """Print the rows of one number of CPUs."""
    print(f"\n{rows[0]['cpus']} CPU(s), us per bucket")
    for row in rows:
        line = f"  {row['hook']:<18}"
        for key, label in (
            ("us_per_bucket", ""),
            ("over_built_in_us", "over built-in"),
            ("orchestration_us", "orchestration"),
            ("cpu_us_per_bucket", "CPU time"),
            ("orchestration_cpu_us", "orchestration, CPU time"),
        ):
            if key in row:
                figures = row[key]
                line += f" {figures['median']:>8.2f} [{figures['p25']:.2f}, {figures['p75']:.2f}] {label:<14}"
        print(line.rstrip())
    for entry in goals:
        print(
            f"  goal: {entry['goal']} {entry['limit']}: {entry['value']:.2f}, {'reached' if entry['reached'] else 'MISSED'}"
        )
    sys.stdout.flush()


def main() -> int:
    """Run for every number of CPUs, print the rows and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--buckets", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=300, help="that count")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--cpus", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_hook.json")
    options = parser.parse_args()

    system = system_metadata()
    warn_when_busy(system)
    rows, goals = [], []
    for cpus in options.cpus:
        # A fresh process: the CPUs of threads that run already cannot be taken away from them.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            arguments = (cpus, options.buckets, options.iterations, options.density, options.seed)
            samples = pool.apply(measure, arguments)
        new_rows, new_goals = rows_and_goal(cpus, samples)
        show(new_rows, new_goals)
        rows += new_rows
        goals += new_goals
    write(
        {
            "benchmark": "bench_hook",
            "title": "The hook's cost per bucket",
            "system": system,
            "settings": {
                "ranks": 1,
                "backend": "gloo",
                "buckets": options.buckets,
                "bucket_kib": WIDTH * WIDTH * 4 // 1024,
                "density": options.density,
                "iterations": options.iterations,
                "left_out": f"iterations up to {WARM_UP_ITERATIONS} and multiples of {STATISTICS_PERIOD}",
                "threads": 1,
                "seed": options.seed,
            },
            "goals": goals,
            "rows": rows,
        },
        options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
