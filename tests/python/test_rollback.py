"""A step that is skipped loses nothing: non-finite gradients and rollback(), through all_reduce_.

Names are used or skipped by themselves: a non-finite one goes back alone. rollback() puts back all of them. (The buckets of a
DDP model go back together: test_non_finite.py.)
"""

from __future__ import annotations

import pytest
import ranks
import stand_in
import torch
import torch.distributed as dist
from contracts import Oracle
from stage_cases import DTYPES, Layout, assert_same_bits, each_value_format, sections_of

from compressed_ddp import TopKEFState, all_reduce_, ops

WORLD_SIZE = 3
SEGMENTS = [1200, 50, 800]  # compressed, dense, compressed
LAYOUT = Layout(SEGMENTS, [0, -1, 1], [60, 40])
NAMES = ("v", "w")
BAD_STEP = 1
VALUES = pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)


def gradient(rank, step, name, dtype, bad=None):
    """bad: (step, rank, name, position, value)"""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + NAMES.index(name))
    tensor = torch.randn(sum(SEGMENTS), generator=generator).to(dtype)
    if bad is not None and (step, rank, name) == bad[:3]:
        tensor[bad[3]] = bad[4]
    return tensor


def reduce_steps(rank, world_size, num_steps, dtype, bad, save_at, rolled_back, value_format):
    state = TopKEFState(
        exchange="allgather",
        density=0.05,
        dense_steps=0,
        min_compress_numel=100,
        value_format=value_format,
    )
    results, saved = [], {}
    for step in range(num_steps):
        reduced = {}
        for name in NAMES:
            tensor = gradient(rank, step, name, dtype, bad)
            reduced[name] = all_reduce_(tensor, state, name=name, segments=SEGMENTS)
        results.append(reduced)
        if step in rolled_back:
            for _ in range(2):  # the second time there is nothing left to give back
                state.rollback()
        if step in save_at:
            saved[step] = state.state_dict()["residuals"]
    return results, saved


def check_against_oracle(
    num_steps, dtype, *, bad=None, save_at=(), rolled_back=(), value_format="bf16"
):
    """Every result and every saved residual of the run equals the oracle's."""
    by_rank = ranks.run(
        WORLD_SIZE, reduce_steps, num_steps, dtype, bad, save_at, rolled_back, value_format
    )
    oracles = {name: Oracle(WORLD_SIZE, LAYOUT, value_format) for name in NAMES}
    for step in range(num_steps):
        for name, oracle in oracles.items():
            expected = oracle.step(
                [gradient(rank, step, name, dtype, bad) for rank in range(WORLD_SIZE)]
            )
            for results, _ in by_rank:
                assert_same_bits(results[step][name], expected)
        if step in rolled_back:
            for oracle in oracles.values():
                oracle.rollback()
        elif bad is not None and step == bad[0]:
            oracles[bad[2]].rollback()  # the other names have been used already
        if step in save_at:
            for rank, (_, saved) in enumerate(by_rank):
                for name, oracle in oracles.items():
                    assert torch.isfinite(saved[step][name]).all()
                    torch.testing.assert_close(
                        saved[step][name], oracle.residuals[rank], rtol=0, atol=0
                    )
    return by_rank, oracles


@VALUES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [7, 1210, 1999], ids=["first", "dense", "last-segment"])
def test_one_non_finite_entry_makes_its_tensor_nan_on_every_rank_and_loses_nothing(
    position, dtype, value
):
    bad = (BAD_STEP, 1, "w", position, value)
    by_rank, _ = check_against_oracle(4, dtype, bad=bad, save_at=(BAD_STEP, 3))
    for results, _ in by_rank:
        assert torch.isnan(results[BAD_STEP]["w"]).all()
        assert torch.isfinite(results[BAD_STEP]["v"]).all()


@each_value_format
def test_a_bad_tensor_is_given_back_at_the_next_step_without_state_dict(value_format):
    bad = (BAD_STEP, 2, "v", 3, torch.nan)
    options = {"bad": bad, "save_at": (3,), "value_format": value_format}
    check_against_oracle(4, torch.float32, **options)


def test_after_a_bad_step_state_dict_holds_the_compensated_values():
    bad = (BAD_STEP, 0, "w", 5, torch.inf)
    by_rank, _ = check_against_oracle(2, torch.float32, bad=bad, save_at=(0, BAD_STEP))
    for rank, (_, saved) in enumerate(by_rank):
        compressed = torch.ones(LAYOUT.numel, dtype=torch.bool)
        compressed[1200:1250] = False
        compensated = saved[0]["w"] + gradient(rank, BAD_STEP, "w", torch.float32, bad)
        expected = torch.where(torch.isfinite(compensated), compensated, saved[0]["w"])
        assert torch.equal(saved[BAD_STEP]["w"][compressed], expected[compressed])


@each_value_format
def test_rollback_restores_what_a_good_step_had_sent(value_format):
    options = {"save_at": (0, 1, 2, 3), "rolled_back": (1,), "value_format": value_format}
    check_against_oracle(4, torch.float32, **options)


@each_value_format
def test_rollback_of_the_first_and_of_two_steps_in_a_row(value_format):
    options = {"save_at": (3,), "rolled_back": (0, 1), "value_format": value_format}
    check_against_oracle(4, torch.float32, **options)


def test_rollback_after_a_bad_step_changes_nothing():
    bad = (BAD_STEP, 1, "w", 7, torch.nan)
    check_against_oracle(3, torch.float32, bad=bad, save_at=(2,), rolled_back=(BAD_STEP,))


def roll_back_nothing(rank, world_size):
    state = TopKEFState(exchange="allgather", density=0.05, dense_steps=1, min_compress_numel=100)
    state.rollback()
    all_reduce_(torch.ones(2000), state, name="w")  # dense
    state.rollback()
    assert state.state_dict()["residuals"] == {}
    return state.step


def test_rollback_without_a_compressed_step_does_nothing():
    assert ranks.run(2, roll_back_nothing) == [1, 1]


def without_error_feedback(rank, world_size):
    state = TopKEFState(exchange="allgather", density=0.05, dense_steps=0, error_feedback=False)
    results = []
    for value in (torch.nan, 1.0, 1.0):
        tensor = torch.ones(2000)
        tensor[0] = value if rank == 1 else 1.0
        results.append(all_reduce_(tensor, state, name="w"))
        state.rollback()
    return results


def test_without_error_feedback_a_bad_step_is_nan_and_the_next_is_good():
    for bad, good, again in ranks.run(2, without_error_feedback):
        assert torch.isnan(bad).all()
        assert good[:100].eq(1.0).all()
        assert not good[100:].any()
        assert_same_bits(again, good)


def overflow_in_the_sum(rank, world_size):
    """Finite on every rank, beyond fp32 in the sum."""
    state = TopKEFState(exchange="allgather", density=0.05, dense_steps=0)
    tensor = torch.zeros(2000)
    tensor[11] = 3e38
    all_reduce_(tensor, state, name="w")
    residual = state.state_dict()["residuals"]["w"]
    return tensor, residual


def test_a_sum_that_overflows_is_the_same_on_every_rank_and_the_step_is_undone():
    for result, residual in ranks.run(2, overflow_in_the_sum):
        assert torch.isinf(result[11])
        assert residual[11] == torch.tensor(3e38)
        assert residual.count_nonzero() == 1


# ---- a peer that sends something else


def meet_a_hostile_peer(rank, world_size, attack):
    """Rank 1 takes part in step 0; in step 1 it sends bytes of its own making where the payload belongs."""
    state = TopKEFState(exchange="allgather", density=0.05, dense_steps=0, min_compress_numel=100)
    all_reduce_(torch.arange(2000.0), state, name="w")
    if rank == 1:
        layout = ([2000], [0], [100])
        indices = torch.arange(100, dtype=torch.int32)
        options = {"rank": 0 if attack == "rank" else 1, "step": 1}
        payload = ops.encode(torch.ones(100), indices, torch.ones(2000), *layout, **options)
        sections = sections_of(payload, Layout(*layout))
        if attack == "index":
            sections["low"][-1] = 98  # as the one before
        if attack == "high bits":
            sections["high"][0] ^= 1
        if attack == "directory":
            sections["directory"].fill_(255)
        if attack == "layout":
            payload[6] ^= 1  # as every other layout
        if attack == "noise":
            payload.random_()
        dist.all_gather_into_tensor(torch.empty(2 * payload.numel(), dtype=torch.uint8), payload)
        return None
    before = state.state_dict()["residuals"]["w"]
    bucket = torch.ones(2000)
    try:
        all_reduce_(bucket, state, name="w")
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    after = state.state_dict()["residuals"]["w"]
    assert_same_bits(bucket, torch.ones(2000))
    assert torch.equal(after, before + 1.0), "what was taken from the residual is back"
    return error


@stand_in.host_contract
@pytest.mark.parametrize(
    ("attack", "words"),
    [
        pytest.param("rank", "rank 1 is not what this rank expects (rank: expected 1", id="rank"),
        pytest.param("index", "(its index bits are no strictly ascending", id="index"),
        pytest.param("high bits", "(its index bits are no strictly ascending", id="high-bits"),
        pytest.param("directory", "(its index bits are no strictly ascending", id="directory"),
        pytest.param("layout", "(layout differs", id="layout"),
        pytest.param(
            "noise",
            "rank 1 is not what this rank expects (wire format version: expected",
            id="noise",
        ),
    ],
)
def test_a_hostile_payload_fails_the_step_and_changes_neither_bucket_nor_residual(attack, words):
    error, _ = ranks.run(2, meet_a_hostile_peer, attack)
    assert words in error
    assert "the bucket that begins with 'w' failed at step 1 on rank 0 of 2" in error
