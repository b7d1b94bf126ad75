"""Does Top-K with error feedback cost accuracy? SimpleCNN on MNIST, two processes, paired seeds.

    python benchmarks/study_mnist.py --data-dir DIR

Every seed trains twice, dense and compressed, from the same weights on the same batches. All runs
are kept. The result is the mean of the paired differences in test accuracy, with its 95 % t
interval.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from study_runs import RESULTS, provenance, run_arm, write

WORLD_SIZE = 2
MARGIN_POINTS = 0.3  # fixed before the runs: the mean difference has to stay within it
TIMEOUT_S = 1800
SETTINGS = ["--model=simple_cnn", "--dataset=mnist", "--batch-size=64", "--device=cpu"]
SETTINGS += ["--optimizer=sgd", "--lr=0.01", "--momentum=0.9"]
ARMS = {"dense": ["--no-compress"], "compressed": ["--compress", "--ratio=0.01"]}


def main() -> int:
    """Run the study, print it and write its results file; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="see train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="two or more")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "mnist_simple_cnn.json")
    options = parser.parse_args()
    if len(set(options.seeds)) < 2:
        parser.error(
            "--seeds needs at least two different seeds: an interval over one has no width"
        )

    runs = []
    for seed in options.seeds:
        for arm, arm_arguments in ARMS.items():
            arguments = [*SETTINGS, *arm_arguments, f"--seed={seed}", f"--epochs={options.epochs}"]
            arguments.append(f"--data-dir={options.data_dir.resolve()}")
            runs.append(run_arm({"arm": arm, "seed": seed}, arguments, WORLD_SIZE, TIMEOUT_S))

    study = {
        "study": "test accuracy of SimpleCNN on MNIST, compressed against dense, paired by seed",
        "provenance": provenance(runs),
        "processes": WORLD_SIZE,
        "comparison": compare(runs),
        "runs": runs,
    }
    print(table(study))
    write(study, options.output)
    return 0


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the paired differences compressed - dense in points of accuracy, mean and interval."""
    from scipy import stats

    accuracy = {(run["arm"], run["seed"]): 100 * run["held_out_accuracy"] for run in runs}
    seeds = [run["seed"] for run in runs if run["arm"] == "dense"]
    differences = [accuracy["compressed", seed] - accuracy["dense", seed] for seed in seeds]
    mean = statistics.mean(differences)
    deviation = statistics.stdev(differences)
    half_width = stats.t.ppf(0.975, len(differences) - 1) * deviation / len(differences) ** 0.5
    return {
        "differences_points": differences,
        "mean_points": mean,
        "interval_95_points": [mean - half_width, mean + half_width],
        "margin_points": MARGIN_POINTS,
        "mean_within_margin": abs(mean) <= MARGIN_POINTS,
        "worst_seed_points": min(differences),
    }


def table(study: dict[str, Any]) -> str:
    """Return the study as lines of text."""
    lines = ["", "seed  arm         accuracy  held-out loss  bytes/step  step, median"]
    for run in study["runs"]:
        lines.append(
            f"{run['seed']:>4}  {run['arm']:<10}  {100 * run['held_out_accuracy']:>6.2f} %  "
            f"{run['held_out_loss']:>13.4f}  {run['bytes_sent_per_step']:>10,.0f}  "
            f"{run['step_ms']['median']:>9.1f} ms"
        )
    comparison = study["comparison"]
    low, high = comparison["interval_95_points"]
    differences = ", ".join(f"{value:+.2f}" for value in comparison["differences_points"])
    within = "within" if comparison["mean_within_margin"] else "NOT within"
    lines.append(
        f"compressed - dense: {differences} points; mean {comparison['mean_points']:+.3f}, "
        f"95 % interval {low:+.3f} .. {high:+.3f}; mean {within} {MARGIN_POINTS} points"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
