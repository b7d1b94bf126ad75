"""What AdamW needs beside Top-K: a small character GPT, four processes, three arms.

    python benchmarks/study_char_gpt.py --data-dir DIR

dense; compressed with one ordinary parameter group; compressed with adam_param_groups. Every arm
trains at the same three learning rates and is judged by the best of them; all runs are kept. The
result is the share of the gap between the first two that adam_param_groups closes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from study_runs import RESULTS, provenance, run_arm, write

WORLD_SIZE = 4
NEEDED_SHARE = 0.75  # fixed before the runs
TIMEOUT_S = 1800
SETTINGS = ["--model=char_gpt", "--dataset=shakespeare", "--batch-size=4", "--device=cpu"]
SETTINGS += ["--gpt-layers=2", "--gpt-width=64", "--optimizer=adamw", "--weight-decay=0.1"]
SETTINGS += ["--lr-schedule=cosine", "--lr-warmup=0.12"]
DENSE, ORDINARY, SPLIT = "dense", "compressed, ordinary group", "compressed, adam_param_groups"
ARMS = {
    DENSE: ["--no-compress"],
    ORDINARY: ["--compress", "--ratio=0.01", "--ordinary-adam-groups"],
    SPLIT: ["--compress", "--ratio=0.01"],
}


def main() -> int:
    """Run the study, print it, write its results file and its figure; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="see train.py")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[0.003, 0.006, 0.012])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "char_gpt.json")
    options = parser.parse_args()

    runs = []
    for rate in options.learning_rates:
        for arm, arm_arguments in ARMS.items():
            arguments = [*SETTINGS, *arm_arguments, f"--lr={rate}", f"--max-steps={options.steps}"]
            arguments += [f"--seed={options.seed}", f"--data-dir={options.data_dir.resolve()}"]
            run = run_arm({"arm": arm, "learning_rate": rate}, arguments, WORLD_SIZE, TIMEOUT_S)
            runs.append(run)

    study = {
        "study": "validation loss of a character GPT with AdamW, compressed against dense",
        "provenance": provenance(runs),
        "processes": WORLD_SIZE,
        "seed": options.seed,
        "comparison": compare(runs),
        "runs": runs,
    }
    print(table(study))
    write(study, options.output)
    draw(study, options.output.with_suffix(".png"))
    return 0


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every arm's best run and the share of the gap that adam_param_groups closes."""
    best = {
        arm: min((run for run in runs if run["arm"] == arm), key=lambda run: run["held_out_loss"])
        for arm in ARMS
    }
    loss = {arm: run["held_out_loss"] for arm, run in best.items()}
    gap = loss[ORDINARY] - loss[DENSE]
    share = (loss[ORDINARY] - loss[SPLIT]) / gap if gap > 0 else None
    return {
        "best": {
            arm: {"learning_rate": run["learning_rate"], "held_out_loss": run["held_out_loss"]}
            for arm, run in best.items()
        },
        "gap": gap,
        "share_of_the_gap_closed": share,  # None: the ordinary group lost nothing
        "needed_share": NEEDED_SHARE,
        "share_reached": share is not None and share >= NEEDED_SHARE,
    }


def table(study: dict[str, Any]) -> str:
    """Return the study as lines of text."""
    lines = ["", f"{'arm':<30}  learning rate  validation loss  bytes/step  step, median"]
    for run in study["runs"]:
        best = run["learning_rate"] == study["comparison"]["best"][run["arm"]]["learning_rate"]
        lines.append(
            f"{run['arm']:<30}  {run['learning_rate']:>13g}  {run['held_out_loss']:>13.4f} "
            f"{'*' if best else ' '}  {run['bytes_sent_per_step']:>10,.0f}  "
            f"{run['step_ms']['median']:>9.1f} ms"
        )
    share = study["comparison"]["share_of_the_gap_closed"]
    closed = "there is no gap" if share is None else f"{100 * share:.0f} % of the gap closed"
    lines.append(f"* best of its arm; {closed} (needed: {100 * NEEDED_SHARE:.0f} %)")
    return "\n".join(lines)


def draw(study: dict[str, Any], path: Path) -> None:
    """Draw the validation loss over the learning rate and the training loss of the best runs."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, (rates, curves) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for arm in ARMS:
        of_arm = sorted(
            (run for run in study["runs"] if run["arm"] == arm),
            key=lambda run: run["learning_rate"],
        )
        rates.plot(
            [run["learning_rate"] for run in of_arm],
            [run["held_out_loss"] for run in of_arm],
            marker="o",
            label=arm,
        )
        best = min(of_arm, key=lambda run: run["held_out_loss"])
        curve = best["train_loss_curve"]
        curves.plot(
            [point["step"] for point in curve],
            [point["loss"] for point in curve],
            label=f"{arm} (lr {best['learning_rate']:g})",
        )
    rates.set(xlabel="peak learning rate", ylabel="validation loss (nats per character)")
    rates.set_xscale("log")
    shown = sorted({run["learning_rate"] for run in study["runs"]})
    rates.set_xticks(shown, [f"{rate:g}" for rate in shown])
    rates.minorticks_off()
    curves.set(xlabel="step", ylabel="training loss, best learning rate of each arm")
    for axes in (rates, curves):
        axes.grid(alpha=0.3)
        axes.legend()
    about = study["provenance"]
    figure.suptitle(
        f"character GPT, {about['parameters']:,} parameters, {study['processes']} processes, "
        "AdamW, 1 % of each gradient sent"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
