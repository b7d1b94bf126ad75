"""The hook on a GPU, beside the hook on the CPU: the same gradients have to give the same bits.

    python benchmarks/gpu/ranks_on_gpu.py train --backend gloo --ranks 2
    python benchmarks/gpu/ranks_on_gpu.py train --backend nccl
    python benchmarks/gpu/ranks_on_gpu.py steady        # NCCL, one rank: the host waits for nothing
    python benchmarks/gpu/ranks_on_gpu.py graph         # NCCL, one rank: a step as a CUDA graph

Every rank is a process of its own on the same GPU. Each has two models with the same chosen
gradients, one on the GPU and one on the CPU (over Gloo), through either entry of compressed_ddp:

    train    averaged gradients and residuals: the same bits on the GPU and the CPU, and on all ranks;
             with a non-finite step, a rollback, a state_dict that another model goes on from, all types,
             value formats, scopes and exchanges, a side stream, and dense steps first
    steady   torch's sync debug mode set to "error", and a GPU that is kept busy: backward() is back
             before the GPU has begun with it
    graph    a captured step replayed on new gradients; a dense step is refused with words

Exit code 0: all is as it should be. 77: this machine cannot run it (one line says why).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import inspect
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import compressed_ddp

CANNOT_RUN = 77
GROUP_TIMEOUT_S = 40
DENSITY = 0.03
STEPS = 5
ROLLED_BACK_STEP, NON_FINITE_STEP = 1, 3
STEPS_AFTER_LOADING = 2
WARM_UP_STEPS = 12  # DDP measures itself in the first ten; a graph needs eleven
LAZY = (  # not in every torch
    {"lazy_bucket_allocation": True}
    if "lazy_bucket_allocation" in inspect.signature(DistributedDataParallel).parameters
    else {}
)
BUSY_CYCLES = 700_000_000  # of the GPU: about 0.4 s
NEEDED_NCCL = (2, 30)  # for several ranks on one GPU

# Several tiles and runs of the kernels, some small groups, and parameters that travel dense.
SHAPES: dict[str, tuple[int, ...]] = {
    "table": (700, 333),
    "first_weight": (60, 50),
    "first_bias": (60,),
    "tiny_weight": (8, 6),
    "second_weight": (16, 20, 5, 5),
    "second_bias": (16,),
    "third_weight": (97, 131),
}


class WrongError(AssertionError):
    """Something differs that must not."""


# ---- a model whose gradients are given


class GivenGradients(nn.Module):
    """The gradient of every parameter is exactly the tensor given to forward under its name."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            values = torch.ones(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return a scalar."""
        products = [
            (parameter * gradients[name]).sum() for name, parameter in self.named_parameters()
        ]
        return torch.stack([product.float() for product in products]).sum()


def gradients_of(rank: int, step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the gradients of one rank in one step, on the CPU; one of them is not finite now and then."""
    gradients = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(1000 * step + 100 * place + rank)
        gradients[name] = torch.randn(shape, generator=generator).to(dtype)
    if step == NON_FINITE_STEP and rank == 0:
        gradients["third_weight"].view(-1)[17] = float("inf")
    return gradients


@dataclass(frozen=True)
class Variant:
    """What is trained, and how."""

    entry: str
    dtype: torch.dtype = torch.float32
    side_stream: bool = False
    ddp: Mapping[str, Any] = field(default_factory=lambda: {"bucket_cap_mb": 0.2})
    state: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{self.entry} entry", str(self.dtype).removeprefix("torch.")]
        words += [f"{key}={value}" for key, value in {**self.state, **self.ddp}.items()]
        return ", ".join(words + ["side stream"] * self.side_stream)


class Replica:
    """One model on one device behind one entry, with the state."""

    def __init__(
        self,
        variant: Variant,
        device: torch.device,
        group: dist.ProcessGroup,
        state_dict: dict[str, Any] | None = None,
    ) -> None:
        self.variant = variant
        self.device = device
        module = GivenGradients(variant.dtype, device)
        self.model = DistributedDataParallel(module, process_group=group, **variant.ddp)
        options = {"density": DENSITY, "dense_steps": 0, **variant.state}
        self.state = compressed_ddp.TopKEFState(group, **options)
        if state_dict is not None:
            self.state.load_state_dict(state_dict)
        if variant.entry == "cpp":
            compressed_ddp.register(self.model, self.state)
        else:
            self.model.register_comm_hook(self.state.bind(self.model), compressed_ddp.topk_ef_hook)
        # Written in every step, behind whatever the stream still has to do.
        self.given = {
            name: torch.zeros(shape, dtype=variant.dtype, device=device)
            for name, shape in SHAPES.items()
        }

    def step(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one step and return the averaged gradients on the CPU."""
        self.give(gradients)
        self.model.zero_grad(set_to_none=True)
        self.model(self.given).backward()
        return self.averages()

    def give(self, gradients: Mapping[str, Tensor]) -> None:
        """Copy the gradients to where the next step, or replay, reads them."""
        if self.variant.side_stream and self.device.type == "cuda":
            torch.cuda._sleep(BUSY_CYCLES // 50)  # who does not wait for this stream reads old ones
        for name, gradient in gradients.items():
            self.given[name].copy_(gradient)

    def averages(self) -> dict[str, Tensor]:
        """Return the gradients of the parameters on the CPU."""
        return {
            name.removeprefix("module."): parameter.grad.cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def residuals(self) -> dict[str, Tensor]:
        """Return the residuals on the CPU."""
        return {name: part.cpu() for name, part in self.state.state_dict()["residuals"].items()}


# ---- comparisons


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, every NaN as one and the same."""
    flat = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor).contiguous()
    return flat.view({4: torch.int32, 2: torch.int16}[flat.element_size()])


def expect_same(what: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise WrongError unless both hold the same bits."""
    if actual.keys() != expected.keys():
        raise WrongError(f"{what}: {sorted(actual)} instead of {sorted(expected)}")
    for name, tensor in actual.items():
        wrong = bits(tensor) != bits(expected[name])
        if wrong.any():
            raise WrongError(
                f"{what} of {name}: {int(wrong.sum())} of {wrong.numel()} entries differ, first "
                f"{tensor[wrong][:3].tolist()} instead of {expected[name][wrong][:3].tolist()}"
            )


def expect_on_all_ranks(what: str, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Raise WrongError unless every rank holds the same bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(bits(tensors[name]).numpy().tobytes())
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest.hexdigest(), group=group)
    if len(set(digests)) != 1:
        raise WrongError(f"{what}: the ranks differ: {[d[:8] for d in digests]}")


# ---- what is run on every rank


@dataclass(frozen=True)
class Rank:
    """Where a rank runs: its place, its device, and the groups of the two models."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup  # of the model on the device
    host_group: dist.ProcessGroup  # Gloo

    def pair(self, variant: Variant) -> tuple[Replica, Replica]:
        """Return the model on the device and the one on the CPU."""
        on_host = Replica(variant, torch.device("cpu"), self.host_group)
        return Replica(variant, self.device, self.group), on_host

    def say(self, text: str) -> None:
        """Print it once."""
        if self.rank == 0:
            print(text, flush=True)


def train(here: Rank) -> None:
    """All variants, one after another."""
    variants = [
        Variant("cpp"),
        Variant("python", ddp={"bucket_cap_mb": 0.2, "gradient_as_bucket_view": True}),
        Variant("cpp", dtype=torch.bfloat16, side_stream=True),
        Variant("python", ddp={"bucket_cap_mb": 100}, state={"scope": "bucket"}),
        Variant("cpp", dtype=torch.float16, state={"value_format": "fp32"}),
        Variant("python", state={"value_format": "sign", "scope": "chunk"}),
        Variant("cpp", state={"exchange": "split"}),
        Variant(
            "python", dtype=torch.bfloat16, state={"exchange": "split", "value_format": "sign"}
        ),
        Variant(
            "cpp",
            ddp={"bucket_cap_mb": 0.2, "gradient_as_bucket_view": True, **LAZY},
            state={"exchange": "hierarchical", "ranks_per_node": max(1, here.world_size // 2)},
        ),
    ]
    if here.world_size <= 2:  # sums of more depend on the order in which the backend adds
        variants.append(Variant("cpp", state={"dense_steps": 2}))
        variants.append(Variant("cpp", state={"exchange": "dense_bf16"}))
    for variant in variants:
        start = time.perf_counter()
        with on_side_stream(here.device if variant.side_stream else None):
            train_variant(here, variant)
        here.say(f"  same bits: {variant} ({time.perf_counter() - start:.1f} s)")


@contextlib.contextmanager
def on_side_stream(device: torch.device | None) -> Iterator[None]:
    """Make another stream current."""
    if device is None or device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def train_variant(here: Rank, variant: Variant) -> None:
    """Steps, with a rollback and a non-finite one; then a second model goes on from a checkpoint."""
    on_device, on_host = here.pair(variant)
    replicas = [on_device]
    for step in range(STEPS + STEPS_AFTER_LOADING):
        # A new model has arranged its buckets otherwise; of split, the selection depends on that.
        if step == STEPS and variant.state.get("exchange") != "split":
            replicas.append(Replica(variant, here.device, here.group, through_a_file(on_device)))
        gradients = gradients_of(here.rank, step, variant.dtype)
        expected = on_host.step(gradients)
        for replica in replicas:
            averages = replica.step(gradients)
            expect_same(f"{variant}: average in step {step}", averages, expected)
            expect_on_all_ranks(f"{variant}: average in step {step}", averages, here.host_group)
        if step == ROLLED_BACK_STEP:
            on_device.state.rollback()
            on_host.state.rollback()
        if step == NON_FINITE_STEP and expected["third_weight"].isfinite().all():
            raise WrongError(f"{variant}: an Inf on rank 0 was averaged away")
    for replica in replicas:
        expect_same(f"{variant}: residual", replica.residuals(), on_host.residuals())
        if replica.state.step != on_host.state.step:
            raise WrongError(f"{variant}: step {replica.state.step}, not {on_host.state.step}")
    sent = [r.state.metrics()["compressed_ddp/bytes_sent"] for r in (on_device, on_host)]
    if sent[0] != sent[1]:
        raise WrongError(f"{variant}: {sent[0]} bytes sent by the GPU's, {sent[1]} by the CPU's")


def through_a_file(replica: Replica) -> dict[str, Any]:
    """Return the state as torch.save and torch.load give it back."""
    file = io.BytesIO()
    torch.save(replica.state.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


def steady(here: Rank) -> None:
    """In the steady state nothing synchronises, by torch's own check and by the clock."""
    for entry in ("cpp", "python"):
        replica = Replica(Variant(entry), here.device, here.group)
        for step in range(WARM_UP_STEPS):
            replica.step(gradients_of(here.rank, 10 + step, torch.float32))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            done = torch.cuda.Event()
            start = time.perf_counter()
            torch.cuda._sleep(BUSY_CYCLES)
            for _ in range(3):
                replica.model.zero_grad(set_to_none=True)
                replica.model(replica.given).backward()
            host_ms = 1e3 * (time.perf_counter() - start)
            done.record()
            was_early = not done.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        device_ms = 1e3 * (time.perf_counter() - start)
        times = f"three steps enqueued in {host_ms:.1f} ms, done after {device_ms:.1f} ms"
        if not was_early:
            raise WrongError(f"{entry} entry: backward() waited for the GPU: {times}")
        here.say(f"  the host waits for nothing: {entry} entry, {times}")


def graph(here: Rank) -> None:
    """A compressed step is captured once and replayed on other gradients."""
    for entry in ("cpp", "python"):
        variant = Variant(entry)
        # As PyTorch asks for it: DDP is made and warmed up on a side stream.
        stream = torch.cuda.Stream(here.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_device, on_host = here.pair(variant)
            for step in range(WARM_UP_STEPS):
                gradients = gradients_of(here.rank, 10 + step, torch.float32)
                on_device.step(gradients)
                on_host.step(gradients)
        torch.cuda.synchronize()
        captured = capture(on_device, stream)
        for replay in range(4):
            gradients = gradients_of(here.rank, 50 + replay, torch.float32)
            on_device.give(gradients)
            captured.replay()
            expected = on_host.step(gradients)
            averages = on_device.averages()
            expect_same(f"{entry} entry: average of replay {replay}", averages, expected)
            expect_on_all_ranks(f"average of replay {replay}", averages, here.host_group)
        expect_same("residual after replays", on_device.residuals(), on_host.residuals())
        here.say(f"  same bits from a captured step, replayed four times: {entry} entry")


def refused_graph(here: Rank) -> None:
    """A dense step does not let itself be captured. Ends the process: DDP is unusable afterwards."""
    variant = Variant("cpp", state={"dense_steps": 1000})
    stream = torch.cuda.Stream(here.device)
    with torch.cuda.stream(stream):
        replica = Replica(variant, here.device, here.group)
        for step in range(WARM_UP_STEPS):
            replica.step(gradients_of(here.rank, 10 + step, torch.float32))
    torch.cuda.synchronize()
    wanted = "a CUDA graph cannot hold a dense step"
    try:
        capture(replica, stream)
    except Exception as error:
        messages = []
        link: BaseException | None = error
        while link is not None:
            messages.append(str(link))
            link = link.__context__
        if not any(wanted in message for message in messages):
            raise WrongError(
                f"a dense step was refused, but with these words: {messages}"
            ) from None
        here.say("  refused with words: the capture of a dense step")
        sys.stdout.flush()
        os._exit(0)
    raise WrongError("a dense step was captured")


def capture(replica: Replica, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Return the graph of one step on the stream of the warm-up; its gradients stay those of the parameters."""
    captured = torch.cuda.CUDAGraph()
    replica.model.zero_grad(set_to_none=True)
    # Thread-local: NCCL's own threads may ask for the state of their work meanwhile.
    with torch.cuda.graph(captured, stream=stream, capture_error_mode="thread_local"):
        replica.model(replica.given).backward()
    return captured


ACTIONS: dict[str, tuple[Callable[[Rank], None], ...]] = {
    "train": (train,),
    "steady": (steady,),
    "graph": (graph, refused_graph),
}


# ---- processes


def main_of_rank(
    rank: int,
    world_size: int,
    action: Callable[[Rank], None],
    backend: str,
    device: str,
    store: str,
) -> None:
    """Run on every rank, in a process of its own."""
    torch.set_num_threads(1)  # several ranks share the cores
    warnings.filterwarnings("ignore", "compressed_ddp: the process group has one rank")
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    group = dist.group.WORLD
    host_group = group if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup) and isinstance(host_group, dist.ProcessGroup)
    try:
        action(Rank(rank, world_size, where, group, host_group))
    finally:
        if (
            sys.exc_info()[0] is None
        ):  # after an error, others may never come to the end of the group
            dist.destroy_process_group()


def spawn(action: Callable[[Rank], None], options: argparse.Namespace) -> str | None:
    """Run `action` on all ranks; return what went wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(
            main_of_rank,
            (options.ranks, action, options.backend, options.device, os.path.join(folder, "store")),
            nprocs=options.ranks,
            join=False,
        )
        deadline = time.monotonic() + options.timeout_s
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    return f"{action.__name__}: no end after {options.timeout_s:g} s"
        except Exception as error:  # holds the traceback of the rank
            return f"{action.__name__}: {error}"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    return None


def why_not(options: argparse.Namespace) -> str | None:
    """Return why this machine cannot run it, or None."""
    if options.device == "cpu":
        only = options.what == "train" and options.backend == "gloo"
        return None if only else "--device cpu is for `train --backend gloo` alone"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if options.backend != "nccl":
        return None
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    version = torch.cuda.nccl.version()
    if options.ranks > 1 and version[:2] < NEEDED_NCCL:
        found, needed = (".".join(map(str, v)) for v in (version, NEEDED_NCCL))
        return f"several ranks on one GPU need NCCL {needed}, this torch has {found}"
    return None


def main() -> int:
    """Run one of the actions on all ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(ACTIONS))
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="nccl")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cuda:0", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--timeout-s", type=float, default=90)
    parser.add_argument("--output", type=Path, help="JSON with what was run")
    options = parser.parse_args()
    if options.what != "train" and options.backend != "nccl":
        parser.error(f"{options.what} needs NCCL: Gloo waits on the host by itself")

    title = f"{options.what}, {options.backend}, {options.ranks} rank(s), {options.device}"
    reason = why_not(options)
    if reason is not None:
        print(f"{title}: left out, {reason}", file=sys.stderr)
        return CANNOT_RUN
    if options.backend == "nccl" and options.ranks > 1:
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    if options.what == "graph":
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # as PyTorch asks for captures with DDP

    print(title, flush=True)
    start = time.monotonic()
    failures = [wrong for action in ACTIONS[options.what] if (wrong := spawn(action, options))]
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.output is not None:
        result = {
            "what": options.what,
            "backend": options.backend,
            "ranks": options.ranks,
            "seconds": round(time.monotonic() - start, 1),
            "failures": failures,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
