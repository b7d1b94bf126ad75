"""The two entries into DDP. Both end in the same C++ engine (csrc/engine.h)."""

# No `from __future__ import annotations` here: DDP compares the hook's annotations with the classes themselves.

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import _native
from .names import trained_parameters
from .state import TopKEFState


def topk_ef_hook(  # DDP looks at the names and annotations of this signature
    state: TopKEFState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Averages one bucket over the ranks by Top-K with error feedback; for `model.register_comm_hook(state, topk_ef_hook)`.

    compensate_select_ -> encode -> exchange -> decode_apply_, started here and finished on a thread of the process group.

    Args:
        state: serves this model alone.
        bucket: its buffer is a flat tensor [numel] of float32, float16 or bfloat16; it is overwritten in place with the
            average over the ranks, bitwise the same on every rank.

    Returns:
        A future of that buffer. Every error arrives through it and is raised by `backward()`.
    """
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        # Raised, not returned: the Python reducer ignores what a hook returns, and would train on unaveraged gradients.
        raise TypeError(
            f"topk_ef_hook: expected a torch.distributed.GradBucket, got {type(bucket).__name__}; "
            "torch._dynamo.config.optimize_ddp = 'python_reducer' is not supported, leave it at its default"
        )
    try:
        return state._engine_with_process_group().reduce_bucket(bucket)
    except Exception as error:
        # Raised from here, it would leave DDP's reducer unusable: the next forward would fail with another, misleading error.
        return _native._C.failed_future(str(error), isinstance(error, (ValueError, TypeError)))


def register(model: DistributedDataParallel, state: TopKEFState) -> None:
    """Registers the engine as a C++ hook on `model.reducer`: the same results as `topk_ef_hook`, without Python or the GIL in the
    backward pass. Takes the parameters' names from `model`, and its process group unless the state has one.

    Raises:
        TypeError: `model` is no DistributedDataParallel.
        RuntimeError: the model has a hook already, or does not use the C++ reducer.
        ValueError: the state serves another model.
    """
    is_compiled_ddp = isinstance(getattr(model, "_orig_mod", None), DistributedDataParallel)
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"register: expected a DistributedDataParallel model, got {type(model).__name__}; "
            + (
                "pass the DDP model inside, the one that was given to torch.compile"
                if is_compiled_ddp
                else "wrap the model first"
            )
        )
    if getattr(model, "_use_python_reducer", False):
        raise RuntimeError(
            "register: the model uses torch._dynamo's 'python_reducer', which takes no C++ hook; leave "
            "torch._dynamo.config.optimize_ddp at its default"
        )
    if model._comm_hooks:
        name = getattr(model._comm_hooks[0][0], "__qualname__", "?")
        raise RuntimeError(
            f"register: the model already has the communication hook {name}; DDP takes one"
        )
    state._bind(trained_parameters("register", model, takes_module=True), stacklevel=3)
    if state.process_group is None:
        state._use_process_group(model.process_group)
    _native._C.register_hook(model.reducer, state._engine_with_process_group())
    # What DistributedDataParallel.register_comm_hook does besides: its log, and its list of hooks.
    model._comm_hooks.append((topk_ef_hook, state))
    assert model.logger is not None
    model.logger._set_comm_hook_name("compressed_ddp::TopKEFHook")
