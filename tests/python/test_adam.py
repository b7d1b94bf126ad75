"""adam_param_groups, and the one warning about momentum after error feedback."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import ranks
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from compressed_ddp import TopKEFState, adam, adam_param_groups, all_reduce_gradients


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.head = nn.Linear(40, 60)
        self.frozen = nn.Linear(60, 60).requires_grad_(False)


def step(net: nn.Module, state: TopKEFState) -> None:
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    all_reduce_gradients(net.named_parameters(), state)


# ---- groups


def test_compressed_parameters_get_their_own_betas():
    net = Net()
    groups = adam_param_groups(net, TopKEFState())
    assert groups == [
        {
            "params": [net.embed.weight, net.head.weight],
            "betas": (0.0, 0.99),
            "weight_decay": 0.01,
        },
        {"params": [net.head.bias], "betas": (0.9, 0.95), "weight_decay": 0.01},
    ]
    for optimizer in (torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam):
        assert len(optimizer(adam_param_groups(net, TopKEFState()), lr=1e-3).param_groups) == 2


def test_every_number_of_the_groups_can_be_chosen():
    compressed, dense = adam_param_groups(
        Net(), TopKEFState(), betas=(0.8, 0.9), compressed_betas=(0.1, 0.999), weight_decay=0.5
    )
    assert (compressed["betas"], compressed["weight_decay"]) == ((0.1, 0.999), 0.5)
    assert (dense["betas"], dense["weight_decay"]) == ((0.8, 0.9), 0.5)


def test_exempt_and_small_parameters_are_in_the_dense_group():
    net = Net()
    compressed, dense = adam_param_groups(net, TopKEFState(exempt="embed"))
    assert compressed["params"] == [net.head.weight]
    assert dense["params"] == [net.embed.weight, net.head.bias]
    (only,) = adam_param_groups(net, TopKEFState(min_compress_numel=10**6))
    assert only["betas"] == (0.9, 0.95)
    assert len(only["params"]) == 3


def test_a_group_without_parameters_is_left_out():
    (only,) = adam_param_groups(nn.Linear(40, 60, bias=False), TopKEFState())
    assert only["betas"] == (0.0, 0.99)
    assert adam_param_groups(nn.Identity(), TopKEFState()) == []


# ---- the warning


class OwnAdam(torch.optim.Optimizer):
    """Adam-like by its groups alone."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.5, 0.9)})

    def step(self, closure=None) -> None:
        pass


OPTIMIZERS = {
    "Adam": lambda net, state: torch.optim.Adam(net.parameters()),
    "AdamW": lambda net, state: torch.optim.AdamW(net.parameters()),
    "NAdam": lambda net, state: torch.optim.NAdam(net.parameters()),
    "RAdam": lambda net, state: torch.optim.RAdam(net.parameters()),
    "of-the-user": lambda net, state: OwnAdam(net.parameters()),
    "AdamW-of-adam_param_groups": lambda net, state: torch.optim.AdamW(
        adam_param_groups(net, state)
    ),
    "AdamW-beta1=0": lambda net, state: torch.optim.AdamW(net.parameters(), betas=(0.0, 0.99)),
    "SGD-momentum": lambda net, state: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "RMSprop": lambda net, state: torch.optim.RMSprop(net.parameters()),
}
WARNED = {"Adam": 0.9, "AdamW": 0.9, "NAdam": 0.9, "RAdam": 0.9, "of-the-user": 0.5}


def warnings_by_step(rank, world_size, optimizer_name):
    """Warnings of each of four optimizer steps; the first is dense. And whether the global hook is gone afterwards."""
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=1)
    optimizer = OPTIMIZERS[optimizer_name](net, state)
    messages = []
    for _ in range(4):
        step(net, state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        messages.append(
            [(str(w.message), w.filename) for w in caught if "momentum" in str(w.message)]
        )
    return messages, adam._handle is None


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_momentum_on_compressed_parameters_is_warned_about_once(optimizer_name):
    ((by_step, hook_is_gone),) = ranks.run(1, warnings_by_step, optimizer_name)
    assert hook_is_gone
    dense, *compressed = by_step
    assert dense == [], "nothing has been compressed yet"
    if optimizer_name not in WARNED:
        assert compressed == [[], [], []]
        return
    assert [len(messages) for messages in compressed] == [1, 0, 0]
    ((message, filename),) = compressed[0]
    assert f"steps compressed parameters with beta1 = {WARNED[optimizer_name]:g}" in message
    assert "compressed_ddp.adam_param_groups(model, state)" in message
    assert filename == __file__, "the warning points at optimizer.step()"


def warnings_of_several_optimizers(rank, world_size):
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    optimizers = [
        torch.optim.Adam([nn.Parameter(torch.ones(3, requires_grad=True))]),  # of another model
        torch.optim.Adam([net.head.bias]),  # travels dense
        torch.optim.SGD([net.embed.weight], lr=0.1),  # compressed, and nothing is wrong with it
        torch.optim.Adam([net.head.weight]),
        torch.optim.Adam([net.embed.weight]),
    ]
    step(net, state)
    counts = []
    for optimizer in optimizers:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        counts.append(len(caught))
    return counts


def test_an_optimizer_is_warned_about_wherever_it_comes_in_the_order_and_only_the_first():
    assert ranks.run(1, warnings_of_several_optimizers) == [[0, 0, 0, 1, 0]]


def warnings_after_another_optimizer(rank, world_size):
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    step(net, state)
    counts = []
    for parameters in ([net.head.bias], [net.embed.weight, net.head.weight]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.optim.Adam(parameters).step()
        counts.append(len(caught))
    return counts


def test_an_optimizer_of_dense_parameters_does_not_use_the_warning_up():
    assert ranks.run(1, warnings_after_another_optimizer) == [[0, 1]]


def warnings_of_two_states(rank, world_size):
    counts = []
    nets = [Net(), Net()]
    states = [TopKEFState(exchange="allgather", density=0.05, dense_steps=0) for _ in nets]
    for net, state in zip(nets, states):
        step(net, state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.optim.Adam(net.parameters()).step()
        counts.append(len(caught))
    return counts, adam._handle is None


def test_every_state_looks_for_its_own_optimizer():
    assert ranks.run(1, warnings_of_two_states) == [([1, 1], True)]


def test_a_state_that_waits_for_an_optimizer_can_be_collected():
    state = TopKEFState()
    gone = weakref.ref(state)
    del state
    gc.collect()
    assert gone() is None


def collect_after_use(rank, world_size):
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    step(net, state)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gone = weakref.ref(state)
    del state
    gc.collect()
    optimizer.step()  # whose look finds no state any more
    return gone() is None, adam._handle is None


def test_a_used_state_can_be_collected_and_takes_its_hook_along():
    assert ranks.run(1, collect_after_use) == [(True, True)]


def hooks_of(optimizer) -> list:
    """Of this optimizer and of all of them, before and behind a step; and what `adam` holds itself."""
    return [
        *optimizer._optimizer_step_pre_hooks,
        *optimizer._optimizer_step_post_hooks,
        *_global_optimizer_pre_hooks,
        *_global_optimizer_post_hooks,
        *(handle for handle in (adam._handle, adam._removal) if handle is not None),
        *adam._watches,
    ]


def hooks_after_each_step(rank, world_size, optimizer_name, bound, num_steps):
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    optimizer = OPTIMIZERS[optimizer_name](net, state)
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(net, state)
        if not bound:
            state._bound = None  # as with register_comm_hook and without bind
        for _ in range(num_steps):
            optimizer.step()
            counts.append(len(hooks_of(optimizer)))
    return counts


@pytest.mark.parametrize("optimizer_name", ["AdamW", "SGD-momentum"])
def test_no_hook_is_left_once_all_compressed_parameters_have_been_seen(optimizer_name):
    assert ranks.run(1, hooks_after_each_step, optimizer_name, True, 3) == [[0, 0, 0]]


def test_without_names_the_hook_goes_after_a_bounded_number_of_steps():
    (counts,) = ranks.run(1, hooks_after_each_step, "SGD-momentum", False, adam._MAX_STEPS + 2)
    assert all(count > 0 for count in counts[: adam._MAX_STEPS - 1])
    assert counts[adam._MAX_STEPS - 1 :] == [0, 0, 0]


def an_optimizer_with_hooks_of_its_own(rank, world_size):
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    step(net, state)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    before = len(optimizer._optimizer_step_post_hooks)
    for _ in range(2):
        optimizer.step()
    return calls, len(optimizer._optimizer_step_post_hooks) - before


def test_the_hooks_of_the_user_stay_and_are_called():
    assert ranks.run(1, an_optimizer_with_hooks_of_its_own) == [(["pre", "post"] * 2, 0)]


class Failing(torch.optim.SGD):
    def step(self, closure=None) -> None:
        raise KeyError("not today")


def a_step_that_raises(rank, world_size):
    net, state = Net(), TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    step(net, state)
    failing = Failing(net.parameters(), lr=0.1)
    for _ in range(2):
        with pytest.raises(KeyError):
            failing.step()  # its post-hooks are not reached
    working = torch.optim.SGD(net.parameters(), lr=0.1)
    working.step()
    return len(hooks_of(failing)), len(hooks_of(working))


def test_a_step_that_raises_leaves_no_hook_behind_either():
    assert ranks.run(1, a_step_that_raises) == [(0, 0)]
