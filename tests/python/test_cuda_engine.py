"""What only the CUDA path has, on the stand-in: late reports, CUDA graphs, and the streams that it meets.

Graphs are those of the stand-in runtime: what is enqueued during a capture runs at each replay, and only then.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import stand_in
import torch
import torch.distributed as dist
from torch import Tensor, nn

from compressed_ddp import (
    AutoExchange,
    ExchangeCosts,
    TopKEFState,
    all_reduce_,
    all_reduce_gradients,
)
from compressed_ddp._native import _C

pytestmark = pytest.mark.skipif(
    stand_in.PATH is None, reason="COMPRESSED_DDP_STAND_IN names no module"
)

NUMEL = 5000
K = 500
SHAPE = (50, 100)
OPTIONS: dict[str, Any] = {"density": 0.1, "dense_steps": 0, "exchange": "allgather"}


class Runtime:
    """The stand-in runtime, by its exported functions."""

    def __init__(self) -> None:
        library = ctypes.CDLL(_C.__file__)
        self._call: Callable[[str], Any] = lambda name: getattr(
            library, f"compressed_ddp_stand_in_{name}"
        )

    def calls(self) -> int:
        function = self._call("calls")
        function.restype = ctypes.c_uint64
        return int(function())

    def switch(self, on: bool) -> None:
        self._call("switch")(ctypes.c_int(on))

    def delay(self, tensor: Tensor) -> None:
        memory = ctypes.c_void_p(tensor.data_ptr())
        self._call("delay")(memory, ctypes.c_uint64(tensor.nbytes))

    def holds(self, tensor: Tensor) -> bool:
        return bool(self._call("is_held")(ctypes.c_void_p(tensor.data_ptr())))

    def refuse_launch(self, which: int) -> None:
        self._call("refuse_launch")(ctypes.c_uint64(which))

    def capture(self, function: Callable[[], object]) -> None:
        self._call("begin_capture")()
        try:
            function()
        finally:
            self._call("end_capture")()

    def replay(self) -> None:
        self._call("replay")()


def gradient(rank: int, step: int, *, bad: bool = False, whole: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    values = torch.randint(-50, 51, SHAPE, generator=generator).float()
    if not whole:  # bf16 does not hold them: rounding loses something
        values += torch.randn(SHAPE, generator=generator)
    if bad and rank == 1:
        values[0, 0] = math.inf
    return values


def message_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


class Model:
    """One parameter, averaged by all_reduce_gradients: its reports are those of a model's buckets."""

    def __init__(self, **options: Any) -> None:
        self.parameter = nn.Parameter(torch.zeros(SHAPE))
        self.state = TopKEFState(**(OPTIONS | options))

    def step(self, grad: Tensor | None) -> Tensor | None:
        self.parameter.grad = grad
        all_reduce_gradients([("w", self.parameter)], self.state)
        return self.parameter.grad

    def residual(self) -> Tensor:
        return self.state.state_dict()["residuals"]["w"]


# ---- reports


def steps_after_a_load(rank: int, world_size: int, back: str, bad: bool) -> list[Tensor]:
    model = Model()
    model.step(gradient(rank, 0))
    saved = model.state.state_dict()
    model.step(gradient(rank, 1, bad=bad))
    if back == "load":
        model.state.load_state_dict(saved)
    else:
        model.state.reset()
    results = [model.step(gradient(rank, step)) for step in (2, 3, 4)]
    return [*results, model.residual()]


@pytest.mark.parametrize("back", ["load", "reset"])
def test_what_a_bad_step_left_on_the_device_ends_with_load_and_reset(back: str) -> None:
    after_bad, after_good = (ranks.run(2, steps_after_a_load, back, bad) for bad in (True, False))
    for seen, expected in zip(after_bad, after_good):
        assert all(torch.equal(a, b) for a, b in zip(seen, expected))


def send_garbage(layout: tuple[list[int], list[int], list[int]]) -> None:
    payload = torch.zeros(_C.payload_bytes(*layout, "bf16"), dtype=torch.uint8)
    dist.all_gather_into_tensor(payload.new_empty(2 * payload.numel()), payload)


def damaged_then_loaded(rank: int, world_size: int) -> str:
    model = Model()
    model.step(gradient(rank, 0))
    if rank == 1:
        send_garbage(([NUMEL, 1], [0, -1], [K]))
        return ""
    saved = model.state.state_dict()
    model.step(gradient(rank, 1))
    model.state.load_state_dict(saved)
    return message_of(model.state.metrics)


def test_a_load_forgets_a_damaged_payload_that_was_not_reported_yet() -> None:
    assert ranks.run(2, damaged_then_loaded)[0] == ""


def damaged_under_a_name(rank: int, world_size: int) -> tuple[list[str], Tensor] | None:
    state = TopKEFState(**OPTIONS)
    all_reduce_(gradient(rank, 0), state, name="w")
    if rank == 1:
        send_garbage(([NUMEL], [0], [K]))
        return None
    before = state.state_dict()["residuals"]["w"]
    all_reduce_(gradient(rank, 1), state, name="w")
    messages = [
        message_of(lambda: all_reduce_(gradient(rank, 2), state, name="w")),
        message_of(state.metrics),
        message_of(lambda: all_reduce_(gradient(rank, 3), state, name="w")),
    ]
    return messages, state.state_dict()["residuals"]["w"] - before - gradient(rank, 1)


def test_a_damaged_payload_is_raised_once_by_the_next_all_reduce_of_the_same_name() -> None:
    (first, second, third), lost = ranks.run(2, damaged_under_a_name)[0]
    assert "an earlier payload of rank 1" in first
    assert second == ""
    assert "an earlier exchange has failed on this rank" in third  # others hear at other calls
    assert not lost.any()


# ---- a selection that stops halfway


def refused_launch(which: int) -> tuple[str, list[Tensor]]:
    state = TopKEFState(**OPTIONS)
    all_reduce_(gradient(0, 0), state, name="w")
    Runtime().refuse_launch(which)
    lost = gradient(
        0, 1
    )  # read until the stream is waited for: on a GPU its allocator would hold it
    message = message_of(lambda: all_reduce_(lost, state, name="w"))
    before = state.state_dict()["residuals"]["w"]
    sent = all_reduce_(gradient(0, 2), state, name="w")
    return message, [before, sent, state.state_dict()["residuals"]["w"]]


def refused_launches(rank: int, world_size: int) -> list[tuple[str, list[Tensor]]]:
    return [refused_launch(which) for which in range(2, 8)]  # the first launch is restore


def test_a_selection_that_was_refused_halfway_leaves_a_workspace_for_the_next_one() -> None:
    refused = []
    for message, (before, sent, after) in ranks.run(1, refused_launches)[0]:
        refused.append(message.split(":")[1].strip())
        assert torch.equal(sent + after, before + gradient(0, 2))
        assert torch.count_nonzero(sent) == K
        assert sent[sent != 0].abs().min() >= after.abs().max()
    stages = ["guess", "filter", "histogram, again", "filter, again", "refine", "emit"]
    assert refused == [f"compensate_select_{stage}" for stage in stages]


def refused_in_the_second_range(rank: int, world_size: int) -> tuple[str, Tensor, Tensor]:
    state = TopKEFState(**(OPTIONS | {"exchange": "split"}))
    all_reduce_(gradient(rank, 0), state, name="w")
    before = state.state_dict()["residuals"]["w"]
    Runtime().refuse_launch(6)  # the first of the second range
    lost = gradient(rank, 1)
    message = message_of(lambda: all_reduce_(lost, state, name="w"))
    return message, before + gradient(rank, 1), state.state_dict()["residuals"]["w"]


def test_what_the_first_range_had_sent_comes_back_when_the_second_one_is_refused() -> None:
    for message, expected, residual in ranks.run(2, refused_in_the_second_range):
        assert "compensate_select_small" in message
        first_range = NUMEL // 2 - 64  # less than that
        assert torch.equal(residual.view(-1)[:first_range], expected.view(-1)[:first_range])


def refused_on_one_rank(rank: int, world_size: int) -> list[str]:
    state = TopKEFState(**OPTIONS)
    all_reduce_(gradient(rank, 0), state, name="w")
    if rank == 1:
        Runtime().refuse_launch(3)
    lost = [gradient(rank, 1), gradient(rank, 2)]  # as above
    messages = [message_of(lambda one=one: all_reduce_(one, state, name="w")) for one in lost]
    state.state_dict()  # waits for the stream, which reads them
    return messages


def test_a_selection_that_was_refused_on_one_rank_lets_no_later_collective_meet_its_peers() -> None:
    waited, refused = ranks.run(2, refused_on_one_rank, group_timeout_s=3)
    assert "compensate_select_" in refused[0]
    assert "an earlier exchange has failed on this rank" in refused[1]
    assert all("another rank has died or is stalled" in message for message in waited)


def refused_decode(rank: int, world_size: int) -> tuple[list[str], Tensor, Tensor]:
    state, messages = TopKEFState(**OPTIONS), []
    all_reduce_(gradient(rank, 0), state, name="w")
    before = state.state_dict()["residuals"]["w"]
    Runtime().refuse_launch(8)
    lost = gradient(rank, 1)
    messages.append(message_of(lambda: all_reduce_(lost, state, name="w")))
    capture = lambda: all_reduce_(gradient(rank, 2), state, name="w")  # noqa: E731
    Runtime().capture(lambda: messages.append(message_of(capture)))
    return messages, before + gradient(rank, 1), state.state_dict()["residuals"]["w"]


def test_a_step_that_failed_after_its_selection_gives_back_and_no_graph_begins_behind_it() -> None:
    (failed, refused), expected, residual = ranks.run(1, refused_decode)[0]
    assert "decode_apply" in failed
    assert "a CUDA graph cannot begin behind a failed step" in refused
    assert torch.equal(residual, expected)


# ---- streams


def delayed(rank: int, world_size: int, is_late: bool, dense_steps: int) -> Tensor:
    state = TopKEFState(exchange="allgather", density=0.1, dense_steps=dense_steps)
    for step in range(2):
        tensor = gradient(rank, step)
        if is_late:
            Runtime().delay(tensor)
        all_reduce_(tensor, state, name="w")
    return tensor


@pytest.mark.parametrize("dense_steps", [0, 2], ids=["compressed", "dense"])
def test_the_stages_wait_for_what_the_callers_stream_holds(dense_steps: int) -> None:
    late, early = (ranks.run(2, delayed, is_late, dense_steps) for is_late in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(late, early))


def held(rank: int, world_size: int) -> list[bool]:
    state = TopKEFState(exchange="allgather", density=0.1, dense_steps=1)
    seen = []
    for step in range(2):
        tensor = gradient(rank, step)
        seen.append(Runtime().holds(tensor))
        all_reduce_(tensor, state, name="w")
        seen.append(Runtime().holds(tensor))
    return [seen[1], seen[3]]


def test_the_allocator_hears_that_the_stages_use_a_bucket() -> None:
    assert ranks.run(2, held) == [[True, True]] * 2


def through_both_engines(rank: int, world_size: int, switched: bool) -> list[Tensor]:
    state = TopKEFState(**OPTIONS)
    results = []
    for step, on in enumerate([False, True, False, True]):
        if switched:
            Runtime().switch(on)
        results.append(all_reduce_(gradient(rank, step, bad=step == 1), state, name="w"))
    return [*results, state.state_dict()["residuals"]["w"]]


def test_a_name_may_come_from_the_host_and_from_the_device_in_turn() -> None:
    for seen, expected in zip(
        ranks.run(2, through_both_engines, True), ranks.run(2, through_both_engines, False)
    ):
        for a, b in zip(seen, expected):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


# ---- metrics


def calls_of_metrics(rank: int, world_size: int, names: int) -> int:
    state = TopKEFState(**OPTIONS)
    for name in range(names):
        all_reduce_(gradient(rank, name), state, name=str(name))
    state.metrics()
    before = Runtime().calls()
    state.metrics()
    return Runtime().calls() - before


def test_metrics_wait_once_for_all_buckets() -> None:
    one, three = (ranks.run(1, calls_of_metrics, names)[0] for names in (1, 3))
    assert three - one == 2  # a copy each, and no wait of its own


# ---- CUDA graphs


def run_script(
    rank: int, world_size: int, script: str, graph: bool, options: dict[str, Any]
) -> Any:
    """One letter each: g a good step, b a bad one, e a good one that is not replayed; r rollback(), s state_dict(), m metrics()."""
    state = TopKEFState(**(OPTIONS | options))
    runtime, static = Runtime(), torch.zeros(SHAPE)
    all_reduce_(gradient(rank, 0, whole=False), state, name="w")
    if graph:
        runtime.capture(lambda: all_reduce_(static, state, name="w"))
    seen = []
    for step, letter in enumerate(script, start=1):
        if letter in "gbe":
            static.copy_(gradient(rank, step, bad=letter == "b", whole=False))
            if graph and letter != "e":
                runtime.replay()
            else:
                all_reduce_(static, state, name="w")
            seen.append(static.clone())
        elif letter == "r":
            state.rollback()
        elif letter == "m":
            norms = (
                state.metrics()[f"compressed_ddp/{key}_norm"] for key in ("gradient", "residual")
            )
            seen.append(torch.tensor(list(norms)))
        else:
            seen += state.state_dict()["residuals"].values()
    return [*seen, *state.state_dict()["residuals"].values()]


@pytest.mark.parametrize(
    "script", ["gggs", "gbgg", "gbsgg", "grgbgg", "gbsrggsg", "bsbsgg", "gbegeg", "gmgmrmegm"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"exchange": "allgather"},
        {"exchange": "split"},
        {"exchange": "split", "value_format": "sign"},
        {"exchange": "hierarchical", "ranks_per_node": 1},
    ],
    ids=["allgather", "split", "split-sign", "hierarchical"],
)
def test_replays_give_back_what_eager_steps_would(script: str, options: dict[str, Any]) -> None:
    for seen, expected in zip(
        ranks.run(2, run_script, script, True, options),
        ranks.run(2, run_script, script, False, options),
    ):
        for a, b in zip(seen, expected, strict=True):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def test_a_step_without_error_feedback_can_be_captured() -> None:
    options = {"error_feedback": False}
    seen, expected = (ranks.run(2, run_script, "gg", graph, options) for graph in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected[0], strict=True))


def half(step: int) -> float:
    return 0.5


def capture_too_early(rank: int, world_size: int, options: dict[str, Any]) -> str:
    state = TopKEFState(**(OPTIONS | options))
    runtime, messages = Runtime(), []
    runtime.capture(
        lambda: messages.append(message_of(lambda: all_reduce_(gradient(rank, 0), state, name="w")))
    )
    all_reduce_(gradient(rank, 0), state, name="w")  # and eagerly it goes on
    return messages[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a CUDA graph cannot hold a bucket's first compressed step"),
        ({"dense_steps": 1}, "a CUDA graph cannot hold a dense step"),
        ({"density": 0.5}, "a CUDA graph cannot hold a bucket's first compressed step"),
        ({"exchange": "dense"}, "a CUDA graph cannot hold a bucket that travels dense"),
        ({"density": half}, "a CUDA graph cannot follow a callable density"),
    ],
    ids=["first", "dense", "another_density", "dense_exchange", "callable_density"],
)
def test_what_a_graph_cannot_hold_is_refused_with_words(
    options: dict[str, Any], words: str
) -> None:
    for message in ranks.run(1, capture_too_early, options):
        assert words in message


def capture_after_a_choice(rank: int, world_size: int) -> tuple[str, str]:
    costs = ExchangeCosts(1e-6, 1e-12, 1e-6, 1e-6, 1e-6)  # a network much faster than the stages
    state = TopKEFState(**(OPTIONS | {"exchange": AutoExchange(costs=costs)}))
    all_reduce_(gradient(rank, 0), state, name="w")
    (choice,) = state.exchange_choices()
    runtime, messages = Runtime(), []
    capture = lambda: all_reduce_(gradient(rank, 1), state, name="w")  # noqa: E731
    runtime.capture(lambda: messages.append(message_of(capture)))
    return choice["exchange"], messages[0]


def test_what_auto_has_found_to_travel_dense_cannot_be_captured() -> None:
    for exchange, message in ranks.run(2, capture_after_a_choice):
        assert exchange == "dense"
        assert "a CUDA graph cannot hold a bucket that travels dense" in message


def capture_with_other_unused_parameters(rank: int, world_size: int) -> list[str]:
    model, runtime = Model(), Runtime()
    model.step(gradient(rank, 0))
    messages = []
    runtime.capture(lambda: messages.append(message_of(lambda: model.step(None))))
    model.step(gradient(rank, 1))
    model.step(gradient(rank, 2, bad=True))
    model.step(None)
    runtime.capture(lambda: messages.append(message_of(lambda: model.step(None))))
    return messages


def test_a_graph_cannot_hold_a_step_with_other_unused_parameters() -> None:
    first, second = ranks.run(1, capture_with_other_unused_parameters)[0]
    assert "other unused parameters than the step before" in first
    assert second == ""


def change_a_captured_state(rank: int, world_size: int) -> list[str]:
    state, static = TopKEFState(**OPTIONS), gradient(rank, 0)
    all_reduce_(static, state, name="w")
    saved = state.state_dict()
    Runtime().capture(lambda: all_reduce_(static, state, name="w"))
    state.state_dict()
    return [
        message_of(state.reset),
        message_of(lambda: state.load_state_dict(saved)),
        message_of(lambda: all_reduce_(static.bfloat16(), state, name="w")),
    ]


def test_what_would_free_the_buffers_of_a_graph_is_refused() -> None:
    reset, load, rebuilt = ranks.run(1, change_a_captured_state)[0]
    assert reset.startswith("TopKEFState.reset: a CUDA graph holds the buffers")
    assert load.startswith("TopKEFState.load_state_dict: a CUDA graph holds the buffers")
    assert "a CUDA graph holds the buffers" in rebuilt
