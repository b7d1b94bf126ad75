"""all_reduce_gradients: a hand-written loop gets what DDP with the hook gets."""

from __future__ import annotations

import copy
import math

import pytest
import ranks
import stand_in
import torch
from contracts import Oracle
from stage_cases import DTYPES, Layout, assert_same_bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, all_reduce_gradients, register, topk_ef_hook
from compressed_ddp._native import _C

DENSITY, MIN_COMPRESS_NUMEL = 0.05, 100


def sparse_state(**options) -> TopKEFState:
    defaults = {
        "density": DENSITY,
        "dense_steps": 0,
        "min_compress_numel": MIN_COMPRESS_NUMEL,
        "exchange": "allgather",
    }
    return TopKEFState(**(defaults | options))


def gradient(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def parameters(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
    return {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in shapes.items()}


SHAPES = {"a": (40, 30), "bias": (50,), "b": (7, 9), "c": (300, 10), "scale": (), "none": (0, 5)}


def oracle_of(shape: tuple[int, ...], world_size: int) -> Oracle:
    numel = math.prod(shape)
    if len(shape) < 2 or numel < MIN_COMPRESS_NUMEL:
        return Oracle(world_size, Layout([numel], [-1], []))
    return Oracle(world_size, Layout([numel], [0], [_C.selection_k(DENSITY, numel)]))


# ---- results


def reduce_steps(rank, world_size, dtype, num_steps):
    named, state = parameters(SHAPES, dtype), sparse_state()
    results = []
    for step in range(num_steps):
        for i, parameter in enumerate(named.values()):
            parameter.grad = gradient(100 * step + 10 * rank + i, *parameter.shape, dtype=dtype)
        pointers = [parameter.grad.data_ptr() for parameter in named.values()]
        all_reduce_gradients(named.items(), state)
        assert pointers == [parameter.grad.data_ptr() for parameter in named.values()]
        results.append([parameter.grad.clone() for parameter in named.values()])
    return results, state.step, state.state_dict()["residuals"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3], ids="ranks={}".format)
def test_every_gradient_becomes_the_average_of_its_own_selection(world_size, dtype):
    num_steps = 3
    by_rank = ranks.run(world_size, reduce_steps, dtype, num_steps)
    for i, (name, shape) in enumerate(SHAPES.items()):
        oracle = oracle_of(shape, world_size)
        for step in range(num_steps):
            gradients = [
                gradient(100 * step + 10 * rank + i, *shape, dtype=dtype).reshape(-1)
                for rank in range(world_size)
            ]
            expected = oracle.step(gradients).view(shape)
            for results, _, _ in by_rank:
                assert_same_bits(results[step][i], expected)
        for rank, (_, steps, residuals) in enumerate(by_rank):
            assert steps == num_steps
            assert residuals.keys() == {"a", "c"}, "1-D and small parameters have no residual"
            if name in residuals:
                assert_same_bits(residuals[name], oracle.residuals[rank].view(shape))


def reduce_three_dtypes(rank, world_size):
    named = {
        f"{name}.{dtype}": nn.Parameter(torch.zeros(40, 30, dtype=dtype))
        for name in ("first", "second")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    state = sparse_state()
    for _ in range(2):
        for parameter in named.values():
            parameter.grad = gradient(rank, 40, 30, dtype=parameter.dtype)
        all_reduce_gradients(named.items(), state)
    gradients = {name: parameter.grad for name, parameter in named.items()}
    return gradients, state.metrics()["compressed_ddp/bytes_sent"]


def test_parameters_of_several_dtypes_travel_in_one_bucket_per_dtype():
    by_rank = ranks.run(2, reduce_three_dtypes)
    for gradients, bytes_sent in by_rank:
        assert bytes_sent == 3 * _C.payload_bytes([1200, 1200, 2], [0, 1, -1], [60, 60], "bf16")
        for reduced in gradients.values():
            dtype = reduced.dtype
            oracle = oracle_of((40, 30), 2)
            flat = [gradient(rank, 40, 30, dtype=dtype).reshape(-1) for rank in range(2)]
            oracle.step(flat)
            assert_same_bits(reduced, oracle.step(flat).view(40, 30))


def reduce_more_than_one_bucket(rank, world_size):
    numel = 3 * 2**20  # 12 MiB each
    named = {f"w{i}": nn.Parameter(torch.zeros(1024, numel // 1024)) for i in range(3)}
    state = sparse_state(density=1e-4)
    for _ in range(2):
        for i, parameter in enumerate(named.values()):
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.view(-1)[1000 * i + rank] = 2.0
        all_reduce_gradients(named.items(), state)
    positions = [named[f"w{i}"].grad.view(-1).nonzero().view(-1).tolist() for i in range(3)]
    values = {float(parameter.grad.sum()) for parameter in named.values()}
    return positions, values, state.metrics()["compressed_ddp/bytes_sent"]


@stand_in.too_slow
def test_a_large_model_travels_in_buckets_of_25_mib():
    numel = 3 * 2**20
    k = _C.selection_k(1e-4, numel)
    two, one = [numel, numel, 2], [numel, 1]
    expected = _C.payload_bytes(two, [0, 1, -1], [k, k], "bf16")
    expected += _C.payload_bytes(one, [0, -1], [k], "bf16")
    for positions, values, bytes_sent in ranks.run(2, reduce_more_than_one_bucket):
        assert positions == [[1000 * i, 1000 * i + 1] for i in range(3)]
        assert values == {2.0}  # 2.0 / 2 from each rank
        assert bytes_sent == expected


# ---- parameters without a gradient


def reduce_with_missing_gradients(rank, world_size, missing_on):
    """b is unused on the ranks of `missing_on` in the second of three steps."""
    named, state = parameters({"a": (40, 30), "b": (30, 20)}), sparse_state()
    results = []
    for step in range(3):
        for i, parameter in enumerate(named.values()):
            parameter.grad = gradient(100 * step + 10 * rank + i, *parameter.shape)
        if step == 1 and rank in missing_on:
            named["b"].grad = None
        before = state.state_dict()["residuals"].get("b", torch.zeros(30, 20))
        all_reduce_gradients(named.items(), state)
        after = state.state_dict()["residuals"]["b"]
        results.append((named["a"].grad, named["b"].grad, before, after))
    return results


@pytest.mark.parametrize("missing_on", [(), (1,), (0, 2), (0, 1, 2)], ids="missing_on={}".format)
def test_a_parameter_without_a_gradient_contributes_zeros_and_its_residual_waits(missing_on):
    by_rank = ranks.run(3, reduce_with_missing_gradients, missing_on)
    oracle = oracle_of((30, 20), 3)
    for step in range(3):
        unused = missing_on if step == 1 else ()
        gradients = [gradient(100 * step + 10 * rank + 1, 600) for rank in range(3)]
        waiting = {rank: oracle.residuals[rank] for rank in unused}
        for rank in unused:  # nothing to send: neither gradient nor residual
            gradients[rank], oracle.residuals[rank] = torch.zeros(600), torch.zeros(600)
        expected = oracle.step(gradients)
        for rank in unused:
            oracle.residuals[rank] = waiting[rank]
        for rank, results in enumerate(by_rank):
            _, reduced, before, after = results[step]
            if len(unused) == 3:
                assert reduced is None
            else:
                assert_same_bits(reduced.reshape(-1), expected)
            assert_same_bits(after.reshape(-1), oracle.residuals[rank])
            if rank in unused:
                assert_same_bits(after, before)


def reduce_dense_with_missing_gradients(rank, world_size):
    named = parameters({"a": (40, 30), "b": (30, 20), "c": (20, 10)})
    for name in ("a", *(["b"] if rank == 0 else [])):
        named[name].grad = torch.full_like(named[name], 2.0)
    all_reduce_gradients(named.items(), sparse_state(dense_steps=1))
    return [None if p.grad is None else p.grad.unique().tolist() for p in named.values()]


def test_missing_gradients_are_handled_in_dense_steps_too():
    assert ranks.run(2, reduce_dense_with_missing_gradients) == [[[2.0], [1.0], None]] * 2


# ---- the same as DDP


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3)
        self.frozen = nn.Linear(16 * 36, 16 * 36)
        self.frozen.requires_grad_(False)
        self.linear = nn.Linear(16 * 36, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(images).relu()
        return self.linear(self.frozen(hidden.flatten(1)) + hidden.flatten(1))


def train_both_ways(rank, world_size, entry, dense_steps, memory_format):
    torch.manual_seed(0)
    net = SmallNet().to(memory_format=memory_format)
    loop_net = copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    ddp_state, loop_state = (sparse_state(dense_steps=dense_steps) for _ in range(2))
    if entry == "cpp":
        register(ddp, ddp_state)
    else:
        ddp.register_comm_hook(ddp_state, topk_ef_hook)
        ddp_state.bind(ddp)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (net, loop_net)]
    for step in range(4):
        images = gradient(10 * step + rank, 8, 3, 8, 8).to(memory_format=memory_format)
        for forward, optimizer in zip((ddp, loop_net), optimizers):
            optimizer.zero_grad()
            forward(images).square().mean().backward()
        all_reduce_gradients(loop_net.named_parameters(), loop_state)
        for (name, one), other in zip(net.named_parameters(), loop_net.parameters()):
            if one.grad is None:
                assert other.grad is None
                assert name.startswith("frozen")
                continue
            assert other.grad.stride() == one.grad.stride()
            assert_same_bits(other.grad, one.grad)
        for optimizer in optimizers:
            optimizer.step()
    left, loop_left = (state.state_dict()["residuals"] for state in (ddp_state, loop_state))
    assert left.keys() == loop_left.keys() == {"convolution.weight", "linear.weight"}
    for name, residual in left.items():
        assert_same_bits(loop_left[name], residual)
    return next(loop_net.parameters()).detach()


@pytest.mark.parametrize("entry", ["python", "cpp"])
@pytest.mark.parametrize("dense_steps", [0, 2], ids="dense_steps={}".format)
@pytest.mark.parametrize(
    "memory_format",
    [
        pytest.param(torch.contiguous_format, id="contiguous"),
        pytest.param(torch.channels_last, id="channels_last"),
    ],
)
def test_a_loop_without_ddp_trains_like_ddp_with_the_hook(memory_format, dense_steps, entry):
    first, second = ranks.run(2, train_both_ways, entry, dense_steps, memory_format)
    assert_same_bits(first, second)


# ---- edges and refusals


def reduce_without_parameters(rank, world_size):
    state = sparse_state()
    frozen = nn.Parameter(torch.ones(40, 30), requires_grad=False)
    all_reduce_gradients([], state)
    all_reduce_gradients([("frozen", frozen)], state)
    return state.step, state.state_dict()["residuals"]


def test_without_parameters_nothing_happens():
    assert ranks.run(2, reduce_without_parameters) == [(0, {})] * 2


def reduce_strided_gradients(rank, world_size):
    named, twin = parameters({"a": (40, 30)}), parameters({"a": (40, 30)})
    state, twin_state = sparse_state(), sparse_state()
    for step in range(2):
        named["a"].grad = gradient(10 * step + rank, 30, 40).t()
        twin["a"].grad = named["a"].grad.contiguous()
        all_reduce_gradients(named.items(), state)
        all_reduce_gradients(twin.items(), twin_state)
        assert_same_bits(named["a"].grad, twin["a"].grad)
    return named["a"].grad.stride()


def test_a_gradient_of_other_strides_than_its_parameter_is_averaged_in_place():
    assert ranks.run(2, reduce_strided_gradients) == [(1, 40)] * 2


def reduce_a_tied_parameter(rank, world_size):
    tied, twin = nn.Parameter(torch.zeros(40, 30)), nn.Parameter(torch.zeros(40, 30))
    state, twin_state = sparse_state(), sparse_state()
    for step in range(3):
        tied.grad, twin.grad = (gradient(10 * step + rank, 40, 30) for _ in range(2))
        all_reduce_gradients([("a", tied), ("b", tied)], state)
        all_reduce_gradients([("a", twin)], twin_state)
        assert_same_bits(tied.grad, twin.grad)
    return state.step, sorted(state.state_dict()["residuals"])


def test_a_tied_parameter_is_reduced_once_under_its_first_name():
    assert ranks.run(2, reduce_a_tied_parameter) == [(3, ["a"])] * 2


def collect_refusals(rank, world_size):
    def refusal(named, state) -> str:
        with pytest.raises((ValueError, TypeError)) as caught:
            all_reduce_gradients(named, state)
        return str(caught.value)

    embedding = nn.Embedding(100, 30, sparse=True)
    embedding(torch.tensor([3, 5])).sum().backward()
    state = sparse_state()
    mine = parameters({"a": (40, 30)})
    mine["a"].grad = torch.ones(40, 30)
    all_reduce_gradients(mine.items(), state)
    other = parameters({"a": (40, 30)})
    double = {"d": nn.Parameter(torch.ones(40, 30, dtype=torch.float64))}
    double["d"].grad = torch.ones(40, 30, dtype=torch.float64)
    return {
        "sparse": refusal(embedding.named_parameters(), sparse_state()),
        "another model": refusal(other.items(), state),
        "one parameter more": refusal([*mine.items(), ("b", other["a"])], state),
        "a name twice": refusal([*mine.items(), ("_orig_mod.a", other["a"])], sparse_state()),
        "parameters": refusal(nn.Linear(3, 4).parameters(), sparse_state()),
        "module": refusal(nn.Linear(3, 4), sparse_state()),
        "dict": refusal(mine, sparse_state()),
        "float64": refusal(double.items(), sparse_state()),
    }


def test_what_cannot_be_reduced_is_refused_in_words():
    (refusals,) = ranks.run(1, collect_refusals)
    assert (
        "expected the gradient of 'weight' to be dense torch.float32 on cpu" in refusals["sparse"]
    )
    assert "torch.sparse_coo" in refusals["sparse"]
    assert "one state serves one model" in refusals["another model"]
    assert "'b' joined the trained parameters after this state" in refusals["one parameter more"]
    expected = "all_reduce_gradients: expected pairs (name, parameter), got "
    for case, words in {
        "parameters": "a Parameter without a name; pass model.named_parameters(), not model.parameters()",
        "module": "Linear; pass model.named_parameters()",
        "dict": "a dict; pass its .items()",
    }.items():
        assert refusals[case] == expected + words
    assert "the name 'a' is used twice" in refusals["a name twice"]
    assert (
        "expected gradients of dtype float32, float16 or bfloat16, got Double"
        in refusals["float64"]
    )


def unfreeze_between_two_steps(rank, world_size):
    net = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 40, bias=False))
    net[0].requires_grad_(False)
    state = sparse_state()
    net(gradient(rank, 2, 40)).sum().backward()
    all_reduce_gradients(net.named_parameters(), state)
    residual = state.state_dict()["residuals"]["1.weight"]
    net[0].requires_grad_(True)
    net(gradient(rank, 2, 40)).sum().backward()
    with pytest.raises(ValueError, match=r"'0\.weight' joined the trained parameters") as caught:
        all_reduce_gradients(net.named_parameters(), state)
    new = sparse_state()  # what the message says
    new.load_state_dict(state.state_dict())
    assert_same_bits(new.state_dict()["residuals"]["1.weight"], residual)
    all_reduce_gradients(net.named_parameters(), new)
    return str(caught.value), new.step, sorted(new.state_dict()["residuals"])


def test_a_layer_that_is_unfrozen_needs_a_new_state_which_takes_the_residuals_over():
    for message, step, names in ranks.run(2, unfreeze_between_two_steps):
        assert "new.load_state_dict(state.state_dict()), on every rank" in message
        assert (step, names) == (2, ["0.weight", "1.weight"])


class DoneWhenEnqueued:
    """The engine and the future of a CUDA device: done at once, and waiting makes the caller's stream wait."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def reduce_parameters(self, flat, parameters, unused):
        self.log.append("reduce")
        return self

    def done(self) -> bool:
        return True

    def value(self) -> None:
        self.log.append("value")

    def wait(self) -> None:
        self.log.append("wait")


def test_no_bucket_waits_for_the_exchange_of_the_one_before(monkeypatch):
    state, engine = sparse_state(), DoneWhenEnqueued()
    monkeypatch.setattr(state, "_engine_with_process_group", lambda: engine)
    tensors = parameters({"a": (40, 30)}) | parameters({"b": (40, 30)}, torch.bfloat16)
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    all_reduce_gradients(tensors.items(), state)
    assert engine.log == ["reduce", "value"] * 2 + ["wait"] * 2
