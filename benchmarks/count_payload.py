"""Bits per sent entry, read off the payloads of ResNet-50's gradients: no clock, no network.

    python benchmarks/count_payload.py

The parameters are torchvision's, cut by DDP's own function into the buckets that it uses from the
second step on: reversed, a first one of 1 MiB, the others of 25 MiB. Each bucket is selected from and
encoded once, scope "tensor", with random gradients; the size of a payload depends on the layout
alone. What travels dense (1-D parameters, and those below 1,024 entries) is reported apart: the bits
of an entry hold header, directory, index bits, values, scales and padding.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_stages import MIN_COMPRESS_NUMEL
from timing import RESULTS, goal, write_counted

from compressed_ddp import _native, ops

FIRST_BUCKET_BYTES = 1 << 20  # dist._DEFAULT_FIRST_BUCKET_BYTES
BUCKET_BYTES = 25 << 20
VALUE_FORMATS = ("fp32", "bf16", "sign")
DENSITIES = (0.001, 0.01, 0.1)
GOALS = {("bf16", 0.1): 26, ("bf16", 0.01): 26, ("bf16", 0.001): 30, ("sign", 0.01): 12}
ENTRY_BYTES_V1 = 8  # int32 and float32: what an entry of version 1 took


def buckets() -> list[list[torch.Tensor]]:
    """Return the parameters of each bucket, in the order in which they lie in it."""
    from torchvision.models import resnet50

    parameters = list(resnet50().parameters())[::-1]
    indices, _ = dist._compute_bucket_assignment_by_size(
        parameters, [FIRST_BUCKET_BYTES, BUCKET_BYTES]
    )
    return [[parameters[i] for i in bucket] for bucket in indices]


def payload_of(
    bucket: list[torch.Tensor], density: float, value_format: str, generator: torch.Generator
) -> tuple[int, int, int]:
    """Return payload bytes, sent entries and dense entries of one bucket, from a payload that was encoded."""
    segments, groups, k = [], [], []
    for parameter in bucket:
        segments.append(parameter.numel())
        if parameter.dim() <= 1 or parameter.numel() < MIN_COMPRESS_NUMEL:
            groups.append(-1)
            continue
        groups.append(len(k))
        k.append(_native._C.selection_k(density, parameter.numel()))
    gradient = torch.randn(sum(segments), generator=generator)
    values, indices, _ = ops.compensate_select_(
        gradient, torch.zeros_like(gradient), segments, groups, k
    )
    payload = ops.encode(
        values, indices, gradient, segments, groups, k,
        value_format=value_format, rank=0,
    )  # fmt: skip
    dense_numel = sum(n for n, group in zip(segments, groups, strict=True) if group < 0)
    return payload.numel(), indices.numel(), dense_numel


def main() -> int:
    """Encode every bucket, print a row per density and value format, and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "count_payload.json")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    cut = buckets()
    gradient_bytes = 4 * sum(parameter.numel() for bucket in cut for parameter in bucket)
    rows: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for density in DENSITIES:
        for value_format in VALUE_FORMATS:
            counts = [payload_of(bucket, density, value_format, generator) for bucket in cut]
            payload_bytes, entries, dense_numel = map(sum, zip(*counts, strict=True))
            bits = 8 * (payload_bytes - 4 * dense_numel) / entries
            rows.append(
                {
                    "density": density,
                    "value_format": value_format,
                    "sent_entries": entries,
                    "bits_per_entry": round(bits, 3),
                    "dense_part_bytes": 4 * dense_numel,
                    "payload_bytes": payload_bytes,
                    "compression_ratio": round(gradient_bytes / payload_bytes, 2),
                    "version_1_over_it": round(
                        (ENTRY_BYTES_V1 * entries + 4 * dense_numel) / payload_bytes, 2
                    ),
                }
            )
            print(rows[-1])
            limit = GOALS.get((value_format, density))
            if limit is not None:
                what = f"bits per sent entry, {value_format}, density {density}"
                goals.append(goal(what, round(bits, 3), at_most=limit))
    write_counted(
        "count_payload",
        "Bits per sent entry of ResNet-50's payloads (counted, not timed)",
        settings={
            "first_bucket_bytes": FIRST_BUCKET_BYTES,
            "bucket_bytes": BUCKET_BYTES,
            "buckets": len(cut),
            "scope": "tensor",
        },
        goals=goals,
        rows=rows,
        path=options.output,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
