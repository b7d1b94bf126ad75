"""One training run: model, data order, optimizer, schedule, the step and the evaluation."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from datasets import SEQUENCE_LENGTH, Data
from models import CharGPT, SimpleCNN, resnet
from processes import Processes
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from tqdm import tqdm

if TYPE_CHECKING:  # the dense run and the run of one process do without the package
    from compressed_ddp import TopKEFState

BETAS = (0.9, 0.95)  # AdamW's, wherever adam_param_groups does not say otherwise
FINAL_COSINE_FACTOR = 0.05
EVALUATION_BATCH = 256


@dataclass
class Run:
    """Everything that a run consists of; `history` has one record per finished epoch."""

    options: argparse.Namespace
    processes: Processes
    data: Data
    network: nn.Module  # the plain model
    model: nn.Module  # the same model as it is trained: inside DistributedDataParallel unless alone
    state: TopKEFState | None  # of the compression hook
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: DistributedSampler[Any]
    loader: DataLoader[Any]
    total_steps: int
    writer: Any = None  # TensorBoard's SummaryWriter, on the main process only
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        """Number of epochs until `total_steps` are done; the last one may be shorter."""
        return math.ceil(self.total_steps / len(self.loader))


def build(options: argparse.Namespace, processes: Processes, data: Data) -> Run:
    """Build the run: the same weights on every process, a different share of the data on each."""
    torch.manual_seed(options.seed)
    network = build_network(options, data).to(processes.device)
    # From here on every process draws its own numbers (dropout, augmentation).
    torch.manual_seed(1_000_003 * (processes.rank + 1) + options.seed)

    sampler: DistributedSampler[Any] = DistributedSampler(
        data.train,
        processes.world_size,
        processes.rank,
        shuffle=True,
        seed=options.seed,
        drop_last=True,
    )
    loader: DataLoader[Any] = DataLoader(
        data.train,
        sampler=BatchSampler(sampler, options.batch_size, drop_last=True),
        batch_size=None,
    )
    if len(loader) == 0:
        raise SystemExit(
            f"train.py: {len(data.train)} samples over {processes.world_size} processes do not "
            f"fill one batch of --batch-size {options.batch_size}; use a smaller one"
        )

    model, state = network, None
    if processes.grouped:
        on_gpu = processes.device.type == "cuda"
        model = DistributedDataParallel(
            network, device_ids=[processes.device.index] if on_gpu else None
        )
        if options.compress:
            state = _compress_gradients(model, options)
    elif options.compress:
        processes.say(
            "--compress: one process exchanges nothing, so nothing is compressed; "
            "start several with torchrun."
        )

    optimizer = _build_optimizer(options, model, state)
    total_steps = options.max_steps or options.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, learning_rate_factor(options, total_steps)
    )
    return Run(
        options,
        processes,
        data,
        network,
        model,
        state,
        optimizer,
        scheduler,
        sampler,
        loader,
        total_steps,
    )


def build_network(options: argparse.Namespace, data: Data) -> nn.Module:
    """Return the model that --model names, sized for the data."""
    if options.model == "char_gpt":
        return CharGPT(
            data.classes, SEQUENCE_LENGTH, options.gpt_layers, options.gpt_width, options.gpt_heads
        )
    assert data.image_shape is not None  # options.py lets only char_gpt read text
    channels, height, width = data.image_shape
    if options.model == "simple_cnn":
        return SimpleCNN(channels, height, width, data.classes)
    return resnet(options.model, channels, data.classes)


def _compress_gradients(model: DistributedDataParallel, options: argparse.Namespace) -> TopKEFState:
    """Give the model its compression hook and return the hook's state."""
    try:
        from compressed_ddp import TopKEFState, register, topk_ef_hook
    except ImportError as error:
        raise SystemExit(
            f"train.py: --compress needs the package compressed_ddp: {error}"
        ) from error
    state = TopKEFState(
        density=options.ratio,
        scope=options.scope,
        error_feedback=options.error_feedback,
        dense_steps=options.dense_steps,
    )
    if options.entry == "cpp":
        register(model, state)
    else:
        model.register_comm_hook(state, topk_ef_hook)
        state.bind(model)  # parameter names, for the checkpoint
    return state


def _build_optimizer(
    options: argparse.Namespace, model: nn.Module, state: TopKEFState | None
) -> torch.optim.Optimizer:
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
    if state is None or options.ordinary_adam_groups:
        return torch.optim.AdamW(
            model.parameters(), lr=options.lr, betas=BETAS, weight_decay=options.weight_decay
        )
    from compressed_ddp import adam_param_groups

    groups = adam_param_groups(model, state, betas=BETAS, weight_decay=options.weight_decay)
    return torch.optim.AdamW(groups, lr=options.lr)


def learning_rate_factor(options: argparse.Namespace, total_steps: int) -> Callable[[int], float]:
    """Return the function from a step's index to its learning rate as a fraction of --lr."""
    warmup_steps = round(options.lr_warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if options.lr_schedule == "cosine":
            return FINAL_COSINE_FACTOR + (1 - FINAL_COSINE_FACTOR) * 0.5 * (
                1 + math.cos(math.pi * progress)
            )
        if options.lr_schedule == "step":
            return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
        return 1.0

    return factor


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over samples, or over all characters of all windows."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def train_epoch(run: Run) -> None:
    """Train the next epoch, evaluate, and append its record to the history."""
    epoch = len(run.history)
    done = epoch * len(run.loader)
    steps = min(len(run.loader), run.total_steps - done)
    run.model.train()
    run.sampler.set_epoch(epoch)
    record = _train_steps(run, done, steps)

    # The main process's losses become means over the processes.
    losses = torch.tensor(record["losses"], dtype=torch.float64, device=run.processes.device)
    record["losses"] = (run.processes.sum_(losses) / run.processes.world_size).tolist()
    train_loss = sum(record["losses"]) / steps
    held_out_loss, accuracy = evaluate(run)
    _write_scalars(
        run, done + steps, {"held_out/loss": held_out_loss, "held_out/accuracy": accuracy}
    )
    run.history.append(
        {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "held_out_loss": held_out_loss,
            "held_out_accuracy": accuracy,
            **record,
        }
    )
    run.processes.say(
        f"epoch {epoch + 1}/{run.epochs}: training loss {train_loss:.4f}, "
        f"held-out loss {held_out_loss:.4f}, accuracy {100 * accuracy:.2f} %"
    )


def _train_steps(run: Run, done: int, steps: int) -> dict[str, Any]:
    """Train `steps` steps of the current epoch, `done` steps lie before it.

    Returns losses, bytes_sent and step_ms, one value per step of this process, and the metrics of
    the last step.
    """
    losses: list[float] = []
    bytes_sent: list[float] = []
    step_ms: list[float] = []
    metrics: dict[str, float] = {}
    dense_bytes = ring_all_reduce_bytes(run.network, run.processes.world_size)
    # disable=None: no bar where the output is not a terminal.
    hidden = None if run.processes.is_main else True
    title = f"epoch {done // len(run.loader) + 1}/{run.epochs}"
    with tqdm(total=steps, desc=title, disable=hidden, leave=False) as bar:
        for _, (inputs, targets) in zip(range(steps), run.loader, strict=False):
            started = time.perf_counter()
            losses.append(_train_step(run, inputs, targets))
            step_ms.append(1000 * (time.perf_counter() - started))
            metrics = run.state.metrics() if run.state is not None else {}
            bytes_sent.append(metrics.get("compressed_ddp/bytes_sent", dense_bytes))
            rate = float(run.scheduler.get_last_lr()[0])
            scalars = {"train/loss": losses[-1], "train/lr": rate, **metrics}
            _write_scalars(run, done + len(losses), scalars)
            run.scheduler.step()
            bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
            bar.update()
    return {"losses": losses, "bytes_sent": bytes_sent, "step_ms": step_ms, "metrics": metrics}


def _train_step(run: Run, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Take one optimizer step and return this process's loss.

    Reading the loss waits for a GPU, so that the step can be timed.
    """
    inputs, targets = inputs.to(run.processes.device), targets.to(run.processes.device)
    loss = loss_of(run.model(inputs), targets)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(run: Run) -> tuple[float, float]:
    """Return (mean loss, fraction of right predictions) on the held-out data.

    Every process evaluates its share of the data.
    """
    processes, held_out = run.processes, run.data.held_out
    if processes.grouped:
        # BatchNorm's running statistics differ between processes until DDP's next forward pass.
        for buffer in run.network.buffers():
            distributed.broadcast(buffer, src=0)
    run.network.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, right, count
    mine = list(range(processes.rank, len(held_out), processes.world_size))
    for start in range(0, len(mine), EVALUATION_BATCH):
        inputs, targets = (
            tensor.to(processes.device)
            for tensor in held_out[mine[start : start + EVALUATION_BATCH]]
        )
        logits = run.network(inputs)
        sums[0] += loss_of(logits, targets) * targets.numel()
        sums[1] += (logits.argmax(-1) == targets).sum()
        sums[2] += targets.numel()
    loss, right, count = processes.sum_(sums).tolist()
    return loss / count, right / count


def ring_all_reduce_bytes(network: nn.Module, world_size: int) -> float:
    """Bytes each process sends in a ring all-reduce of all gradients: 2 (P - 1) / P of them."""
    gradient_bytes = sum(
        parameter.numel() * parameter.element_size()
        for parameter in network.parameters()
        if parameter.requires_grad
    )
    return 2 * (world_size - 1) / world_size * gradient_bytes


def _write_scalars(run: Run, step: int, scalars: dict[str, float]) -> None:
    if run.writer is not None:
        for name, value in scalars.items():
            run.writer.add_scalar(name, value, step)
