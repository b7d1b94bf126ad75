"""Train the real 8x8 digits twice on two processes, dense and compressed, and compare the two.

Prints one table and draws build/demo.png. `make demo` runs it; it downloads nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

from launch import run_training

HERE = Path(__file__).resolve().parent
WORLD_SIZE = 2
TIMEOUT_S = 300
LINKS = {"1 Gbit/s": 1e9, "100 Mbit/s": 1e8}  # bits per second
ARMS = {"dense": ["--no-compress"], "compressed": ["--compress"]}


def main() -> int:
    """Run both arms, print the table and draw the figure; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--figure",
        type=Path,
        default=HERE.parent / "build" / "demo.png",
        help="where the figure is written",
    )
    figure: Path = parser.parse_args().figure

    runs = {}
    for arm, arguments in ARMS.items():
        started = time.perf_counter()
        print(f"training {arm} on {WORLD_SIZE} processes ...", end=" ", flush=True)
        try:
            runs[arm] = run_training(
                [f"--config={HERE / 'configs' / 'digits_demo.yaml'}", "--device=cpu", *arguments],
                WORLD_SIZE,
                TIMEOUT_S,
            )
        except RuntimeError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
        print(f"{time.perf_counter() - started:.0f} s, start of the processes included")

    print(table(runs))
    draw(runs, figure)
    print(f"figure: {figure}")
    return 0


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the comparison of the arms as lines of text."""
    ratio = runs["compressed"]["options"]["ratio"]
    columns = ["", "dense", f"compressed ({100 * ratio:g} % sent)"]
    rows = [
        ["accuracy", *(f"{100 * run['held_out_accuracy']:.2f} %" for run in runs.values())],
        ["held-out loss", *(f"{run['held_out_loss']:.4f}" for run in runs.values())],
        ["training loss, last epoch", *(f"{run['train_loss']:.4f}" for run in runs.values())],
        [
            "bytes sent per step and process",
            *(f"{run['bytes_sent_per_step']:,.0f}" for run in runs.values()),
        ],
        [
            "bytes sent in all, per process",
            *(f"{run['bytes_sent_total']:,.0f}" for run in runs.values()),
        ],
        [
            "step time, measured here",
            *(f"{run['step_ms']['median']:.1f} ms" for run in runs.values()),
        ],
        *(
            [f"step time at {link} *", *(f"{_step_ms(run, rate):.1f} ms" for run in runs.values())]
            for link, rate in LINKS.items()
        ),
    ]
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]

    def line(row: list[str]) -> str:
        return "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()

    dense = runs["dense"]
    about = (
        f"{dense['options']['model']}, {dense['parameters']:,} parameters, {dense['steps']} steps "
        f"on the 8x8 digits of scikit-learn; accuracy on {dense['held_out_name']}\n"
        f"{WORLD_SIZE} processes on {dense['processor']}, {dense['cores']} cores, torch "
        f"{dense['torch']}, Gloo over loopback"
    )
    note = (
        "* computed from counted bytes, not measured: the step time measured here (median,\n"
        "  exchange over loopback included) plus the bytes of one step at the speed of the link,\n"
        "  nothing overlapped"
    )
    rule = "-" * len(line(columns))
    return "\n".join(["", about, rule, line(columns), rule, *map(line, rows), rule, note])


def _step_ms(run: dict[str, Any], bits_per_second: float) -> float:
    return run["step_ms"]["median"] + 1000 * 8 * run["bytes_sent_per_step"] / bits_per_second


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the training loss of both arms over steps and over bytes sent."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, (over_steps, over_bytes) = pyplot.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    for arm, run in runs.items():
        losses = [loss for record in run["history"] for loss in record["losses"]]
        sent = list(
            accumulate(count for record in run["history"] for count in record["bytes_sent"])
        )
        smooth = [
            sum(losses[max(0, step - 9) : step + 1]) / len(losses[max(0, step - 9) : step + 1])
            for step in range(len(losses))
        ]
        over_steps.plot(range(1, len(smooth) + 1), smooth, label=arm)
        over_bytes.plot(sent, smooth, label=arm)
    over_steps.set(xlabel="step", ylabel="training loss (mean of the last 10 steps)", yscale="log")
    over_bytes.set(xlabel="bytes sent per process", xscale="log")
    for axes in (over_steps, over_bytes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"{runs['dense']['options']['model']} on the 8x8 digits, {WORLD_SIZE} processes"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
