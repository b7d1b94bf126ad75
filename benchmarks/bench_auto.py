"""Whether exchange="auto" chooses what is faster: dense, allgather and auto in turns, at several rates and densities.

    sudo python benchmarks/bench_auto.py

Network, ranks, gradients and what is timed are those of bench_wire_time.py. At each rate ("none": no token
bucket) and density, all three arms take turns in the same processes. `sparse_buckets` is how many buckets
auto sends by allgather; `predicted_*_ms` is what its model says of a step in which all buckets travel
so. The model takes buckets one after another, and a rank as if it had its processor for itself.

Goal: auto takes at most 1.25 times the better of the other two; the model asks of allgather to be at least
that much faster (csrc/exchange_auto.h).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_wire_time import measure, prepare, show, shown_network
from exchange_arms import ALL_GATHER, AUTO, DENSE
from timing import RESULTS, goal, paired_ratio, write

ARMS = [DENSE, ALL_GATHER, AUTO]
WORTHWHILE = 1.25


def main() -> int:
    """Run the three arms at each rate and density, print and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit", "none"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.01, 0.1, 0.3])
    parser.add_argument("--layout", choices=["resnet50", "short"], default="resnet50")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=10, help="steps of allgather and auto")
    parser.add_argument("--network", choices=["namespaces", "loopback"], default="namespaces")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_auto.json")
    options = parser.parse_args()
    options.arms = ARMS

    system = prepare(parser, options)
    rows: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for given in options.rates:
        for density in options.densities:
            options.density = density
            new_rows, times = measure(given, options)
            print(f"\ndensity {density}", end="")
            show(new_rows)
            rows += [{"rate": given, "density": density, **row} for row in new_rows]
            best = min((DENSE, ALL_GATHER), key=lambda name: statistics.median(times[name]))
            goals.append(
                goal(
                    f"auto over the better one ({best}), {given}, density {density}, times",
                    paired_ratio(times[AUTO], times[best])["median"],
                    at_most=WORTHWHILE,
                )
            )
    for entry in goals:
        print(entry)
    write(
        {
            "benchmark": "bench_auto",
            "title": 'exchange="auto" beside what it chooses from',
            "system": system,
            "settings": {
                "ranks": options.ranks,
                **shown_network(options.network),
                "layout": options.layout,
                "value_format": "bf16",
                "threads_per_rank": 1,
                "turns": options.turns,
                "warm_up_steps": options.warm_up,
            },
            "goals": goals,
            "rows": rows,
        },
        options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
