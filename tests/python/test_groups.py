"""The process groups that an exchange makes for itself, beside those of the caller."""

from __future__ import annotations

import gc
import inspect
import threading
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from compressed_ddp import AutoExchange, TopKEFState, all_reduce_

# A torch that names such groups by how many the rank is in already: then groups of some ranks, anybody's, keep the others from meeting.
counts_own_groups = "len(_world.pg_names)" in "".join(
    line
    for line in inspect.getsource(distributed_c10d._hash_ranks_to_str).splitlines()
    if not line.lstrip().startswith("#")
)
exchanges_with_groups = pytest.mark.parametrize("exchange", ["split", "hierarchical"])


def state_with(exchange: str, group: dist.ProcessGroup | None = None) -> TopKEFState:
    nodes = {"ranks_per_node": 2} if exchange == "hierarchical" else {}
    return TopKEFState(group, density=0.1, dense_steps=0, exchange=exchange, **nodes)


def assert_a_tenth_was_sent(total: float, value: float) -> None:
    """Of 4,096 entries of this value; of each range or shard one more at most."""
    assert 410 * value <= total < 415 * value


def reduce_on_one_half(rank: int, world_size: int, exchange: str) -> list[float]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    seen = []
    if rank < 2:
        state = state_with(exchange, halves[0])
        seen.append(all_reduce_(torch.full((4096,), float(rank)), state, name="w").sum().item())
    # Names of groups come from counters of each rank: these must not have noticed.
    groups = [dist.new_group([0, 1, 2, 3])]
    if rank in (0, 3) and not counts_own_groups:
        groups.append(dist.new_group([0, 3], use_local_synchronization=True))
    for group in groups:
        ones = torch.ones(1)
        dist.all_reduce(ones, group=group)
        seen.append(ones.item())
    later = state_with(exchange)
    seen.append(all_reduce_(torch.ones(4096), later, name="v").sum().item())
    return seen


@exchanges_with_groups
def test_groups_of_an_exchange_of_some_ranks_disturb_no_group_of_the_callers(exchange: str) -> None:
    by_rank = ranks.run(4, reduce_on_one_half, exchange, group_timeout_s=10)
    for rank, seen in enumerate(by_rank):
        assert_a_tenth_was_sent(seen.pop(), 1)
        if rank < 2:
            assert_a_tenth_was_sent(seen.pop(0), 0.5)
        assert seen == ([4.0, 2.0] if rank in (0, 3) and not counts_own_groups else [4.0])


def reduce_behind_uneven_groups(rank: int, world_size: int, exchange: str) -> float:
    if rank < 2:  # the ranks' counters differ from here on
        dist.new_group([0, 1], use_local_synchronization=True)
    return all_reduce_(torch.ones(4096), state_with(exchange), name="w").sum().item()


@exchanges_with_groups
def test_an_exchange_finds_its_peers_where_ranks_have_made_unequally_many_groups(
    exchange: str,
) -> None:
    for total in ranks.run(4, reduce_behind_uneven_groups, exchange, group_timeout_s=10):
        assert_a_tenth_was_sent(total, 1)


def reduce_in_another_order(rank: int, world_size: int, exchange: str) -> list[torch.Tensor]:
    group = dist.new_group([2, 0, 3, 1], sort_ranks=False)
    assert dist.get_group_rank(group, rank) == [1, 3, 0, 2][rank]
    state, averages = state_with(exchange, group), []
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        values = torch.randint(-50, 51, (4096,), generator=generator).float()
        averages.append(all_reduce_(values, state, name="w"))
    return averages


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters,
    reason="this torch makes groups in ascending order only",
)
@exchanges_with_groups
def test_a_group_may_have_its_ranks_in_any_order(exchange: str) -> None:
    by_rank = ranks.run(4, reduce_in_another_order, exchange, group_timeout_s=10)
    for averages in by_rank[1:]:
        assert all(torch.equal(a, b) for a, b in zip(averages, by_rank[0]))
    assert all(average.any() for average in by_rank[0])


def reduce_in_two_threads(rank: int, world_size: int) -> tuple[list[float], bool]:
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    torchs_own = distributed_c10d._process_group_name
    sums: list[float] = [0.0, 0.0]

    def reduce(index: int) -> None:
        if index != rank:
            time.sleep(0.5)  # the ranks make the two groups in different orders
        state = state_with("split", groups[index])
        sums[index] = all_reduce_(torch.ones(4096), state, name="w").sum().item()

    threads = [threading.Thread(target=reduce, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sums, distributed_c10d._process_group_name is torchs_own


def test_two_states_may_make_their_groups_in_two_threads() -> None:
    for sums, is_restored in ranks.run(2, reduce_in_two_threads, group_timeout_s=10):
        for total in sums:
            assert_a_tenth_was_sent(total, 1)
        assert is_restored


def wait_without_the_state(rank: int, world_size: int, exchange: str) -> list[float]:
    state = state_with(exchange)
    futures = [
        all_reduce_(torch.ones(100_000), state, name=str(n), async_op=True) for n in range(20)
    ]
    del state
    gc.collect()
    return [future.wait().sum().item() for future in futures]


@pytest.mark.parametrize("exchange", ["allgather", "split", "hierarchical"])
def test_futures_keep_the_groups_that_they_need(exchange: str) -> None:
    for sums in ranks.run(4, wait_without_the_state, exchange):
        assert len(sums) == 20
        for total in sums:
            assert 10_000 <= total < 10_005


def costs_of_two_states(rank: int, world_size: int) -> list[object]:
    costs = []
    for _ in range(2):
        state = TopKEFState(density=0.1, dense_steps=0, exchange=AutoExchange())
        all_reduce_(torch.ones(4096), state, name="w")
        costs.append(state.exchange_costs())
    return costs


def test_costs_are_measured_once_per_process_group() -> None:
    by_rank = ranks.run(2, costs_of_two_states)
    (first, second), others = by_rank[0], by_rank[1:]
    assert first is not None and first == second
    assert others == [[first, second]]
