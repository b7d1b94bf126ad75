"""Check an installed compressed_ddp in under 30 seconds, without downloads.

python quick_validation.py starts two Gloo processes on this machine, says in plain words what it
checked, and exits with 1 when a check failed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

WORLD_SIZE = 2
DENSITY = 0.01
TRAINING_STEPS = 300
BATCH = 32
CONSERVATION_STEPS = 20

Check = tuple[bool, str]  # whether it holds, and what was checked


def main() -> int:
    """Run the checks in fresh processes and print them; return the exit code."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_process, args=(folder,), nprocs=WORLD_SIZE)
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
            print(f"FAILED: a process stopped with an error.\n{error}")
            return 1
        checks: list[Check] = json.loads(Path(folder, "checks.json").read_text())
    for holds, sentence in checks:
        print(f"{'ok    ' if holds else 'FAILED'}  {sentence}")
    failed = sum(not holds for holds, _ in checks)
    verdict = (
        f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks hold"
    )
    seconds = time.perf_counter() - started
    print(f"{verdict} ({WORLD_SIZE} processes, Gloo, torch {torch.__version__}, {seconds:.0f} s)")
    return 1 if failed else 0


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=25),
    )
    try:
        checks = [*_check_conservation(rank), *_check_training(rank)]
        # A sentence holds when it holds on every rank.
        gathered: list[list[Check]] = [[] for _ in range(WORLD_SIZE)]
        distributed.all_gather_object(gathered, checks)
        if rank == 0:
            agreed = [
                (all(holds for holds, _ in same), same[0][1])
                for same in zip(*gathered, strict=True)
            ]
            Path(folder, "checks.json").write_text(json.dumps(agreed))
    finally:
        distributed.destroy_process_group()
        # Under DDP that leaves Gloo's threads running, and one that still holds the last collective's tensors ends the process
        # with SIGABRT when it asks for the GIL of an interpreter that is shutting down (pytorch issue 190489). So it gets the GIL now.
        time.sleep(0.1)


def _check_conservation(rank: int) -> Iterator[Check]:
    """Exchange integer gradients, whose sums are exact, and follow every entry of this rank."""
    from compressed_ddp import TopKCompressor, TopKEFState, all_reduce_

    numel = 5000
    state = TopKEFState(density=DENSITY, dense_steps=0, value_format="fp32")
    compressor = TopKCompressor(
        DENSITY
    )  # the same selection, alone: what this rank is expected to send
    generator = torch.Generator().manual_seed(rank)
    residual, gradients, sent = (torch.zeros(numel) for _ in range(3))
    kept_what_was_not_sent = average_is_right = same_everywhere = True
    for _ in range(CONSERVATION_STEPS):
        gradient = torch.randint(-50, 51, (numel,), generator=generator).float()
        mine = compressor.decompress(*compressor.compress(gradient + residual))
        result = gradient.clone()
        all_reduce_(result, state, name="weight")

        total = mine.clone()
        distributed.all_reduce(total)
        average_is_right &= torch.equal(result, total / WORLD_SIZE)
        same_everywhere &= _equal_on_all_ranks(result)
        after = state.state_dict()["residuals"]["weight"]
        kept_what_was_not_sent &= torch.equal(after, gradient + residual - mine)
        residual, gradients, sent = after.clone(), gradients + gradient, sent + mine

    entries = f"{numel} integer entries, {CONSERVATION_STEPS} steps, {100 * DENSITY:g} % sent"
    yield (
        average_is_right,
        f"the result of every step is the average of what the ranks sent, bit for bit ({entries})",
    )
    yield same_everywhere, "the result of every step is bitwise the same on both ranks"
    yield (
        kept_what_was_not_sent,
        "each rank's residual is exactly what it has not sent, after every step",
    )
    yield (
        torch.equal(sent + residual, gradients),
        "sent + residual == the sum of all gradients, bit for bit: nothing is lost",
    )


def _check_training(rank: int) -> Iterator[Check]:
    """Train one network on the 8x8 digits, dense and compressed, on the same batches."""
    from sklearn.datasets import load_digits

    from compressed_ddp import TopKEFState, topk_ef_hook

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    final_loss = {}
    state = TopKEFState(density=DENSITY)
    for arm in ("dense", "compressed"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        model = DistributedDataParallel(net)
        if arm == "compressed":
            model.register_comm_hook(state, topk_ef_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(rank)
        losses = []
        for _ in range(TRAINING_STEPS):
            batch = torch.randint(len(labels), (BATCH,), generator=generator)
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean_losses = torch.tensor(losses)
        distributed.all_reduce(mean_losses)
        mean_losses /= WORLD_SIZE
        first_loss, final_loss[arm] = mean_losses[0].item(), mean_losses[-20:].mean().item()
        weights = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        yield (
            _equal_on_all_ranks(weights),
            f"{arm}: after {TRAINING_STEPS} steps the {weights.numel():,} weights are bitwise "
            "equal on both ranks",
        )

    metrics = state.metrics()
    sent, dense = metrics["compressed_ddp/bytes_sent"], metrics["compressed_ddp/dense_bytes"]
    # A ring all-reduce of two ranks sends every gradient byte once.
    expected_dense = 4 * weights.numel()
    yield (
        dense == expected_dense and 0 < sent < dense / 10,
        f"counted bytes: {sent:,.0f} sent per step instead of {dense:,.0f} dense, "
        f"{dense / sent:.1f} times fewer",
    )
    yield (
        final_loss["compressed"] < first_loss / 5
        and final_loss["compressed"] < final_loss["dense"] + 0.2,
        f"training loss falls from {first_loss:.2f} to "
        f"{final_loss['compressed']:.3f} compressed, "
        f"beside {final_loss['dense']:.3f} dense",
    )


def _equal_on_all_ranks(tensor: torch.Tensor) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    distributed.all_gather(copies, tensor)
    # As bits: -0.0 and 0.0, or two NaN, must not pass or fail by the rules of arithmetic.
    return all(
        torch.equal(copies[0].view(torch.int32), copy.view(torch.int32)) for copy in copies[1:]
    )


if __name__ == "__main__":
    sys.exit(main())
