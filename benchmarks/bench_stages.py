"""The stages on the CPU, each beside the cheapest thing that touches the same memory.

    python benchmarks/bench_stages.py

In turns, in one process, on the same number of threads:

    compensate_select_   beside the stream `residual += gradient` (the least that error feedback can
                         cost) and the eager pipeline of PyTorch (add, abs, topk, gather, zero)
    encode               beside nothing: a copy of the selected entries
    decode_apply_        of 1, 2, 4 and 8 payloads, beside a fill of the output
    restore_             beside nothing

The figures are of the operators torch.ops.compressed_ddp.*. The engine runs the same functions, but
keeps its plan and buffers from step to step where an operator makes them anew. So that this does not
count, malloc is told to keep what was freed (timing.keep_freed_memory; --allocator default shows the
difference), and the row `set-up` times the operator on the same layout with nothing to select from
but one entry per group: what is left of the plan's cost.

Gradients are Gaussian and new in every turn: a random window of one of several larger buffers. The
residual is warmed up (--warmup-steps), so that it holds what many steps have left over. Together the
buffers are far larger than the caches.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import (
    RESULTS,
    Prepared,
    goal,
    in_turns,
    keep_freed_memory,
    paired_ratio,
    quartiles,
    system_metadata,
    threads,
    warn_when_busy,
    write,
)

from compressed_ddp import _native, ops

NUM_BUFFERS = 4  # 100 MiB at the smaller of the default sizes: three times a 32 MiB cache
WINDOW_NUMEL = 1 << 16  # how far the window of a turn may move in its buffer
ALIGNMENT_NUMEL = 16  # 64 bytes, as torch allocates
MIN_COMPRESS_NUMEL = 1024  # TopKEFState's default
GIB = 1e9  # GB/s are 10^9 bytes


# ---- what a bucket looks like


@dataclass(frozen=True)
class Segmentation:
    """How a bucket is cut; the arguments that all operators take."""

    segments: list[int]
    groups: list[int]
    k: list[int]

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int]]:
        """Return them in the operators' order."""
        return self.segments, self.groups, self.k


def segmentation(kind: str, numel: int, density: float) -> Segmentation:
    """Return one segment, or the parameters of a ResNet-50 or a GPT-2 from the last to the first.

    `layout_of` in gpu/bench_cuda_stages.cu makes the same of the same words. Longer buckets repeat
    them, and the last one is cut to fit. As in the engine, 1-D parameters and those below
    MIN_COMPRESS_NUMEL travel dense.
    """
    models = {"one": [(numel, False)], "resnet50": resnet50_parameters(), "gpt2": gpt2_parameters()}
    shapes: list[tuple[int, bool]] = []
    left = numel
    while left > 0:
        for parameter_numel, is_vector in reversed(models[kind]):
            if left > 0:
                shapes.append((min(parameter_numel, left), is_vector))
                left -= shapes[-1][0]
    segments, groups, k = [], [], []
    for parameter_numel, is_vector in shapes:
        segments.append(parameter_numel)
        if is_vector or parameter_numel < MIN_COMPRESS_NUMEL:
            groups.append(-1)
        else:
            groups.append(len(k))
            k.append(_native._C.selection_k(density, parameter_numel))
    return Segmentation(segments, groups, k)


def resnet50_parameters() -> list[tuple[int, bool]]:
    """Return (numel, is 1-D) of ResNet-50's 161 parameters in order: 25,557,032 entries."""

    def convolution(inputs: int, outputs: int, width: int) -> list[tuple[int, bool]]:
        return [(inputs * outputs * width * width, False), (outputs, True), (outputs, True)]

    parameters = convolution(3, 64, 7)
    inputs = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            parameters += convolution(inputs, planes, 1) + convolution(planes, planes, 3)
            parameters += convolution(planes, 4 * planes, 1)
            if block == 0:
                parameters += convolution(inputs, 4 * planes, 1)
            inputs = 4 * planes
    return [*parameters, (2048 * 1000, False), (1000, True)]


def gpt2_parameters() -> list[tuple[int, bool]]:
    """Return (numel, is 1-D) of the smallest GPT-2's parameters in order: 124,439,808 entries."""
    width = 768
    block = [
        (width, True),
        (width, True),
        (width * 3 * width, False),
        (3 * width, True),
        (width * width, False),
        (width, True),
        (width, True),
        (width, True),
        (width * 4 * width, False),
        (4 * width, True),
        (4 * width * width, False),
        (width, True),
    ]
    embeddings = [(50257 * width, False), (1024 * width, False)]
    return [*embeddings, *block * 12, (width, True), (width, True)]


class Gradients:
    """Gaussian gradients, another one at every call, without drawing new numbers."""

    def __init__(self, numel: int, generator: torch.Generator) -> None:
        self.numel = numel
        self.buffers = [
            torch.randn(numel + WINDOW_NUMEL, generator=generator) for _ in range(NUM_BUFFERS)
        ]
        self.generator = generator
        self.calls = 0

    def next(self) -> torch.Tensor:
        """Return a flat view [numel]."""
        self.calls += 1
        windows = WINDOW_NUMEL // ALIGNMENT_NUMEL
        at = int(torch.randint(windows, (), generator=self.generator)) * ALIGNMENT_NUMEL
        return self.buffers[self.calls % NUM_BUFFERS][at : at + self.numel]


# ---- the pipeline that people write


def eager_pipeline(
    gradient: torch.Tensor, residual: torch.Tensor, layout: Segmentation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-K with error feedback in plain PyTorch: the same selection, in six passes and more."""
    residual.add_(gradient)
    values, indices = [], []
    offset = 0
    for segment_numel, group in zip(layout.segments, layout.groups):
        if group >= 0:
            part = residual.narrow(0, offset, segment_numel)
            selected = torch.topk(part.abs(), layout.k[group], sorted=False).indices
            values.append(part.gather(0, selected))
            part.index_fill_(0, selected, 0)
            indices.append(selected + offset if offset else selected)
        offset += segment_numel
    return torch.cat(values), torch.cat(indices)


# ---- one configuration


@dataclass(frozen=True)
class Configuration:
    """One combination of the axes."""

    size_mib: float
    density: float
    segmentation: str
    threads: int
    world_sizes: Sequence[int]

    @property
    def numel(self) -> int:
        """Return the entries of the bucket."""
        return int(self.size_mib * 2**20) // 4


def measure(
    configuration: Configuration, repetitions: int, warmup_steps: int, seed: int
) -> list[dict[str, Any]]:
    """Return the rows of one configuration."""
    numel = configuration.numel
    generator = torch.Generator().manual_seed(seed)
    layout = segmentation(configuration.segmentation, numel, configuration.density)
    gradients = Gradients(numel, generator)
    with threads(configuration.threads):
        residual = warmed_up_residual(gradients, layout, warmup_steps)
        selections = some_selections(gradients, residual, layout, max(configuration.world_sizes))
        arms = {
            **select_arms(gradients, residual, layout),
            **payload_arms(selections, residual, layout, configuration.world_sizes),
        }
        samples = in_turns(arms, repetitions, warmup=2)
    return [row(configuration, layout, name, samples) for name in samples]


def warmed_up_residual(gradients: Gradients, layout: Segmentation, steps: int) -> torch.Tensor:
    """Return a residual [numel] after so many steps: most of it waits, the largest has left."""
    residual = torch.zeros(gradients.numel)
    for _ in range(steps):
        ops.compensate_select_(gradients.next(), residual, *layout.arguments)
    return residual


def some_selections(
    gradients: Gradients, residual: torch.Tensor, layout: Segmentation, count: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return (values, indices, gradient) of consecutive steps, in place of those of as many ranks."""
    selections = []
    for _ in range(count):
        gradient = gradients.next()
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
        selections.append((values, indices, gradient))
    return selections


def select_arms(
    gradients: Gradients, residual: torch.Tensor, layout: Segmentation
) -> dict[str, Callable[[int], object]]:
    """Return stage 1 and what it is compared with; each has a residual of its own."""
    stream_residual = residual.clone()
    eager_residual = residual.clone()
    # One entry per group: all that is left is the call, the plan and the outputs.
    tiny = Segmentation([1] * len(layout.segments), layout.groups, [1] * len(layout.k))
    tiny_residual = torch.zeros(len(layout.segments))

    def compensate_select(turn: int) -> Callable[[], object]:
        gradient = gradients.next()
        return lambda: ops.compensate_select_(gradient, residual, *layout.arguments)

    def stream(turn: int) -> Callable[[], object]:
        gradient = gradients.next()
        return lambda: stream_residual.add_(gradient)

    def eager(turn: int) -> Callable[[], object]:
        gradient = gradients.next()
        return lambda: eager_pipeline(gradient, eager_residual, layout)

    def set_up(turn: int) -> Callable[[], object]:
        gradient = gradients.next()[: len(layout.segments)]
        return lambda: ops.compensate_select_(gradient, tiny_residual, *tiny.arguments)

    return {
        "stream": Prepared(stream),
        "compensate_select_": Prepared(compensate_select),
        "set-up": Prepared(set_up),
        "eager": Prepared(eager),
    }


def payload_arms(
    selections: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    residual: torch.Tensor,
    layout: Segmentation,
    world_sizes: Sequence[int],
) -> dict[str, Callable[[int], object]]:
    """Return encode, decode_apply_ per world size, its fill, and restore_."""
    outputs = [torch.zeros_like(residual) for _ in range(NUM_BUFFERS)]
    restored = residual.clone()
    used = iter(range(sys.maxsize))  # outputs rotate over all arms that write one

    def encode(rank: int) -> torch.Tensor:
        return ops.encode(*selections[rank], *layout.arguments, rank=rank)

    def fill(turn: int) -> Callable[[], object]:
        output = outputs[next(used) % NUM_BUFFERS]
        return lambda: output.fill_(0)

    def decode_apply(world_size: int) -> Prepared:
        gathered = torch.stack([encode(rank) for rank in range(world_size)])

        def prepare(turn: int) -> Callable[[], object]:
            output = outputs[next(used) % NUM_BUFFERS]
            return lambda: ops.decode_apply_(output, gathered, *layout.arguments)

        return Prepared(prepare)

    payload = encode(0)
    arms: dict[str, Callable[[int], object]] = {
        "encode": lambda turn: encode(turn % len(selections)),
        "fill": Prepared(fill),
    }
    for world_size in world_sizes:
        arms[f"decode_apply_ {world_size}"] = decode_apply(world_size)
    arms["restore_"] = lambda turn: ops.restore_(restored, payload, *layout.arguments)
    return arms


# ---- rows


def row(
    configuration: Configuration, layout: Segmentation, name: str, samples: dict[str, list[float]]
) -> dict[str, Any]:
    """Return one line of the result: what ran, its time, and its ratios inside the same turns."""
    stage, _, world_size = name.partition(" ")
    times = quartiles(samples[name])
    num_bytes = touched_bytes(stage, configuration.numel, layout, int(world_size or 1))
    entry: dict[str, Any] = {
        "stage": stage,
        "size_mib": configuration.size_mib,
        "density": configuration.density,
        "segmentation": configuration.segmentation,
        "threads": configuration.threads,
        "payloads": int(world_size) if world_size else None,
        "numel": configuration.numel,
        "segments": len(layout.segments),
        "selected": sum(layout.k),
        "ms": times,
        "gb_per_s": float(f"{num_bytes / times['median'] / 1e6:.4g}") if num_bytes else None,
    }
    if stage == "compensate_select_":
        entry["over_stream"] = paired_ratio(samples[name], samples["stream"])
        entry["eager_over_it"] = paired_ratio(samples["eager"], samples[name])
    if stage == "decode_apply_":
        entry["over_fill"] = paired_ratio(samples[name], samples["fill"])
    return entry


def touched_bytes(stage: str, numel: int, layout: Segmentation, payloads: int) -> int | None:
    """Return the bytes that the stage has to read and write at least; None where that says little."""
    payload_bytes = ops.payload_bytes(*layout.arguments)
    selected_bytes = 8 * sum(layout.k)
    return {
        "stream": 12 * numel,
        "compensate_select_": 12 * numel + selected_bytes,
        "encode": 2 * payload_bytes,
        "fill": 4 * numel,
        "decode_apply_": 4 * numel + payloads * payload_bytes,
    }.get(stage)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what is aimed at, beside the figures."""
    reached = []
    for entry in rows:
        where = {
            axis: entry[axis]
            for axis in ("stage", "size_mib", "density", "segmentation", "threads")
        }
        density = entry["density"]
        if entry["stage"] == "compensate_select_":
            limit = 2.0 if density <= 0.01 else 5.0
            value = entry["over_stream"]["median"]
            reached.append({**where, **goal("time over the stream's", value, at_most=limit)})
            if density <= 0.01:
                value = entry["eager_over_it"]["median"]
                reached.append(
                    {**where, **goal("eager pipeline's time over its", value, at_least=15)}
                )
        if entry["stage"] == "decode_apply_" and entry["payloads"] == 8 and density <= 0.01:
            limit = 1.3 if density <= 0.001 else 3.0
            value = entry["over_fill"]["median"]
            reached.append({**where, **goal("8 payloads over a fill", value, at_most=limit)})
    return reached


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one configuration."""
    first = rows[0]
    print(
        f"\n{first['size_mib']:g} MiB, density {first['density']:g}, {first['segments']} segment(s), "
        f"{first['threads']} thread(s)"
    )
    for entry in rows:
        name = entry["stage"] + (f" of {entry['payloads']}" if entry["payloads"] else "")
        line = f"  {name:<20} {entry['ms']['median']:>9.3f} ms  [{entry['ms']['p25']:.3f}, {entry['ms']['p75']:.3f}]"
        for key, label in (
            ("over_stream", "x stream"),
            ("over_fill", "x fill"),
            ("eager_over_it", "x faster than eager"),
        ):
            if key in entry:
                ratio = entry[key]
                line += f"   {ratio['median']:.2f} {label} [{ratio['p25']:.2f}, {ratio['p75']:.2f}]"
        print(line)
    for entry in goals(rows):
        print(
            f"  goal: {entry['goal']} {entry['limit']}: {entry['value']:.2f}, {'reached' if entry['reached'] else 'MISSED'}"
        )
    sys.stdout.flush()


def main() -> int:
    """Run all configurations, print them and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[25, 100], help="MiB of fp32")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.001, 0.01, 0.1])
    parser.add_argument(
        "--segmentations", nargs="+", default=["one", "resnet50"], choices=["one", "resnet50"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--payloads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--allocator", choices=["keep", "default"], default="keep")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_stages_cpu.json")
    options = parser.parse_args()

    system = system_metadata()
    warn_when_busy(system)
    kept = keep_freed_memory() if options.allocator == "keep" else False
    rows = []
    for size in options.sizes:
        for kind in options.segmentations:
            for density in options.densities:
                for count in options.threads:
                    configuration = Configuration(size, density, kind, count, options.payloads)
                    rows += measure(
                        configuration, options.repetitions, options.warmup_steps, options.seed
                    )
                    show(rows[-len(options.payloads) - 7 :])
    write(
        {
            "benchmark": "bench_stages",
            "title": "The stages on the CPU",
            "system": system,
            "settings": {
                "dtype": "float32",
                "repetitions": options.repetitions,
                "warmup_steps": options.warmup_steps,
                "gradients": "Gaussian, new in every turn",
                "freed_memory_is_kept": kept,
                "seed": options.seed,
            },
            "goals": goals(rows),
            "rows": rows,
        },
        options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
