"""What the hook does not do, it refuses with words that name the remedy, on both entries, and the rest goes on working."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import ranks
import torch
from ddp_models import SMALL_BUCKETS, Case, GivenGradients, add_hook, both_entries
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, register, topk_ef_hook


def message_of(action: Callable[[], object], error: type[Exception]) -> str:
    with pytest.raises(error) as raised:
        action()
    assert raised.type is error, "the exact type matters: it is what a caller catches"
    return str(raised.value)


def assert_says(message: str, *words: str) -> None:
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    assert "Exception raised from" not in message and ".cpp:" not in message, (
        "a C++ backtrace is no help"
    )


def small_model() -> DistributedDataParallel:
    return DistributedDataParallel(GivenGradients(Case()), **SMALL_BUCKETS)


def backward(model: DistributedDataParallel, step: int = 0) -> None:
    model(Case().gradients(0, step)).backward()


def second_hook(rank: int, world_size: int, first: str, second: str) -> tuple[str, bool]:
    model = small_model()
    state = TopKEFState(exchange="allgather", dense_steps=0)
    add_hook(model, state, first)
    message = message_of(lambda: add_hook(model, state, second), RuntimeError)
    backward(model)
    return message, state.step == 1


@pytest.mark.parametrize("second", ["python", "cpp"])
@pytest.mark.parametrize("first", ["python", "cpp"])
def test_a_second_hook_is_refused_and_the_first_goes_on(first: str, second: str) -> None:
    message, works = ranks.run(1, second_hook, first, second)[0]
    assert works
    assert_says(
        message,
        *(
            ["only be called once"]
            if second == "python"
            else ["already has the communication hook topk_ef_hook", "DDP takes one"]
        ),
    )


def foreign_hook_first(rank: int, world_size: int) -> str:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    model = small_model()
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    return message_of(lambda: register(model, TopKEFState()), RuntimeError)


def test_register_names_the_hook_that_is_there() -> None:
    assert_says(ranks.run(1, foreign_hook_first)[0], "allreduce_hook", "DDP takes one")


def builtin_hook_first(rank: int, world_size: int) -> str:
    model = small_model()
    model._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.ALLREDUCE)
    return message_of(lambda: register(model, TopKEFState()), RuntimeError)


def test_register_refuses_a_model_with_a_builtin_hook() -> None:
    assert_says(ranks.run(1, builtin_hook_first)[0], "only be called once|already has")


def no_ddp_model(rank: int, world_size: int) -> list[str]:
    model = small_model()
    model._use_python_reducer = True
    return [
        message_of(lambda: register(nn.Linear(2, 2), TopKEFState()), TypeError),
        message_of(lambda: register(torch.compile(small_model()), TopKEFState()), TypeError),
        message_of(lambda: register(model, TopKEFState()), RuntimeError),
        message_of(lambda: topk_ef_hook(TopKEFState(), (torch.zeros(3), 0)), TypeError),
    ]


def test_register_refuses_what_is_not_ddp_and_the_python_reducer() -> None:
    not_wrapped, compiled, python_reducer, tuple_bucket = ranks.run(1, no_ddp_model)[0]
    assert_says(
        not_wrapped, "expected a DistributedDataParallel model, got Linear", "wrap the model first"
    )
    assert_says(
        compiled,
        "got OptimizedModule",
        "pass the DDP model inside, the one that was given to torch",
    )
    assert_says(
        python_reducer, "python_reducer", "leave torch._dynamo.config.optimize_ddp at its default"
    )
    assert_says(tuple_bucket, "got tuple", "python_reducer", "leave it at its default")


def second_model_with_names(rank: int, world_size: int, entry: str) -> tuple[str, bool]:
    first, second = small_model(), small_model()
    state = TopKEFState(exchange="allgather", dense_steps=0)
    add_hook(first, state, entry)
    backward(first)
    message = message_of(lambda: add_hook(second, state, entry), ValueError)
    backward(first, 1)
    backward(second)  # has no hook
    return message, state.step == 2


@both_entries
def test_a_second_model_is_refused_when_it_is_registered(entry: str) -> None:
    message, works = ranks.run(1, second_model_with_names, entry)[0]
    assert works
    assert_says(message, "already serves another model", "create a second TopKEFState")


def second_model_without_names(rank: int, world_size: int) -> tuple[str, bool]:
    first, second = small_model(), small_model()
    state = TopKEFState(exchange="allgather", dense_steps=0)
    for model in (first, second):
        model.register_comm_hook(state, topk_ef_hook)
    for step in range(3):
        backward(first, step)
    message = message_of(lambda: backward(second), ValueError)
    backward(first, 3)
    return message, state.step == 4


def test_a_second_model_without_names_is_refused_at_its_first_backward() -> None:
    message, works = ranks.run(1, second_model_without_names)[0]
    assert works
    assert_says(message, "already serves another model", "create a second TopKEFState")


class WithEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16, sparse=True)
        self.head = nn.Linear(16, 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens)).square().mean()


def sparse_embedding(rank: int, world_size: int, entry: str) -> list[str]:
    model = DistributedDataParallel(WithEmbedding())
    add_hook(model, TopKEFState(exchange="allgather", dense_steps=0), entry)
    # Twice: the error must not leave the reducer in a state that hides it behind another one.
    return [
        message_of(lambda: model(torch.tensor([1, 2, 3])).backward(), ValueError) for _ in range(2)
    ]


@both_entries
def test_a_sparse_gradient_is_refused_each_time(entry: str) -> None:
    for messages in ranks.run(2, sparse_embedding, entry):
        for message in messages:
            assert_says(
                message, "sparse gradient", "Embedding with sparse=True", "use sparse=False"
            )


def double_precision(rank: int, world_size: int, entry: str) -> list[str]:
    model = DistributedDataParallel(nn.Linear(64, 64).double())
    add_hook(model, TopKEFState(exchange="allgather", dense_steps=0), entry)
    return [
        message_of(lambda: model(torch.ones(1, 64).double()).sum().backward(), ValueError)
        for _ in range(2)
    ]


@both_entries
def test_float64_is_refused_each_time(entry: str) -> None:
    for messages in ranks.run(2, double_precision, entry):
        for message in messages:
            assert_says(
                message, "float32, float16 or bfloat16", "got Double", "DDP's own all-reduce"
            )


def without_names(rank: int, world_size: int) -> list[str]:
    model = small_model()
    exempting = TopKEFState(exchange="allgather", exempt=("first",))
    model.register_comm_hook(exempting, topk_ef_hook)
    messages = [message_of(lambda: backward(model), ValueError)]
    exempting.bind(model)
    backward(model)

    model = small_model()
    state = TopKEFState(exchange="allgather", dense_steps=0)
    model.register_comm_hook(state, topk_ef_hook)
    backward(model)
    messages.append(message_of(state.state_dict, ValueError))
    saved = state.bind(model).state_dict()
    assert set(saved["residuals"]) == {"first_weight", "second_weight", "third_weight"}

    model = small_model()
    loaded = TopKEFState(exchange="allgather", dense_steps=0)
    loaded.load_state_dict(saved)
    model.register_comm_hook(loaded, topk_ef_hook)
    messages.append(message_of(lambda: backward(model), ValueError))
    loaded.bind(model)
    backward(model)
    assert loaded.step == state.step + 1
    return messages


def test_what_needs_names_says_so_and_works_once_they_are_there() -> None:
    exempt, save, load = ranks.run(1, without_names)[0]
    assert_says(
        exempt, "exempt", r"state\.bind\(model\)", "named_parameters=model.named_parameters"
    )
    assert_says(
        save, "no names yet", r"state\.bind\(model\)", "named_parameters=model.named_parameters"
    )
    assert_says(load, "loaded state waits for the names", r"state\.bind\(model\)")


def nothing_to_train(rank: int, world_size: int) -> str:
    return message_of(
        lambda: DistributedDataParallel(nn.Linear(2, 2).requires_grad_(False)), RuntimeError
    )


def test_a_model_without_trainable_parameters_is_ddps_own_error() -> None:
    """Which is why neither entry has a check for it."""
    assert_says(
        ranks.run(1, nothing_to_train)[0], "not needed when a module doesn't have any parameter"
    )


def no_density(step: int) -> float:
    return 0.5 if step < 2 else 0.0


def raising_density(step: int) -> float:
    if step >= 2:
        raise LookupError("no such step")
    return 0.5


def bad_schedule(
    rank: int, world_size: int, entry: str, density: Callable[[int], float], error: type[Exception]
) -> list[str]:
    model = small_model()
    add_hook(model, TopKEFState(exchange="allgather", density=density, dense_steps=0), entry)
    for step in range(2):
        backward(model, step)
    return [message_of(lambda: backward(model, 2), error) for _ in range(2)]


@both_entries
def test_a_schedule_that_leaves_its_range_or_raises_says_at_which_step(entry: str) -> None:
    for message in ranks.run(1, bad_schedule, entry, no_density, ValueError)[0]:
        assert_says(message, r"density\(\d\) must be in \(0, 1\], got 0")
    first, _ = ranks.run(1, bad_schedule, entry, raising_density, RuntimeError)[0]
    assert_says(first, r"density\(2\) raised LookupError: no such step")
