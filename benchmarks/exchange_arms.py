"""What bench_wire and bench_wire_time compare: ways to average one model's gradients over the ranks.

    dense          PyTorch's allreduce_hook: float32
    fp16           PyTorch's fp16_compress_hook
    PowerSGD       PyTorch's powerSGD_hook, rank 1, in one bucket (over Gloo with several buckets it aborts)
    allgather      topk_ef_hook, exchange="allgather"
    split          topk_ef_hook, exchange="split"
    auto           topk_ef_hook, exchange="auto": each bucket by allgather or dense, as measured costs say (bench_auto only)
    hierarchical   topk_ef_hook, exchange="hierarchical", as if the ranks were two nodes (bench_wire only: here all links are alike)

The buckets are DDP's own: a hook catches them in the second backward pass, when DDP has rebuilt them. A
step then puts gradients into them, hands all of them to the arm's hook in DDP's order, and waits for the
futures. There is no forward or backward pass in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.nn.parallel import DistributedDataParallel

import compressed_ddp

DENSE, FP16, POWER_SGD, ALL_GATHER, SPLIT = "dense", "fp16", "PowerSGD", "allgather", "split"
HIERARCHICAL, AUTO = "hierarchical", "auto"
ARMS = (DENSE, FP16, POWER_SGD, ALL_GATHER, SPLIT)
EXCHANGES = (ALL_GATHER, SPLIT, HIERARCHICAL, AUTO)  # those of this package
SHORT = [(10,), (10, 512), (512,), (512, 512), (512,), (512, 784)][::-1]  # for tests
POWER_SGD_RANK = 1
POWER_SGD_START = 2  # dense steps before it, the fewest that it accepts with error feedback
ONE_BUCKET_MB = 1 << 20


def shapes_of(layout: str) -> list[tuple[int, ...]]:
    """Return the shapes of a model's parameters in order: torchvision's ResNet-50, or a short one."""
    if layout == "short":
        return list(SHORT)
    from torchvision.models import resnet50

    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in resnet50().parameters()]


class Parameters(nn.Module):
    """Parameters of these shapes, and nothing that computes with them."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.zeros(tuple(shape)) for shape in shapes)

    def forward(self) -> torch.Tensor:
        """Return a scalar that depends on all of them; the last one's gradient is ready first."""
        return torch.stack([parameter.sum() for parameter in self.all]).sum()


class Buckets:
    """The buckets that DDP uses for these parameters from the second step on."""

    def __init__(self, shapes: Sequence[Sequence[int]], bucket_cap_mb: int | None) -> None:
        self.caught: list[Any] = []
        # Kept: its reducer owns the memory. init_sync: the parameters are zeros on all ranks.
        self.model = DistributedDataParallel(
            Parameters(shapes),
            bucket_cap_mb=bucket_cap_mb,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
        self.model.register_comm_hook(None, self._catch())
        for _ in range(2):
            self.caught.clear()
            self.model().backward()
        self.numel = sum(bucket.buffer().numel() for bucket in self.caught)

    def _catch(self) -> Callable[..., Any]:
        def catch(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.caught.append(bucket)
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        # DDP compares the annotations with the classes themselves, and here they are strings.
        catch.__annotations__ = {
            "bucket": dist.GradBucket,
            "return": torch.futures.Future[torch.Tensor],
        }
        return catch

    def fill(self, gradient: torch.Tensor) -> None:
        """Put a gradient [numel] into the buckets, one after another."""
        for bucket, part in zip(self.caught, gradient.split(self.numels())):
            bucket.buffer().copy_(part)

    def numels(self) -> list[int]:
        """Return the entries of each bucket."""
        return [bucket.buffer().numel() for bucket in self.caught]


class Arm:
    """One way to average the buckets."""

    def __init__(self, name: str, buckets: Buckets, density: float) -> None:
        self.name, self.buckets = name, buckets
        self.state: Any = None
        self.hook: Callable[[Any, Any], torch.futures.Future[torch.Tensor]]
        if name in EXCHANGES:
            ranks_per_node = max(1, dist.get_world_size() // 2) if name == HIERARCHICAL else None
            self.state = compressed_ddp.TopKEFState(
                density=density, exchange=name, ranks_per_node=ranks_per_node, dense_steps=0
            )
            self.hook = compressed_ddp.topk_ef_hook
        elif name == POWER_SGD:
            self.state = power_sgd.PowerSGDState(
                None,
                matrix_approximation_rank=POWER_SGD_RANK,
                start_powerSGD_iter=POWER_SGD_START,
            )
            self.hook = power_sgd.powerSGD_hook
        else:
            self.hook = {
                DENSE: default_hooks.allreduce_hook,
                FP16: default_hooks.fp16_compress_hook,
            }[name]

    def average(self) -> None:
        """Average what is in the buckets over the ranks: one step."""
        futures = [self.hook(self.state, bucket) for bucket in self.buckets.caught]
        for future in futures:
            future.wait()

    def drop(self) -> None:
        """Free what the arm keeps from step to step."""
        self.state = None

    def bytes_sent(self, world_size: int) -> tuple[float, str]:
        """Return what this rank puts on the network in a step, and where that number comes from."""
        if self.name in EXCHANGES:
            metrics = self.state.metrics()
            in_node = metrics["compressed_ddp/bytes_sent_in_node"]
            return metrics["compressed_ddp/bytes_sent"] + in_node, "metrics()"
        ring = 2 * (world_size - 1) / world_size
        if self.name != POWER_SGD:
            width = 4 if self.name == DENSE else 2
            return ring * width * self.buckets.numel, f"2 (P - 1) / P x {width} bytes per entry"
        numel = power_sgd_numel([tuple(p.shape) for p in self.buckets.model.parameters()])
        return ring * 4 * numel, "2 (P - 1) / P x (P, Q and the uncompressed)"


def power_sgd_numel(shapes: Sequence[Sequence[int]], minimum_rate: int = 2) -> int:
    """Return the float32 entries that PowerSGD of rank 1 all-reduces: P, Q, and tensors that it leaves alone."""
    numel = 0
    for shape in shapes:
        rows = shape[0]
        entries = torch.Size(shape).numel()
        columns = entries // rows
        factors = (rows + columns) * min(rows, columns, POWER_SGD_RANK)
        numel += factors if factors * minimum_rate < entries else entries
    return numel


def make_arms(
    names: Sequence[str], shapes: Sequence[Sequence[int]], density: float
) -> dict[str, Arm]:
    """Return arms; those with buckets of 25 MiB (DDP's default) use the same memory."""
    arms: dict[str, Arm] = {}
    made: dict[int | None, Buckets] = {}
    for name in names:
        cap = ONE_BUCKET_MB if name == POWER_SGD else None
        if cap not in made:
            made[cap] = Buckets(shapes, cap)
        arms[name] = Arm(name, made[cap], density)
    return arms
