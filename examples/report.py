"""The summary table at the end of a run and the file that --results names."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from training import Run, ring_all_reduce_bytes


def results(run: Run) -> dict[str, Any]:
    """Return the figures of a finished run as plain numbers and strings, ready for JSON."""
    processes, last = run.processes, run.history[-1]
    step_ms = [value for record in run.history for value in record["step_ms"]]
    bytes_sent = [value for record in run.history for value in record["bytes_sent"]]
    lower, median, upper = (
        statistics.quantiles(step_ms, n=4, method="inclusive") if len(step_ms) > 1 else step_ms * 3
    )
    dense_bytes = ring_all_reduce_bytes(run.network, processes.world_size)
    return {
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(run.options).items()
        },
        "world_size": processes.world_size,
        "device": torch.cuda.get_device_name(processes.device)
        if processes.device.type == "cuda"
        else "cpu",
        "backend": torch.distributed.get_backend() if processes.grouped else None,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
        "compressed": run.state is not None,
        "held_out_name": run.data.held_out_name,
        "held_out_loss": last["held_out_loss"],
        "held_out_accuracy": last["held_out_accuracy"],
        "train_loss": last["train_loss"],
        "steps": len(step_ms),
        "step_ms": {"p25": lower, "median": median, "p75": upper, "total": sum(step_ms)},
        "bytes_sent_per_step": bytes_sent[-1],
        "bytes_sent_total": sum(bytes_sent),
        "dense_bytes_per_step": dense_bytes,
        "dense_bytes_total": dense_bytes * len(bytes_sent),
        "compression_ratio": last["metrics"].get("compressed_ddp/compression_ratio", 1.0),
        "metrics": last["metrics"],
        "history": run.history,
    }


def table(figures: dict[str, Any]) -> str:
    """Return the summary of results() as lines of text."""
    options, step_ms = figures["options"], figures["step_ms"]
    kind = f"Top-K, ratio {options['ratio']}" if figures["compressed"] else "dense"
    rows = [
        ("run", f"{options['model']} on {options['dataset']}, {kind}"),
        (
            "processes",
            f"{figures['world_size']} "
            f"({figures['device']}, {figures['backend'] or 'no process group'})",
        ),
        ("parameters", f"{figures['parameters']:,}"),
        ("measured on", figures["held_out_name"]),
        ("accuracy", f"{100 * figures['held_out_accuracy']:.2f} %"),
        ("held-out loss", f"{figures['held_out_loss']:.4f}"),
        ("training loss, last epoch", f"{figures['train_loss']:.4f}"),
        (
            "step time, median",
            f"{step_ms['median']:.2f} ms "
            f"(middle half {step_ms['p25']:.2f} .. {step_ms['p75']:.2f})",
        ),
        (
            "bytes sent per step",
            f"{figures['bytes_sent_per_step']:,.0f} (dense {figures['dense_bytes_per_step']:,.0f})",
        ),
        (
            "compression ratio",
            f"{figures['compression_ratio']:.1f} (gradient bytes / payload bytes, last step)",
        ),
        ("steps", f"{figures['steps']:,} in {step_ms['total'] / 1000:.1f} s"),
        (
            "bytes sent in all",
            f"{figures['bytes_sent_total']:,.0f} (dense {figures['dense_bytes_total']:,.0f})",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    rule = "-" * (width + 50)
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in rows), rule])


def write(figures: dict[str, Any], path: Path) -> None:
    """Write results() as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
