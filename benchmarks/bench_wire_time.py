"""How long the synchronisation of one step takes when every rank has a link of 1 Gbit/s.

    sudo python benchmarks/bench_wire_time.py

The network is that of bench_wire.py, with a token bucket (tc tbf) at both ends of each rank's veth pair:
1 Gbit/s in either direction at the same time. Segmentation offload stays on, which saves processor time;
tbf counts the headers of every frame all the same.

Timed is what lies between "all gradients are ready" and "all are averaged on every rank": gradients are
put into DDP's buckets, the ranks meet in a barrier, and then all buckets are handed to the arm's hook
and waited for (exchange_arms.py). So nothing overlaps with a backward pass, for no arm. A step's time
runs from the first rank's start to the last rank's end, on the machine's one clock. All arms take turns
in the same processes; the gradients rotate, so that residuals are in a steady state.

All ranks share the cores of one machine: what they compute runs one after another here, and at the same
time on P machines. So beside every time stand `cpu_ms_per_rank`, the processor time of one rank's
process in that step (its threads in the kernel's network code included), and `line_ms`, what the bytes
of the formula take on the link in frames of 1514 bytes. `--rates none` runs without token buckets.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_wire import (
    TOKEN_BUCKET,
    Loopback,
    Namespaces,
    can_use_namespaces,
    end,
    end_rank,
    join,
    leave,
    say,
    started,
)
from exchange_arms import (
    ALL_GATHER,
    ARMS,
    AUTO,
    DENSE,
    EXCHANGES,
    FP16,
    POWER_SGD,
    SPLIT,
    make_arms,
    shapes_of,
)
from timing import (
    RESULTS,
    goal,
    keep_freed_memory,
    paired_ratio,
    quartiles,
    system_metadata,
    warn_when_busy,
    write,
)

NUM_GRADIENTS = 3  # that take turns
GOALS = {DENSE: 10.0, FP16: 5.0, POWER_SGD: 9.0}  # times slower than the best exchange
GOAL_RATE = "1gbit"
FRAME_BYTES, SEGMENT_BYTES = 1514, 1448  # of a full frame: all of it, and what TCP carries in it


# ---- one rank


def run_rank(
    rank: int,
    world_size: int,
    arm_names: list[str],
    turns: int,
    warm_up: int,
    density: float,
    shapes: list[list[int]],
    interface: str,
    folder: str,
) -> None:
    """Run all arms in turns; say when each step began and ended."""
    keep_freed_memory()
    join(rank, world_size, interface, folder)
    arms = make_arms(arm_names, shapes, density)
    numel = next(iter(arms.values())).buckets.numel
    gradients = [torch.randn(numel) for _ in range(NUM_GRADIENTS)]
    samples: dict[str, list[tuple[int, int, int]]] = {name: [] for name in arms}

    def step(name: str, number: int) -> tuple[int, int, int]:
        """Return start and end on the machine's clock and the processor time between, ns."""
        arms[name].buckets.fill(gradients[number % NUM_GRADIENTS])
        dist.barrier()
        cpu, start = time.process_time_ns(), time.perf_counter_ns()
        arms[name].average()
        done = time.perf_counter_ns()
        return start, done, time.process_time_ns() - cpu

    for name in arms:
        for number in range(warm_up if name in EXCHANGES else 3):
            step(name, number)
    gc.disable()
    for turn in range(turns):
        for name in arms:
            samples[name].append(step(name, turn))
    sent = {name: arm.bytes_sent(world_size) for name, arm in arms.items()}
    choices = arms[AUTO].state.exchange_choices() if AUTO in arms else []
    say({"samples": samples, "sent": sent, "choices": choices})
    end_rank()


# ---- the parent


def prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Return what this machine is, before ranks are started on it."""
    signal.signal(signal.SIGTERM, end)
    system = system_metadata()
    warn_when_busy(system)
    if options.network == "namespaces" and not can_use_namespaces():
        parser.error("network namespaces need root and `ip`")
    return system


def measure(
    given: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Return one row per arm at this rate (or "none"), and the times of its steps, ms."""
    rate = None if given == "none" else given
    network = Namespaces(options.ranks, rate) if options.network == "namespaces" else Loopback()
    arguments = (
        list(options.arms), options.turns, options.warm_up, options.density, shapes_of(options.layout),
    )  # fmt: skip
    with network, started(network, __file__, options.ranks, *arguments) as ranks:
        heard = [rank.hear() for rank in ranks]
        leave(ranks)
    rows, times = [], {}
    for name in options.arms:
        steps = list(zip(*(one["samples"][name] for one in heard), strict=True))
        times[name] = [
            (max(done for _, done, _ in step) - min(start for start, _, _ in step)) / 1e6
            for step in steps
        ]
        cpu = [statistics.fmean(cpu for _, _, cpu in step) / 1e6 for step in steps]
        sent = statistics.fmean(one["sent"][name][0] for one in heard)
        row: dict[str, Any] = {
            "rate": given,
            "arm": name,
            "ms": quartiles(times[name]),
            "cpu_ms_per_rank": quartiles(cpu),
            "bytes_sent": round(sent),
            "line_ms": None,
        }
        if rate is not None:
            bits = 8 * sent * FRAME_BYTES / SEGMENT_BYTES
            row["line_ms"] = round(1e3 * bits / bits_per_second(rate), 2)
        if name == AUTO:
            choices = heard[0]["choices"]
            sparse = sum(choice["exchange"] == ALL_GATHER for choice in choices)
            row["sparse_buckets"] = f"{sparse} of {len(choices)}"
            for way in ("sparse", "dense"):
                predicted = sum(choice[f"{way}_s"] for choice in choices)
                row[f"predicted_{way}_ms"] = round(1e3 * predicted, 2)
        rows.append(row)
    for row in rows:
        for other in (ALL_GATHER, SPLIT, DENSE):
            if other in times:
                row[f"over_{other}"] = paired_ratio(times[row["arm"]], times[other])
    return rows, times


def bits_per_second(rate: str) -> float:
    """Return tc's spelling of a rate as a number."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"bench_wire_time: expected a rate like 1gbit or 100mbit, got {rate}")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one rate."""
    print(f"\nrate {rows[0]['rate']}")
    for row in rows:
        ms, cpu = row["ms"], row["cpu_ms_per_rank"]
        print(
            f"  {row['arm']:<10} {ms['median']:>8.1f} ms [{ms['p25']:.1f}, {ms['p75']:.1f}]; of a rank's processor time "
            f"{cpu['median']:.1f} ms; {row['bytes_sent']:,} B, on the line {row['line_ms']} ms"
        )
    sys.stdout.flush()


def goals_of(times: dict[str, list[float]], rate: str) -> list[dict[str, Any]]:
    """Return how many times slower the other arms are than the exchange with the lower median."""
    best = min(
        (name for name in (ALL_GATHER, SPLIT) if name in times),
        key=lambda name: statistics.median(times[name]),
    )
    return [
        goal(
            f"{name} over the best exchange ({best}), {rate}, times",
            paired_ratio(times[name], times[best])["median"],
            at_least=wanted,
        )
        for name, wanted in GOALS.items()
        if name in times
    ]


def main() -> int:
    """Run all arms at each rate, print and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument(
        "--rates", nargs="+", default=[GOAL_RATE], help="as tc spells them, or none"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--layout", choices=["resnet50", "short"], default="resnet50")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=20, help="steps of allgather and split")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--network", choices=["namespaces", "loopback"], default="namespaces")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_wire_time.json")
    parser.add_argument("--as-rank", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank is not None:
        run_rank(*options.as_rank)
        return 0

    system = prepare(parser, options)
    rows: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for given in options.rates:
        new_rows, times = measure(given, options)
        show(new_rows)
        rows += new_rows
        if given == GOAL_RATE:
            goals += goals_of(times, given)
    for entry in goals:
        print(entry)
    write(
        {
            "benchmark": "bench_wire_time",
            "title": "The synchronisation of one step over links of 1 Gbit/s",
            "system": system,
            "settings": {
                "ranks": options.ranks,
                **shown_network(options.network),
                "layout": options.layout,
                "bucket_mib": "25 (PowerSGD: one bucket)",
                "density": options.density,
                "value_format": "bf16",
                "threads_per_rank": 1,
                "turns": options.turns,
                "warm_up_steps": options.warm_up,
                "load_average_at_the_end": round(
                    os.getloadavg()[0], 2
                ),  # of this benchmark as well
            },
            "goals": goals,
            "rows": rows,
        },
        options.output,
    )
    return 0


def shown_network(network: str) -> dict[str, str]:
    """Return the settings of a results file that tell of the network."""
    is_shaped = network == "namespaces"
    return {
        "network": "one veth pair per rank, tc tbf at both ends"
        if is_shaped
        else "loopback, not shaped",
        "token_bucket": " ".join(TOKEN_BUCKET),
        "congestion_control": congestion_control(),
        "backend": "gloo",
    }


def congestion_control() -> str:
    """Return what TCP uses on this machine, in new namespaces as well."""
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return path.read_text(encoding="ascii").strip()


if __name__ == "__main__":
    sys.exit(main())
