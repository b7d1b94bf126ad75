"""The contracts of one run as checks (docs/algorithm.md), and the oracle: the same run in one process on reference.py."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

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

    def step(self, gradients: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """One gradient [numel] per rank -> the average that every rank gets, in `dtype`, else in theirs."""
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
                non_finite=bool(statistics[3] > 0),
            )
            self._undo.append(payload)
        bucket = torch.empty_like(gradients[0], dtype=dtype)
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


# ---- exchange="split"


@dataclasses.dataclass(frozen=True)
class Part:
    """A segment of a whole bucket, before ranges are cut: a parameter, or a chunk of one."""

    numel: int
    dense: bool


def parts_of(tensors: Sequence[tuple[int, bool]], scope: str) -> list[Part]:
    """(numel, travels dense) of what lies in a bucket -> its parts."""
    parts = []
    for numel, dense in tensors:
        size = 4096 if scope == "chunk" and not dense else max(numel, 1)
        parts += [Part(min(size, numel - at), dense) for at in range(0, max(numel, 1), size)]
    return parts


def layout_of(parts: Sequence[Part], scope: str, density: float) -> Layout:
    """The selections of a bucket, or of a range of one."""
    groups: list[int] = []
    group_numels: list[int] = []
    for part in parts:
        if part.dense:
            groups.append(-1)
            continue
        if scope != "bucket" or not group_numels:
            group_numels.append(0)
        group_numels[-1] += part.numel
        groups.append(len(group_numels) - 1)
    k = [max(1, math.ceil(density * numel)) for numel in group_numels]
    return Layout([part.numel for part in parts], groups, k)


def cut(
    parts: Sequence[Part], world_size: int, scope: str, density: float, value_format: str
) -> list[tuple[int, int]]:
    """[begin, end) of every owner's range, empty ones last: the largest payload is as small as it can be, ranges go as far as it allows."""
    numel = sum(part.numel for part in parts)
    borders = [*range(0, numel, 8), numel]

    def payload_bytes(begin: int, border: int) -> int:
        layout = layout_of_range(parts, begin, borders[border], scope, density)
        return reference.payload_bytes(*layout.arguments, value_format)

    def ranges_within(limit: int) -> list[tuple[int, int]] | None:
        found, begin, border = [], 0, 0
        while begin < numel:
            fits = bisect.bisect_right(
                range(len(borders)), limit, lo=border + 1, key=lambda b: payload_bytes(begin, b)
            )
            if fits == border + 1 or len(found) == world_size:
                return None
            border = fits - 1
            found.append((begin, borders[border]))
            begin = borders[border]
        return found

    limits = range(0, payload_bytes(0, len(borders) - 1) + 1, 8)
    limit = limits[
        bisect.bisect_left(limits, True, key=lambda bytes: ranges_within(bytes) is not None)
    ]
    ranges = ranges_within(limit) or []
    return ranges + [(numel, numel)] * (world_size - len(ranges))


def layout_of_range(
    parts: Sequence[Part], begin: int, end: int, scope: str, density: float
) -> Layout:
    """What of each part lies in [begin, end)."""
    inside, at = [], 0
    for part in parts:
        numel = min(end, at + part.numel) - max(begin, at)
        if numel > 0:
            inside.append(Part(numel, part.dense))
        at += part.numel
    return layout_of(inside, scope, density)


@dataclasses.dataclass
class _Sent:
    """Of one rank and one range."""

    layout: Layout
    at: slice
    values: Tensor  # [numel of the range]: as decoded, 0 where nothing was sent
    back: Tensor  # bool [numel]: in the residual again


class SplitOracle:
    """All ranks of a run with exchange="split" in one process: one bucket, its parts and ranges, plain PyTorch."""

    def __init__(
        self,
        world_size: int,
        parts: Sequence[Part],
        *,
        scope: str,
        density: float,
        value_format: str = "bf16",
        error_feedback: bool = True,
    ) -> None:
        self.world_size = world_size
        self.value_format = value_format
        self.error_feedback = error_feedback
        self.ranges = cut(parts, world_size, scope, density, value_format)
        self.layouts = [layout_of_range(parts, *at, scope, density) for at in self.ranges]
        self.residuals = [torch.zeros(self.ranges[-1][1]) for _ in range(world_size)]
        self._sent: list[list[_Sent]] = [[] for _ in range(world_size)]  # by rank
        self._kept: list[Tensor | None] = [None] * world_size  # by owner, of its range

    def step(self, gradients: Sequence[Tensor], used: Sequence[Tensor] | None = None) -> Tensor:
        """One gradient [numel] per rank -> what every rank gets. used[rank]: bool [numel], False where a parameter has no gradient."""
        bucket = torch.zeros_like(gradients[0])
        self._sent = [[] for _ in range(self.world_size)]
        self._kept = [None] * self.world_size
        flagged = False
        for owner, (layout, (begin, end)) in enumerate(zip(self.layouts, self.ranges)):
            if begin == end:
                continue
            at = slice(begin, end)
            payloads = []
            for rank, gradient in enumerate(gradients):
                everything = torch.ones(end - begin, dtype=torch.bool)
                used_here = everything if used is None else used[rank][at]
                residual = self.residuals[rank][at]
                waiting = residual.masked_fill(~used_here, 0.0)
                payload = self._encode(gradient[at], waiting, layout, rank, self.world_size)
                if self.error_feedback:
                    residual.copy_(torch.where(used_here, waiting, residual))
                payloads.append(payload)
                values = self._decoded(payload, layout)
                self._sent[rank].append(_Sent(layout, at, values, torch.zeros_like(used_here)))
            average = torch.zeros(end - begin)
            self._decode(average, torch.stack(payloads), layout)
            lost = torch.zeros_like(average)
            encoded = self._encode(average, lost, layout, 0, 1)
            flagged = flagged or bool(encoded[1] & 1)
            decoded = self._decoded(encoded, layout)
            bucket[at] = self._result(encoded, layout)
            if self.error_feedback and self.value_format != "fp32":
                arrives = decoded.to(gradients[0].dtype) != 0  # else its senders keep it
                kept = (self.world_size * lost) * (arrives & self._compressed(layout))
                self.residuals[owner][at] += kept
                self._kept[owner] = kept
        if flagged:
            bucket.fill_(torch.nan)
        if self.error_feedback:
            self._return_dropped(bucket)
        if not torch.isfinite(bucket).all():
            self.rollback()
        return bucket

    def _return_dropped(self, bucket: Tensor) -> None:
        for rank, all_sent in enumerate(self._sent):
            for sent in all_sent:
                sent.back = (bucket[sent.at] == 0) & (sent.values != 0)
                self.residuals[rank][sent.at] += torch.where(sent.back, sent.values, 0.0)

    def rollback(self) -> None:
        """What went out and has not come back, once."""
        if not self.error_feedback:
            return
        for owner, kept in enumerate(self._kept):
            if kept is not None:
                begin, end = self.ranges[owner]
                self.residuals[owner][begin:end] -= kept
        for rank, all_sent in enumerate(self._sent):
            for sent in all_sent:
                out = torch.isfinite(sent.values) & ~sent.back
                self.residuals[rank][sent.at] += torch.where(out, sent.values, 0.0)
        self._sent = [[] for _ in range(self.world_size)]
        self._kept = [None] * self.world_size

    def _encode(
        self, gradient: Tensor, residual: Tensor, layout: Layout, rank: int, world_size: int
    ) -> Tensor:
        values, indices, statistics = reference.compensate_select_(
            gradient, residual, *layout.arguments, error_feedback=self.error_feedback
        )
        return reference.encode(
            values,
            indices,
            gradient,
            *layout.arguments,
            value_format=self.value_format,
            residual=residual if self.error_feedback else None,
            rank=rank,
            non_finite=bool(statistics[3] > 0),
        )

    def _decode(self, bucket: Tensor, payloads: Tensor, layout: Layout) -> None:
        reference.decode_apply_(bucket, payloads, *layout.arguments, value_format=self.value_format)

    def _decoded(self, payload: Tensor, layout: Layout) -> Tensor:
        """[numel], compressed segments only."""
        values = torch.zeros(layout.numel)
        # It adds what a payload holds, and passes over what is not finite, which never left.
        reference.restore_(values, payload, *layout.arguments, value_format=self.value_format)
        return values

    def _result(self, payload: Tensor, layout: Layout) -> Tensor:
        whole = torch.zeros(layout.numel)
        if int(payload[1]) == 0:
            self._decode(whole, payload[None], layout)
        return whole

    @staticmethod
    def _compressed(layout: Layout) -> Tensor:
        return torch.repeat_interleave(
            torch.tensor(layout.groups) >= 0, torch.tensor(layout.segments)
        )


# ---- exchange="hierarchical"


def shard_of(numel: int, index: int, count: int) -> slice:
    """The entries of a parameter that the index-th of `count` ranks of a node owns."""
    borders = [numel * i // count // 8 * 8 for i in range(count)] + [numel]
    return slice(borders[index], borders[index + 1])


class HierarchicalOracle:
    """All ranks of a run with exchange="hierarchical" in one process: one bucket, up to 16 nodes."""

    def __init__(
        self,
        world_size: int,
        ranks_per_node: int,
        parameters: Sequence[Sequence[tuple[int, bool]]],
        *,
        scope: str,
        density: float,
        value_format: str = "bf16",
    ) -> None:
        """parameters: of each its segments, which are (numel, whether it travels dense)."""
        self.ranks_per_node = ranks_per_node
        self.nodes = world_size // ranks_per_node
        self.shards: list[Tensor] = []  # positions in the bucket
        self.owners = []  # by shard: the nodes, as if they were ranks
        for index in range(ranks_per_node):
            pieces, positions, begin = [], [torch.arange(0)], 0
            for segments in parameters:
                numel, at = sum(n for n, _ in segments), 0
                shard = shard_of(numel, index, ranks_per_node)
                for n, dense in segments:
                    inside = min(shard.stop, at + n) - max(shard.start, at)
                    if inside > 0:
                        pieces.append((inside, dense))
                    at += n
                positions.append(torch.arange(begin + shard.start, begin + shard.stop))
                begin += numel
            self.shards.append(torch.cat(positions))
            layout = layout_of(parts_of(pieces, scope), scope, density)
            self.owners.append(Oracle(self.nodes, layout, value_format))

    def node_residuals(self) -> list[Tensor]:
        """[numel of the bucket] of every node, its shards put together."""
        numel = sum(shard.numel() for shard in self.shards)
        together = [torch.zeros(numel) for _ in range(self.nodes)]
        for shard, owners in zip(self.shards, self.owners):
            for whole, residual in zip(together, owners.residuals):
                whole[shard] = residual
        return together

    def take_node_residuals(self, together: Sequence[Tensor]) -> None:
        for shard, owners in zip(self.shards, self.owners):
            owners.residuals = [whole[shard] for whole in together]

    def residual(self, rank: int) -> Tensor:
        """The shard that this rank keeps, flat."""
        return self.owners[rank % self.ranks_per_node].residuals[rank // self.ranks_per_node]

    def step(self, gradients: Sequence[Tensor]) -> Tensor:
        """One gradient [numel] per rank -> what every rank gets."""
        result = torch.empty_like(gradients[0])
        scale = torch.tensor(1.0 / self.ranks_per_node)
        for shard, owners in zip(self.shards, self.owners):
            means = []
            for node in range(self.nodes):
                total = torch.zeros(shard.numel())
                for rank in range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node):
                    total = total + gradients[rank][shard].float()
                means.append(total * scale)
            if shard.numel() > 0:
                result[shard] = owners.step(means, result.dtype)
        if not torch.isfinite(result).all():
            result.fill_(torch.nan)
            self.rollback()
        return result

    def rollback(self) -> None:
        for owners in self.owners:
            owners.rollback()
