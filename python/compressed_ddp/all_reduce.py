"""The engine without DDP: for hand-written loops, FSDP2's all-reduce hook, pseudo-gradients."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .names import trained_parameters
from .state import TopKEFState

_BUCKET_BYTES = 25 * 2**20  # DDP's own default


def all_reduce_(
    tensor: torch.Tensor,
    state: TopKEFState,
    *,
    name: str,
    segments: Sequence[int] | None = None,
    async_op: bool = False,
) -> torch.Tensor | torch.futures.Future[torch.Tensor]:
    """Averages `tensor` over the ranks in place by Top-K with error feedback.

    Args:
        tensor: float32, float16 or bfloat16, any shape; overwritten with the average, bitwise the same on every rank.
        state: a name that comes a second time begins a new step.
        name: identifies the tensor's residual from step to step and in checkpoints. `exempt` rules see it. As with any collective, all
            ranks call in the same order of names; behind the first step another order is not noticed.
        segments: numels of the tensors that lie in it one after another; each is selected from by itself under scope "tensor",
            and travels dense when it is shorter than `min_compress_numel`. Default: one segment. (The rule that 1-D
            parameters travel dense is for named parameters only.)
        async_op: return a future of `tensor` at once; then do not touch `tensor` before `wait()`.

    Returns:
        `tensor`, or the future.

    A result that is not finite, or an exchange that failed, gives back to the residual what was sent under this name; other names of
    the same step are not touched, since they may have been used already.

    Raises:
        ValueError, TypeError: segments that do not add up, a name that stood for another shape, another dtype or layout.
        RuntimeError: the ranks disagree, or the exchange failed; the residual has lost nothing.
    """
    _check_tensor(tensor)
    if not isinstance(name, str):
        raise TypeError(
            f"all_reduce_: expected name to be a str, the same in every step and on every rank, got {name!r}"
        )
    segments = [tensor.numel()] if segments is None else _checked_segments(segments)
    if any(numel < 0 for numel in segments) or sum(segments) != tensor.numel():
        raise ValueError(
            f"all_reduce_: expected segments to add up to the tensor's numel {tensor.numel()}, got {segments}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "all_reduce_: expected a tensor without autograd history; pass tensor.detach() or use torch.no_grad()"
        )
    flat = tensor.contiguous().view(-1)  # the tensor itself, or a row-major copy
    future = state._engine_with_process_group().reduce_named(
        flat, tensor, name, segments, bool(state._is_exempt(name, tensor))
    )
    is_copy = not tensor.is_contiguous()

    def copy_back(done: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
        done.value()
        with torch.no_grad():  # this thread has its own grad mode
            return tensor.copy_(flat.view(tensor.shape))

    if async_op:
        returned = future.then(copy_back) if is_copy else future
        # While the caller keeps the future, its exchange may need the state's groups.
        weakref.finalize(returned, _let_go, state).atexit = False
        return returned
    future.wait()
    if is_copy:
        tensor.copy_(flat.view(tensor.shape))
    return tensor


def _let_go(state: TopKEFState) -> None:
    """Nothing: what holds it as an argument is the finalizer."""


def _check_tensor(tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"all_reduce_: expected a tensor, got {type(tensor).__name__}; give the tensors of a list a name and a call each"
        )
    if tensor.layout != torch.strided:
        raise ValueError(
            f"all_reduce_: expected a dense tensor, got {tensor.layout}; pass tensor.to_dense()"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise ValueError(
            "all_reduce_: expected a tensor whose entries have memory of their own, because it is overwritten, got an expanded "
            "one; pass tensor.clone(memory_format=torch.contiguous_format)"
        )


def _checked_segments(segments: Any) -> list[int]:
    if isinstance(segments, (list, tuple, torch.Size)) and all(
        isinstance(numel, numbers.Integral) and not isinstance(numel, bool) for numel in segments
    ):
        return [int(numel) for numel in segments]
    raise TypeError(
        f"all_reduce_: expected segments to be a list of ints, the numels of what lies in the tensor, got {segments!r}"
    )


@torch.no_grad()
def all_reduce_gradients(
    named_parameters: Iterable[tuple[str, torch.Tensor]], state: TopKEFState
) -> None:
    """Averages the `.grad` of all parameters over the ranks in place; for loops without DDP, after `backward()`.

    Args:
        named_parameters: `model.named_parameters()`, the same on every rank and in every step. Binds the state.
            A parameter whose `.grad` is None on this rank but not on all of them contributes zeros (its residual waits) and
            receives the average; one that has no gradient anywhere keeps None.
        state: as for the hook; this call is one step.

    One exchange per 25 MiB of parameters of one dtype and device. Gradients must have the dtype and device of their parameter.

    Raises:
        TypeError: no pairs (name, parameter).
        ValueError: other parameters than before, or a gradient of another dtype, device or layout.
        RuntimeError: the ranks disagree, or an exchange failed; no residual has lost anything, but some gradients may be averaged already.
    """
    named = trained_parameters("all_reduce_gradients", named_parameters)
    if not named:
        return
    for name, parameter in named:
        gradient = parameter.grad
        if gradient is not None and (
            gradient.is_sparse
            or gradient.dtype != parameter.dtype
            or gradient.device != parameter.device
        ):
            raise ValueError(
                f"all_reduce_gradients: expected the gradient of '{name}' to be dense {parameter.dtype} on "
                f"{parameter.device}, got {gradient.dtype} on {gradient.device} ({gradient.layout})"
            )
    state._bind(named, stacklevel=4)  # torch.no_grad's wrapper is a frame of its own
    engine = state._engine_with_process_group()
    started = []
    for parameters in _buckets([parameter for _, parameter in named]):
        numels = [parameter.numel() for parameter in parameters]
        flat = parameters[0].new_zeros(sum(numels) + len(parameters))
        views = [
            _bucket_view(part, parameter)
            for part, parameter in zip(flat.split(numels + [1] * len(parameters)), parameters)
        ]
        present = flat[sum(numels) :]
        unused = []
        for index, (view, parameter) in enumerate(zip(views, parameters)):
            unused.append(parameter.grad is None)
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                present[index] = 1
        future = engine.reduce_parameters(flat, parameters, unused)
        if future.done():
            # Ranks that disagree about this bucket may not have a next one: raise before it is exchanged. Not wait(): on CUDA, where
            # a future is done as soon as its work is enqueued, the next bucket would be filled behind this one's exchange.
            future.value()
        started.append((parameters, views, present, future))
    for parameters, views, present, future in started:
        future.wait()
        for view, parameter, is_present in zip(views, parameters, present.tolist()):
            if parameter.grad is not None:
                parameter.grad.copy_(view)
            elif is_present != 0:  # NaN after a non-finite step, too
                parameter.grad = view.clone(memory_format=torch.preserve_format)


def _buckets(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters in order, grouped by dtype and device, cut at 25 MiB: a function of the model alone."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        bucket: list[torch.Tensor] = []
        bucket_bytes = 0
        for parameter in group:
            parameter_bytes = parameter.numel() * parameter.element_size()
            if bucket and bucket_bytes + parameter_bytes > _BUCKET_BYTES:
                yield bucket
                bucket, bucket_bytes = [], 0
            bucket.append(parameter)
            bucket_bytes += parameter_bytes
        if bucket:
            yield bucket


def _bucket_view(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A part of a bucket in the parameter's shape and memory order, as DDP's reducer lays it out (csrc/residuals.h)."""
    # preserve_format keeps the strides exactly when they are non-overlapping and dense.
    strides = torch.empty_like(
        parameter, device="meta", memory_format=torch.preserve_format
    ).stride()
    return (
        part.as_strided(parameter.shape, strides)
        if strides == parameter.stride()
        else part.view(parameter.shape)
    )
