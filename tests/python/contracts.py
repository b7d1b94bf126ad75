"""The contracts of one run as checks (docs/algorithm.md), and the oracle: the same run in one process on reference.py."""

from __future__ import annotations

import dataclasses
import math

import torch
from stage_cases import Layout
from torch import Tensor

from compressed_ddp import reference


@dataclasses.dataclass
class Step:
    """What can be seen from outside in one step: tensors [numel] per rank."""

    gradients: list[Tensor]  # fp32
    residuals_before: list[Tensor]
    residuals_after: list[Tensor]
    results: list[Tensor]


def selection(acc: Tensor, layout: Layout) -> Tensor:
    """bool [numel]: what a rank sends of `acc`, by magnitude, ties to the lower index; dense segments whole."""
    group_of = torch.repeat_interleave(torch.tensor(layout.groups), torch.tensor(layout.segments))
    sent = group_of < 0
    for group, k in enumerate(layout.k):
        positions = (group_of == group).nonzero().reshape(-1)
        order = torch.argsort(acc[positions].abs(), descending=True, stable=True)
        sent[positions[order[:k]]] = True
    return sent


def sent_of(acc: Tensor, layout: Layout, value_format: str) -> Tensor:
    """What a rank sends of a finite `acc`, as every rank decodes it: 0 where nothing is sent, dense segments as they are."""
    group_of = torch.repeat_interleave(torch.tensor(layout.groups), torch.tensor(layout.segments))
    chosen = selection(acc, layout)
    sent = torch.where(chosen, acc, 0.0)
    if value_format == "bf16":
        sent = torch.where(group_of < 0, sent, sent.bfloat16().float())
    elif value_format == "sign":
        for group, k in enumerate(layout.k):
            at = chosen & (group_of == group)
            mean = torch.tensor(math.fsum(acc[at].abs().tolist()) / k)
            sent[at] = torch.copysign(mean, acc[at])
    return sent


def broken_contracts(
    steps: list[Step], layout: Layout, *, exact: bool, value_format: str = "bf16"
) -> set[str]:
    """Which contracts a run with error feedback breaks; `exact` where every sum is: integer gradients, and values not as "sign".

    "global": P * sum of results + residuals == sum of gradients + first residuals, over all ranks (alone it proves little).
    "local": sum of sent + last residual == sum of gradients + first residual, on every rank.
    "support": what was not sent stays as it was, bit for bit; what was sent is gone, but for what rounding took from it.
    "agreement": the result is bitwise equal on all ranks, and the rank-ordered mean of what they sent.
    "bounded": on a stationary stream the residual stops growing.
    """
    broken = set()
    world_size = len(steps[0].gradients)
    scale = torch.tensor(1.0 / world_size)
    sent_sum = [torch.zeros(layout.numel, dtype=torch.float64) for _ in range(world_size)]
    gradient_sum = [torch.zeros(layout.numel, dtype=torch.float64) for _ in range(world_size)]
    result_sum = torch.zeros(layout.numel, dtype=torch.float64)
    compressed = torch.cat(
        [torch.full((n,), g >= 0) for n, g in zip(layout.segments, layout.groups)]
    )
    for step in steps:
        total = torch.zeros(layout.numel)
        for rank in range(world_size):
            acc = step.gradients[rank] + step.residuals_before[rank] * compressed
            sent = sent_of(acc, layout, value_format)
            total = total + sent
            if not torch.equal(step.residuals_after[rank][compressed], (acc - sent)[compressed]):
                broken.add("support")
            sent_sum[rank] += sent
            gradient_sum[rank] += step.gradients[rank]
        for result in step.results:
            if not torch.equal(result, (total * scale).to(result.dtype)):
                broken.add("agreement")
        result_sum += step.results[0].double()

    def differ(a: Tensor, b: Tensor) -> bool:
        if exact:
            return not torch.equal(a, b)
        size = gradient_sum[0].abs().max() * math.sqrt(len(steps)) + 1
        return not bool((a - b).abs().max() <= 1e-5 * size)

    first, last = steps[0].residuals_before, steps[-1].residuals_after
    for rank in range(world_size):
        kept = (sent_sum[rank] + last[rank].double())[compressed]
        if differ(kept, (gradient_sum[rank] + first[rank].double())[compressed]):
            broken.add("local")
    all_kept = world_size * result_sum + sum(residual.double() for residual in last)
    if differ(
        all_kept[compressed], (sum(gradient_sum) + sum(r.double() for r in first))[compressed]
    ):
        broken.add("global")
    middle = steps[len(steps) // 2].residuals_after
    for rank in range(world_size):
        early, late = middle[rank].double().norm(), last[rank].double().norm()
        if not bool(late <= 1.2 * early):
            broken.add("bounded")
    return broken


class Oracle:
    """All ranks of a run in one process, plain PyTorch. A step with a non-finite entry goes back into the residuals later."""

    def __init__(self, world_size: int, layout: Layout, value_format: str = "bf16") -> None:
        self.layout = layout
        self.value_format = value_format
        self.residuals = [torch.zeros(layout.numel) for _ in range(world_size)]
        self._undo: list[Tensor] = []  # payloads of the last step

    def step(self, gradients: list[Tensor]) -> Tensor:
        """One gradient [numel] per rank -> the average that every rank gets."""
        self._undo = []
        arguments = self.layout.arguments
        for rank, (gradient, residual) in enumerate(zip(gradients, self.residuals)):
            values, indices, statistics = reference.compensate_select_(
                gradient, residual, *arguments
            )
            payload = reference.encode(
                values,
                indices,
                gradient,
                *arguments,
                value_format=self.value_format,
                residual=residual,
                rank=rank,
                world_size=len(gradients),
                non_finite=bool(statistics[3] > 0),
            )
            self._undo.append(payload)
        bucket = torch.empty_like(gradients[0])
        gathered = torch.stack(self._undo)
        reference.decode_apply_(bucket, gathered, *arguments, value_format=self.value_format)
        if torch.isnan(bucket).all() and bucket.numel() > 0:
            self.rollback()
        return bucket

    def rollback(self) -> None:
        for residual, payload in zip(self.residuals, self._undo):
            reference.restore_(
                residual, payload, *self.layout.arguments, value_format=self.value_format
            )
        self._undo = []
