"""The bytes that a rank sends in one step, allgather and split, from 2 to 1,024 ranks: counted, no process, no clock.

    python benchmarks/count_exchange.py

The parameters of ResNet-50 and of the smallest GPT-2, cut into buckets by DDP's own function: DDP's default
(a first bucket of 1 MiB, the others of 25 MiB), larger buckets (`bucket_cap_mb`), and the whole model in
one. Every bucket is cut into ranges by csrc/ranges.cpp; the tests compare the count with what metrics()
says of real ranks. Sizes of payloads are those of `_C.payload_bytes`, headers and dense parts included. Of
bytes per rank, the mean over the ranks is shown.

    allgather   (P - 1) x payload of the bucket
    split       all-to-all: the payloads of all ranges but its own
                all-gather: (P - 1) x the largest payload of a range

What split sends beyond 2 (P - 1) / P payloads of an uncut bucket has six causes, which add up:

    header      8 bytes per range instead of per bucket
    k           ceil(density x numel), at least 1, of every part of a selection that a border cuts
    index       directory and high bits of more and shorter payloads
    alignment   payloads to 8 bytes
    largest     ranges of unequal size, in the all-gather all as large as the largest
    (P - 1) / P itself grows by 1.14 from 8 to 1,024 ranks, which no format changes
"""

from __future__ import annotations

import argparse
import bisect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_stages import MIN_COMPRESS_NUMEL, gpt2_parameters, resnet50_parameters
from timing import RESULTS, goal, write_counted

from compressed_ddp import _native

MIB = 1 << 20
FIRST_BUCKET_BYTES = MIB
CHUNK_NUMEL = 4096
VALUE_BYTES = 2  # bf16
MODELS = {"ResNet-50": resnet50_parameters, "GPT-2": gpt2_parameters}
SCOPES = ("tensor", "chunk")
RANKS = tuple(2**i for i in range(1, 11))
BUCKET_MIB: tuple[int | None, ...] = (25, 50, 100, 200, 400, None)  # None: the whole model
DENSITY = 0.01
SMALL_RANKS, LARGE_RANKS = 8, 1024
GOALS = {"chunk": 1.2, "tensor": 1.6}

Parameter = tuple[int, bool]  # numel, is 1-D


@dataclass(frozen=True)
class Part:
    """What is selected from by itself, or travels dense; `begin` in the bucket."""

    begin: int
    numel: int
    dense: bool


@dataclass(frozen=True)
class Payload:
    """The sizes of one payload, bytes."""

    header: int
    index: int  # directory and high bits
    entries: int  # values and low bits
    dense: int
    padding: int

    @property
    def all(self) -> int:
        """Return the payload's size."""
        return self.header + self.index + self.entries + self.dense + self.padding


# ---- the rules once more


def buckets_of(parameters: Sequence[Parameter], cap_mib: int | None) -> list[list[Parameter]]:
    """Return DDP's buckets from the second step on."""
    last_first = list(parameters)[::-1]
    if cap_mib is None:
        return [last_first]
    tensors = [torch.empty(numel, device="meta") for numel, _ in last_first]
    caps = [FIRST_BUCKET_BYTES, 25 * MIB] if cap_mib == 25 else [cap_mib * MIB]
    indices, _ = dist._compute_bucket_assignment_by_size(tensors, caps)
    return [[last_first[i] for i in bucket] for bucket in indices]


def parts_of(
    bucket: Iterable[Parameter], scope: str, min_compress_numel: int = MIN_COMPRESS_NUMEL
) -> list[Part]:
    """Return the parts of a bucket's parameters, in order."""
    parts: list[Part] = []
    begin = 0
    for numel, is_vector in bucket:
        dense = is_vector or numel < min_compress_numel
        width = CHUNK_NUMEL if scope == "chunk" and not dense else numel
        for at in range(0, numel, width):
            parts.append(Part(begin + at, min(width, numel - at), dense))
        begin += numel
    return parts


def borders(parts: Sequence[Part], count: int, density: float) -> list[int]:
    """Return where the ranges of `count` owners end."""
    cut = [(part.numel, part.dense) for part in parts]
    return _native._C.range_ends(cut, count, density, "bf16", one_selection=False)


@cache
def payload_of(layout: tuple[tuple[int, bool], ...], density: float) -> Payload:
    """Return the sizes of the payload of segments (numel, dense), each of which is one selection."""
    numels = [numel for numel, _ in layout]
    compressed = [numel for numel, dense in layout if not dense]
    k = [_native._C.selection_k(density, numel) for numel in compressed]
    ids = iter(range(len(k)))
    groups = [-1 if dense else next(ids) for _, dense in layout]
    selected, numel = sum(k), sum(numels)
    directory = 4 * -(-selected // 256)
    high = 8 * -(-(selected + ((numel - 1) >> 8)) // 64) if selected else 0
    dense = 4 * (numel - sum(compressed))
    sections = [directory, high, dense, VALUE_BYTES * selected, selected]
    everything = _native._C.payload_bytes(numels, groups, k, "bf16")
    header = _native._C.payload_header_bytes
    return Payload(
        header=header,
        index=directory + high,
        entries=(VALUE_BYTES + 1) * selected,
        dense=dense,
        padding=everything - header - sum(sections),
    )


def ranges_of(parts: Sequence[Part], ends: Sequence[int], density: float) -> list[Payload]:
    """Return the payload of every owner's range that is not empty."""
    begins = [part.begin for part in parts]
    payloads, begin = [], 0
    for end in ends:
        if begin == end:
            continue
        first = bisect.bisect_right(begins, begin) - 1
        last = bisect.bisect_left(begins, end)
        layout = tuple(
            (min(part.begin + part.numel, end) - max(part.begin, begin), part.dense)
            for part in parts[first:last]
        )
        payloads.append(payload_of(layout, density))
        begin = end
    return payloads


# ---- bytes per rank


def bytes_sent(
    parts: Sequence[Part], exchange: str, world_size: int, density: float = DENSITY
) -> list[int]:
    """Return what each rank sends of one bucket in a step."""
    if exchange == "allgather":
        whole = ranges_of(parts, [parts[-1].begin + parts[-1].numel], density)
        return [(world_size - 1) * whole[0].all] * world_size
    payloads = ranges_of(parts, borders(parts, world_size, density), density)
    sizes = [payload.all for payload in payloads] + [0] * (world_size - len(payloads))
    return [sum(sizes) - own + (world_size - 1) * max(sizes) for own in sizes]


def count(parts_of_buckets: Sequence[Sequence[Part]], world_size: int) -> dict[str, Any]:
    """Return the bytes per rank of both exchanges, mean over the ranks, and what split's consist of."""
    share = (world_size - 1) / world_size
    sums: dict[str, float] = dict.fromkeys(
        ("ideal", "header", "k", "index", "alignment", "largest", "split"), 0.0
    )
    all_gather = 0
    by_rank = [0] * world_size
    for parts in parts_of_buckets:
        (whole,) = ranges_of(parts, [parts[-1].begin + parts[-1].numel], DENSITY)
        payloads = ranges_of(parts, borders(parts, world_size, DENSITY), DENSITY)
        all_gather += (world_size - 1) * whole.all
        total, largest = sum(one.all for one in payloads), max(one.all for one in payloads)
        sums["ideal"] += 2 * share * whole.all
        for key, of in (
            ("header", "header"),
            ("k", "entries"),
            ("index", "index"),
            ("alignment", "padding"),
        ):
            sums[key] += (
                2 * share * (sum(getattr(one, of) for one in payloads) - getattr(whole, of))
            )
        sums["largest"] += (world_size - 1) * largest - share * total
        sums["split"] += share * total + (world_size - 1) * largest
        for rank in range(world_size):
            own = payloads[rank].all if rank < len(payloads) else 0
            by_rank[rank] += total - own + (world_size - 1) * largest
    assert abs(sum(list(sums.values())[:6]) - sums["split"]) < 1e-6 * sums["split"]
    return {
        "allgather_bytes": all_gather,
        "split_bytes": round(sums["split"]),
        "split_worst_rank_bytes": max(by_rank),
        "allgather_over_split": round(all_gather / sums["split"], 3),
        "two_payloads": round(sums["ideal"]),
        **{key: round(sums[key]) for key in ("header", "k", "index", "alignment", "largest")},
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the bytes per rank over the ranks."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(MODELS), figsize=(11, 4.2), layout="constrained")
    for axes, model in zip(all_axes, MODELS):
        for bucket in ("25", "100", "whole model"):
            for scope, style in (("tensor", "-"), ("chunk", "--")):
                of = [
                    row
                    for row in rows
                    if (row["model"], row["scope"], row["bucket_mib"]) == (model, scope, bucket)
                ]
                ranks = [row["ranks"] for row in of]
                if bucket == "25" and scope == "tensor":
                    megabytes = [row["allgather_bytes"] / 1e6 for row in of]
                    axes.plot(ranks, megabytes, color="black", marker=".", label="allgather")
                megabytes = [row["split_bytes"] / 1e6 for row in of]
                color = {"25": "C0", "100": "C1", "whole model": "C2"}[bucket]
                name = f"{bucket} MiB" if bucket[0].isdigit() else bucket
                label = f"split, {name}, {scope}"
                axes.plot(ranks, megabytes, style, color=color, marker=".", label=label)
        axes.set(xlabel="ranks", ylabel="MB per rank and step", title=model)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
        axes.grid(alpha=0.3)
    all_axes[0].legend(fontsize=8)
    figure.suptitle(f"bytes that a rank sends, density {DENSITY:g}, bf16 values (counted)")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    """Count, print, draw and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "count_exchange.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    growths: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for model, parameters in MODELS.items():
        for scope in SCOPES:
            for cap in BUCKET_MIB:
                buckets = [parts_of(bucket, scope) for bucket in buckets_of(parameters(), cap)]
                if len(buckets) == 1 and cap not in (100, None):
                    continue  # the whole model
                name = "whole model" if cap is None else str(cap)
                about = {
                    "model": model,
                    "scope": scope,
                    "bucket_mib": name,
                    "buckets": len(buckets),
                }
                counts = {world_size: count(buckets, world_size) for world_size in RANKS}
                rows += [{**about, "ranks": ranks, **found} for ranks, found in counts.items()]
                growth = {
                    key: round(counts[LARGE_RANKS][key] / counts[SMALL_RANKS][key], 4)
                    for key in ("allgather_bytes", "split_bytes")
                }
                growths.append({**about, **growth})
                print(growths[-1])
                if cap in (25, 100, None):
                    text = (
                        f"split, {LARGE_RANKS:,} ranks over {SMALL_RANKS}: {model}, {scope}, {name}"
                    )
                    text += " MiB" if cap else ""
                    goals.append(goal(text, growth["split_bytes"], at_most=GOALS[scope]))
    payload_of.cache_clear()
    draw(rows, options.output.with_suffix(".png"))
    write_counted(
        "count_exchange",
        "Bytes per rank of the exchanges, 2 to 1,024 ranks (counted, not timed)",
        settings={
            "density": DENSITY,
            "value_format": "bf16",
            "first_bucket_bytes": f"{FIRST_BUCKET_BYTES} with buckets of 25 MiB",
        },
        goals=goals,
        rows=rows,
        path=options.output,
        growth=growths,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
