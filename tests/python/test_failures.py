"""What goes wrong around a step: killed and stalled peers, wrong bytes on the wire, and groups that are gone.

After each of them the residual has lost nothing: it is what the oracle had before the failed step plus this rank's gradient.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import stand_in
import torch
import torch.distributed as dist
from ddp_models import (
    BucketRecorder,
    Case,
    Oracle,
    assert_same_bits,
    both_entries,
    build,
    gradients_on,
    integers,
)
from stage_cases import Layout, indices_of, sections_of, write_indices
from torch import Tensor

from compressed_ddp import TopKEFState, all_reduce_, reference

VICTIM = 1


@dataclasses.dataclass
class Survived:
    """What a rank saw of a step that failed, and of the one after it."""

    message: str
    seconds: float
    residuals: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    message_of_next_step: str = ""
    seconds_of_next_step: float = 0.0


def failing(action: Callable[[], object]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        action()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("the step was to fail")


def assert_nothing_lost(
    survived: Survived, case: Case, rank: int, world_size: int, failed_step: int
) -> None:
    oracle = Oracle(case, world_size)
    for step in range(failed_step):
        oracle.step([case.gradients(r, step) for r in range(world_size)])
    given = case.gradients(rank, failed_step)
    assert survived.residuals.keys() == oracle.residuals[rank].keys()
    for name, residual in survived.residuals.items():
        assert_same_bits(residual + 0.0, oracle.residuals[rank][name] + given[name] + 0.0, name)


def assert_says(message: str, *words: str) -> None:
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    assert "Exception raised from" not in message


def kill(gradient: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_a_peer_dies(
    rank: int, world_size: int, case: Case, fatal_parameter: str
) -> Survived:
    model, state = build(case)
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
    if rank == VICTIM:
        dict(model.module.named_parameters())[fatal_parameter].register_hook(kill)
    model.zero_grad()
    message, seconds = failing(lambda: model(case.gradients(rank, case.steps)).backward())
    survived = Survived(message, seconds, state.state_dict()["residuals"], {})
    survived.message_of_next_step, survived.seconds_of_next_step = failing(
        lambda: model(case.gradients(rank, 9)).backward()
    )
    return survived


@pytest.mark.parametrize(
    "fatal_parameter",
    ["third_bias", "first_weight"],
    ids=["before_its_first_hook", "after_its_first_hook"],
)
@pytest.mark.parametrize("world_size", [2, 3])
@both_entries
def test_a_killed_peer_gives_words_at_once_and_a_residual_that_lost_nothing(
    entry: str, world_size: int, fatal_parameter: str
) -> None:
    case = Case(entry, steps=3, gradients_of=integers, state={"dense_steps": 1})
    outcomes = ranks.run(
        world_size, train_until_a_peer_dies, case, fatal_parameter, allow_death=True
    )
    assert outcomes[VICTIM] == ranks.Died(-signal.SIGKILL)
    for rank, survived in enumerate(outcomes):
        if rank == VICTIM:
            continue
        assert_says(
            survived.message,
            "failed at step 3",
            f"on rank {rank} of {world_size}",
            "another rank has died or is stalled",
            "other ranks' logs",
            r"state\.state_dict\(\)",
        )
        assert_says(survived.message_of_next_step, "failed at step 4")
        assert max(survived.seconds, survived.seconds_of_next_step) < 10, (
            "at once, not after the timeout of the group"
        )
        assert_nothing_lost(survived, case, rank, world_size, failed_step=3)


@both_entries
def test_a_peer_killed_before_the_first_agreement_gives_the_same_words(entry: str) -> None:
    case = Case(entry, steps=0, state={"dense_steps": 0})
    survived, died = ranks.run(2, train_until_a_peer_dies, case, "third_bias", allow_death=True)
    assert died == ranks.Died(-signal.SIGKILL)
    assert_says(
        survived.message,
        "failed at step 0",
        "on rank 0 of 2",
        "another rank has died or is stalled",
    )
    assert survived.seconds < 10
    assert not any(residual.any() for residual in survived.residuals.values()), (
        "nothing was selected yet"
    )


def reduce_with_little_memory_left(rank: int, world_size: int, exchange: str) -> list[str]:
    state = TopKEFState(density=0.01, dense_steps=0, exchange=exchange)
    all_reduce_(torch.ones(5000), state, name="small")
    tensors = {"large": torch.ones(40_000_000), "small": torch.ones(5000)}
    if rank == VICTIM:
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit_bytes = used_bytes + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    return [
        failing(lambda name=name: all_reduce_(tensors[name], state, name=name))[0]
        for name in tensors
    ]


@stand_in.too_slow
@pytest.mark.parametrize("exchange", ["allgather", "split"])
def test_a_bucket_that_never_started_lets_no_later_one_meet_its_peers(exchange: str) -> None:
    """Gloo would abort a process: the peer expects the first bucket's bytes."""
    waited, failed = ranks.run(2, reduce_with_little_memory_left, exchange, group_timeout_s=3)
    assert_says(failed[0], "memory")
    assert_says(
        failed[1], "an earlier exchange has failed on this rank", "'small'", "on rank 1 of 2"
    )
    for message in waited:
        assert_says(message, "another rank has died or is stalled", "on rank 0 of 2")


def reduce_without_costs(rank: int, world_size: int) -> list[str]:
    state = TopKEFState(density=0.01, dense_steps=0, exchange="auto")
    if rank == VICTIM:

        def fails(*_: object) -> None:
            raise MemoryError("no room to measure")

        state._groups.measure_costs = fails
    tensors = [torch.ones(50_000), torch.ones(5000)]
    return [
        failing(lambda n=n, one=one: all_reduce_(one, state, name=f"w{n}"))[0]
        for n, one in enumerate(tensors)
    ]


def test_a_rank_that_cannot_measure_for_auto_lets_no_later_bucket_meet_its_peers() -> None:
    waited, failed = ranks.run(2, reduce_without_costs, group_timeout_s=3)
    assert_says(failed[0], "could not be measured", "no room to measure")
    assert_says(failed[1], "an earlier exchange has failed on this rank", "first error says why")
    assert "another rank" not in failed[1]
    assert_says(waited[0], "could not be measured")
    assert_says(waited[1], "an earlier exchange has failed on this rank")


def train_beside_a_stalled_peer(
    rank: int, world_size: int, case: Case, stalled_s: float
) -> Survived:
    model, state = build(case)
    for step in range(case.steps):
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
    model.zero_grad()
    if rank == VICTIM:
        time.sleep(stalled_s)
    message, seconds = failing(lambda: model(case.gradients(rank, case.steps)).backward())
    return Survived(message, seconds, state.state_dict()["residuals"], {})


@both_entries
def test_a_stalled_peer_is_an_error_after_the_groups_timeout_on_every_rank(entry: str) -> None:
    case = Case(entry, steps=3, gradients_of=integers, state={"dense_steps": 1})
    outcomes = ranks.run(2, train_beside_a_stalled_peer, case, 8.0, group_timeout_s=3.0)
    assert 2.5 < outcomes[0].seconds < 7.5
    for rank, survived in enumerate(outcomes):
        assert_says(
            survived.message,
            "failed at step 3",
            f"on rank {rank} of 2",
            "stalled beyond the process group's timeout",
        )
        assert_nothing_lost(survived, case, rank, 2, failed_step=3)


@dataclasses.dataclass
class Wire:
    """A valid payload, for someone who wants to break it."""

    payload: Tensor  # uint8
    layout: Layout

    def section(self, name: str) -> Tensor:
        return sections_of(self.payload, self.layout)[name]

    def change_indices(self, change: Callable[[list[int]], None]) -> None:
        indices = indices_of(self.payload, self.layout)
        change(indices)
        write_indices(self.payload, self.layout, indices)


def repeat_an_index(wire: Wire) -> None:
    def change(indices: list[int]) -> None:
        indices[1] = indices[0]

    wire.change_indices(change)


def index_in_another_selection(wire: Wire) -> None:
    def change(indices: list[int]) -> None:
        first_of_next = wire.layout.k[0]
        indices[first_of_next - 1] = indices[first_of_next] - 1

    wire.change_indices(change)


def index_behind_the_bucket(wire: Wire) -> None:
    def change(indices: list[int]) -> None:
        indices[-1] = wire.layout.numel

    wire.change_indices(change)


def one_high_bit_less(wire: Wire) -> None:
    high = wire.section("high")
    at = int(high.nonzero()[0])
    high[at] &= high[at] - 1


def one_high_bit_more(wire: Wire) -> None:
    high = wire.section("high")
    at = int((high != 255).nonzero()[0])
    high[at] |= high[at] + 1


def another_directory(wire: Wire) -> None:
    wire.section("directory")[4] ^= 1


def flip(offset: int) -> Callable[[Wire], None]:
    def change(wire: Wire) -> None:
        wire.payload[offset] ^= 1

    return change


def random_bytes(wire: Wire) -> None:
    wire.payload.copy_(
        torch.randint(
            0,
            256,
            wire.payload.shape,
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(1),
        )
    )


def nothing(wire: Wire) -> None:
    pass


def zeros(wire: Wire) -> None:
    wire.payload.zero_()


CORRUPTIONS: dict[str, tuple[Callable[[Wire], None], str]] = {
    "nothing": (nothing, ""),
    "version": (flip(0), "wire format version"),
    "rank": (flip(2), r"rank: expected 1, got 0"),
    "step": (flip(4), "step: expected 3, got 2"),
    "layout": (flip(6), "layout differs"),
    "repeated_index": (repeat_an_index, "strictly ascending"),
    "index_in_another_selection": (index_in_another_selection, "indices of group 0"),
    "index_behind_the_bucket": (index_behind_the_bucket, "indices of group 2"),
    "one_high_bit_less": (one_high_bit_less, "strictly ascending"),
    "one_high_bit_more": (one_high_bit_more, "strictly ascending"),
    "another_directory": (another_directory, "strictly ascending"),
    "zeros": (zeros, "wire format version"),
    "random_bytes": (random_bytes, "wire format version"),
}


def train_beside_a_peer_with_wrong_bytes(
    rank: int, world_size: int, case: Case, corruption: str
) -> Survived | None:
    model, state = build(case)
    recorder = BucketRecorder(case)
    for step in range(case.steps):
        gradients = case.gradients(rank, step)
        [names] = recorder.step(gradients)  # one bucket: the default cap
        model.zero_grad()
        model(gradients).backward()
    model.zero_grad()
    if rank != VICTIM:
        start = time.monotonic()
        try:
            model(case.gradients(rank, case.steps)).backward()
            residuals = state.state_dict()["residuals"]
            state.metrics()  # on CUDA the host learns of it no earlier than at its next call
            message = ""
        except RuntimeError as error:
            message = str(error)
            residuals = state.state_dict()["residuals"]
        return Survived(message, time.monotonic() - start, residuals, gradients_on(model))
    # This rank speaks the protocol by hand.
    segments = [math.prod(case.shapes[name]) for name in names]
    oracle = Oracle(case, world_size)
    groups, k = [], []
    for name, numel in zip(names, segments):
        groups.append(len(k) if oracle.is_compressed(name) else -1)
        k += [oracle.k(numel)] if oracle.is_compressed(name) else []
    given = case.gradients(rank, case.steps)
    gradient = torch.cat([given[name].flatten() for name in names])
    saved = state.state_dict()["residuals"]
    residual = torch.cat(
        [saved.get(name, torch.zeros(case.shapes[name])).flatten() for name in names]
    )
    values, indices, _ = reference.compensate_select_(gradient, residual, segments, groups, k)
    payload = reference.encode(
        values,
        indices,
        gradient,
        segments,
        groups,
        k,
        rank=rank,
        step=case.steps,
    )
    CORRUPTIONS[corruption][0](Wire(payload, Layout(segments, groups, k)))
    dist.all_gather_into_tensor(payload.new_empty(world_size * payload.numel()), payload)
    return None


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@both_entries
def test_wrong_bytes_from_a_peer_are_refused_by_name_and_touch_nothing(
    entry: str, corruption: str
) -> None:
    ddp = {"gradient_as_bucket_view": True}  # .grad is the bucket: it can be seen after a failure
    case = Case(entry, steps=3, gradients_of=integers, ddp=ddp, state={"dense_steps": 0})
    survived, _ = ranks.run(2, train_beside_a_peer_with_wrong_bytes, case, corruption)
    _, words = CORRUPTIONS[corruption]
    if corruption == "nothing":  # the bytes by hand are right when nobody breaks them
        assert survived.message == ""
        oracle = Oracle(case, 2)
        for step in range(4):
            expected = oracle.step([case.gradients(rank, step) for rank in range(2)])
        for name, gradient in survived.gradients.items():
            assert_same_bits(gradient, expected[name], name)
        return
    if stand_in.PATH is not None:  # the CUDA contract: nobody waits for the device to check
        assert_says(
            survived.message, "an earlier payload of rank 1 was not what this rank expected"
        )
        assert all(gradient.isnan().all() for gradient in survived.gradients.values())
    else:
        assert_says(
            survived.message, "the payload of rank 1", words, "on rank 0 of 2", "failed at step 3"
        )
        for name, gradient in survived.gradients.items():
            assert_same_bits(
                gradient, case.gradients(0, 3)[name], f"the bucket of {name} is untouched"
            )
    assert_nothing_lost(survived, case, 0, 2, failed_step=3)


def reduce_after_destroy(rank: int, world_size: int) -> list[str]:
    state = TopKEFState(exchange="allgather", density=0.1, dense_steps=0)
    all_reduce_(torch.ones(64, 64), state, name="weights")
    dist.destroy_process_group()
    return [
        failing(lambda: all_reduce_(torch.ones(64, 64), state, name="weights"))[0] for _ in range(2)
    ]


def test_reducing_after_destroy_process_group_gives_words() -> None:
    for message in ranks.run(2, reduce_after_destroy)[0]:
        assert_says(message, "process group", "init_process_group|new TopKEFState")


def train_across_destroy(rank: int, world_size: int, case: Case) -> list[dict[str, Tensor | None]]:
    model, _ = build(case)
    gradients = []
    for step in range(case.steps):
        if step == 3:
            dist.destroy_process_group()
        model.zero_grad()
        model(case.gradients(rank, step)).backward()
        gradients.append(gradients_on(model))
    return gradients


@both_entries
def test_a_model_keeps_its_group_alive_and_so_the_hook_goes_on_after_destroy_process_group(
    entry: str,
) -> None:
    """As DDP without a hook does: its reducer owns a reference to the group. The engine only borrows it."""
    case = Case(entry)
    seen = ranks.run(2, train_across_destroy, case)
    oracle = Oracle(case, 2)
    for step in range(case.steps):
        expected = oracle.step([case.gradients(rank, step) for rank in range(2)])
        for gradients in seen:
            for name, gradient in gradients[step].items():
                assert_same_bits(gradient, expected[name], f"{name} in step {step}")
