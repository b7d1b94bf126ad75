"""Real data, whole runs: handwritten digits, an MLP, 2 ranks, SGD with momentum."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import ranks
import stand_in
import torch
from ddp_models import add_hook, assert_same_bits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState

BATCH = 32
# Seeds 0 to 4: dense 0.972 to 0.978, fp32 values 0.956 to 0.978, bf16 0.947 to 0.967, sign 0.969 to 0.981; at worst 0.028 below dense.
ACCURACY_MARGIN = 0.04


@dataclasses.dataclass(frozen=True)
class Plan:
    entry: str | None = "cpp"  # None: DDP without a hook
    density: float = 0.01
    value_format: str = "bf16"
    error_feedback: bool = True
    epochs: int = 20
    sorted_by_label: bool = False  # rank 0 then sees the digits 0 to 4 only, rank 1 the others
    seed: int = 0


@dataclasses.dataclass
class Run:
    losses: list[float]  # mean over each epoch, this rank's batches
    accuracy: float
    weights: list[Tensor]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images [n, 64] in [0, 1] and labels; every fifth image is for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def train_digits(rank: int, world_size: int, plan: Plan) -> Run:
    images, labels, test_images, test_labels = digits()
    share = len(labels) // world_size
    torch.manual_seed(plan.seed)
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    model = DistributedDataParallel(net, bucket_cap_mb=0.02)
    if plan.entry is not None:
        state = TopKEFState(
            exchange="allgather",
            density=plan.density,
            value_format=plan.value_format,
            error_feedback=plan.error_feedback,
        )
        add_hook(model, state, plan.entry)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch in range(plan.epochs):
        generator = torch.Generator().manual_seed(epoch)
        if plan.sorted_by_label:
            mine = labels.argsort(stable=True)[
                rank * share + torch.randperm(share, generator=generator)
            ]
        else:
            mine = torch.randperm(len(labels), generator=generator)[
                rank * share : (rank + 1) * share
            ]
        batches = mine.split(BATCH)[:-1]
        total = 0.0
        for batch in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(batches))
    with torch.no_grad():
        accuracy = (net(test_images).argmax(1) == test_labels).float().mean().item()
    return Run(losses, accuracy, [parameter.detach() for parameter in net.parameters()])


@functools.cache
def run(plan: Plan) -> list[Run]:
    return ranks.run(2, train_digits, plan)


@pytest.mark.parametrize(
    ("entry", "value_format"),
    [("python", "bf16"), ("cpp", "bf16"), ("cpp", "fp32"), ("cpp", "sign")],
)
def test_compressed_training_learns_and_reaches_the_dense_accuracy(
    entry: str, value_format: str
) -> None:
    compressed, dense = run(Plan(entry, value_format=value_format))[0], run(Plan(None))[0]
    assert compressed.losses[0] > 4 * compressed.losses[8] and compressed.losses[-1] < 0.1, (
        compressed.losses
    )
    assert dense.accuracy > 0.95
    assert compressed.accuracy > dense.accuracy - ACCURACY_MARGIN


@pytest.mark.parametrize("entry", ["python", "cpp"])
def test_replicas_are_bitwise_equal_at_the_end(entry: str) -> None:
    first, second = run(Plan(entry))
    for ours, theirs in zip(first.weights, second.weights):
        assert_same_bits(ours, theirs, "replicas")


def test_both_entries_give_the_same_run_bit_for_bit() -> None:
    for python, cpp in zip(run(Plan("python")), run(Plan("cpp"))):
        assert python.losses == cpp.losses
        for ours, theirs in zip(python.weights, cpp.weights):
            assert_same_bits(ours, theirs, "entries")


@stand_in.too_slow
def test_without_error_feedback_training_is_clearly_worse() -> None:
    """Where it matters most: few entries, and ranks that see different digits. Seeds 0 to 4: the loss is 4 to 50 times as large
    and the accuracy 0.04 to 0.15 lower."""
    plan = Plan(density=0.002, sorted_by_label=True)
    with_feedback, without = run(plan)[0], run(dataclasses.replace(plan, error_feedback=False))[0]
    assert without.losses[-1] > 2 * with_feedback.losses[-1]
    assert without.accuracy < with_feedback.accuracy - 0.02
