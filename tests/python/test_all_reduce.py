"""all_reduce_: tensors by name, without DDP."""

from __future__ import annotations

import re
import threading

import pytest
import ranks
import torch
from contracts import Oracle
from stage_cases import DTYPES, Layout, assert_same_bits, each_value_format

from compressed_ddp import TopKEFState, all_reduce_
from compressed_ddp._native import _C

SCOPES = pytest.mark.parametrize("scope", ["tensor", "bucket"], ids="scope={}".format)


def gradient(rank: int, step: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7919 * step + rank)
    return torch.randn(*shape, generator=generator).to(dtype)


def sparse_state(**options) -> TopKEFState:
    return TopKEFState(
        **(
            {"density": 0.05, "dense_steps": 0, "min_compress_numel": 100, "exchange": "allgather"}
            | options
        )
    )


def error_of(call, *arguments, **options) -> str:
    """Type and words of what the call raises; "" when it does not."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- results


def reduce_segments(rank, world_size, options, dtype, segments, num_steps):
    state = sparse_state(**options)
    results = []
    for step in range(num_steps):
        tensor = gradient(rank, step, sum(segments), dtype=dtype)
        returned = all_reduce_(tensor, state, name="w", segments=segments)
        assert returned is tensor
        results.append(tensor)
    return results


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
@SCOPES
def test_segments_are_selected_from_as_scope_says_and_short_ones_travel_dense(
    scope, dtype, value_format
):
    segments = [2000, 99, 100, 0, 300]  # min_compress_numel = 100
    layout = {
        "tensor": Layout(segments, [0, -1, 1, -1, 2], [100, 5, 15]),
        "bucket": Layout(segments, [0, -1, 0, -1, 0], [120]),
    }[scope]
    options = {"scope": scope, "value_format": value_format}
    by_rank = ranks.run(2, reduce_segments, options, dtype, segments, 3)
    oracle = Oracle(2, layout, value_format)
    for step in range(3):
        expected = oracle.step([gradient(rank, step, 2499, dtype=dtype) for rank in range(2)])
        for results in by_rank:
            assert_same_bits(results[step], expected)


def reduce_any_memory_layout(rank, world_size):
    """Every entry: the tensors that were reduced and, for each, its flat row-major twin."""
    shapes = {
        "contiguous": lambda base: base,
        "transposed": lambda base: base.transpose(1, 2),
        "every-second": lambda base: base[:, ::2],
        "flat-every-second": lambda base: base.reshape(-1)[::2],
        "one-column": lambda base: base[..., 0],
        "channels_last": lambda base: base[None].contiguous(memory_format=torch.channels_last),
    }
    pairs = {}
    for name, view in shapes.items():
        state, twin_state = sparse_state(), sparse_state()
        for step in range(2):
            tensor = view(gradient(rank, step, 20, 30, 8))
            twin = tensor.reshape(-1).clone()
            strides = tensor.stride()
            all_reduce_(tensor, state, name="w")
            all_reduce_(twin, twin_state, name="w")
            assert tensor.stride() == strides
        pairs[name] = (tensor, twin)
    return pairs


def test_tensors_of_any_memory_layout_are_averaged_in_place_like_their_flat_copies():
    for pairs in ranks.run(2, reduce_any_memory_layout):
        for name, (tensor, twin) in pairs.items():
            assert tensor.count_nonzero() > 0, name
            assert_same_bits(tensor.reshape(-1), twin)


def reduce_a_part_of_a_tensor(rank, world_size):
    whole = gradient(rank, 0, 40, 50)
    before = whole.clone()
    all_reduce_(whole[:, 10:30], sparse_state(), name="part")
    outside = torch.ones(40, 50, dtype=torch.bool)
    outside[:, 10:30] = False
    assert_same_bits(whole[outside], before[outside])
    return whole[:, 10:30].count_nonzero().item()


def test_entries_around_a_view_are_left_alone():
    first, second = ranks.run(2, reduce_a_part_of_a_tensor)
    assert 40 <= first == second <= 80  # k = 40 of 800 on each rank


def reduce_a_long_vector_and_a_short_matrix(rank, world_size):
    state = sparse_state()
    sent = []
    for tensor in (gradient(rank, 0, 4000), gradient(rank, 1, 9, 11)):
        for _ in range(2):  # the second time nothing has to be agreed any more
            all_reduce_(tensor.clone(), state, name=str(tensor.shape))
        sent.append(state.metrics()["compressed_ddp/bytes_sent"])
    return sent


def test_a_long_vector_is_compressed_because_only_parameters_follow_the_1d_rule():
    vector, matrix = ranks.run(2, reduce_a_long_vector_and_a_short_matrix)[0]
    assert vector == _C.payload_bytes([4000], [0], [200], "bf16")
    assert matrix == _C.payload_bytes([99], [-1], [], "bf16")


def reduce_nothing(rank, world_size):
    state = sparse_state()
    for _ in range(2):
        empty = torch.empty(0, 7)
        assert all_reduce_(empty, state, name="empty") is empty
        all_reduce_(torch.empty(0), state, name="cut", segments=[0, 0])
        all_reduce_(torch.empty(0), state, name="no segments", segments=[])
    return state.step


def test_tensors_without_entries_are_reduced_to_themselves():
    assert ranks.run(2, reduce_nothing) == [2, 2]


def reduce_exempt_names(rank, world_size, exempt):
    state = sparse_state(exempt=exempt)
    results = {}
    for name in ("embed.weight", "head.weight"):
        results[name] = all_reduce_(gradient(rank, 0, 30, 40), state, name=name)
    return results


def exempt_embeddings(name: str, tensor: torch.Tensor) -> bool:
    assert tensor.shape == (30, 40)
    return name.startswith("embed")


@pytest.mark.parametrize(
    "exempt",
    [pytest.param(r"^embed\.", id="pattern"), pytest.param(exempt_embeddings, id="predicate")],
)
def test_exempt_names_travel_dense(exempt):
    mean = (gradient(0, 0, 30, 40) + gradient(1, 0, 30, 40)) * 0.5
    for results in ranks.run(2, reduce_exempt_names, exempt):
        assert_same_bits(results["embed.weight"], mean)
        assert results["head.weight"].count_nonzero() <= 2 * 60


# ---- asynchronous


def reduce_at_once(rank, world_size):
    state, async_state = sparse_state(), sparse_state()
    for step in range(2):
        tensors = [gradient(rank, 10 * step + i, 50, 40) for i in range(4)]
        tensors.append(gradient(rank, 10 * step + 9, 50, 40).t())  # not contiguous
        twins = [tensor.clone() for tensor in tensors]
        futures = [
            all_reduce_(tensor, async_state, name=f"w{i}", async_op=True)
            for i, tensor in enumerate(tensors)
        ]
        for i, (future, tensor, twin) in enumerate(zip(futures, tensors, twins)):
            assert isinstance(future, torch._C.Future)  # as Work.get_future()
            assert future.wait() is tensor
            all_reduce_(twin, state, name=f"w{i}")
            assert_same_bits(tensor, twin)
    return state.step, async_state.step


def test_several_tensors_may_be_on_their_way_at_once():
    assert ranks.run(2, reduce_at_once) == [(2, 2), (2, 2)]


def errors_through_the_future(rank, world_size):
    future = all_reduce_(torch.ones(2000).double(), sparse_state(), name="w", async_op=True)
    strided = all_reduce_(torch.ones(2000, 2).double().t(), sparse_state(), name="w", async_op=True)
    return error_of(future.wait), error_of(strided.wait)


def test_an_asynchronous_error_arrives_through_the_future():
    for contiguous, strided in ranks.run(1, errors_through_the_future):
        assert contiguous.startswith("ValueError: compressed_ddp: expected gradients of dtype")
        assert "expected gradients of dtype float32" in strided


# ---- with autograd


def reduce_parameters(rank, world_size):
    parameter = torch.nn.Parameter(gradient(rank, 0, 40, 50))
    strided = torch.nn.Parameter(gradient(rank, 0, 50, 40).t())
    with_grad = error_of(all_reduce_, parameter, sparse_state(), name="w")
    state = sparse_state()
    with torch.no_grad():
        all_reduce_(parameter, state, name="w")
        all_reduce_(strided, state, name="t")
    return with_grad, parameter.count_nonzero().item(), strided.count_nonzero().item()


def test_a_tensor_that_requires_grad_is_reduced_under_no_grad_only():
    for refusal, in_place, strided in ranks.run(2, reduce_parameters):
        assert refusal == (
            "ValueError: all_reduce_: expected a tensor without autograd history; "
            "pass tensor.detach() or use torch.no_grad()"
        )
        assert 100 <= in_place <= 200
        assert 100 <= strided <= 200


# ---- refusals


def collect_refusals(rank, world_size):
    state = sparse_state()
    ones = torch.ones(2000)
    state.bind([("layer.weight", torch.nn.Parameter(torch.ones(40, 50)))])
    all_reduce_(torch.ones(40, 50), state, name="w")
    all_reduce_(torch.ones(2000), state, name="cut", segments=[1500, 500])
    calls = {
        "float64": (ones.double(), {"name": "d"}),
        "int32": (ones.int(), {"name": "i"}),
        "sum": (ones, {"name": "s", "segments": [1000, 999]}),
        "negative": (ones, {"name": "s", "segments": [2001, -1]}),
        "shape": (ones, {"name": "w"}),
        "segments": (ones, {"name": "cut", "segments": [500, 1500]}),
        "whole": (ones, {"name": "cut"}),
        "empty-name": (ones, {"name": ""}),
        "parameter": (torch.ones(40, 50), {"name": "layer.weight"}),
        "list": ([1.0, 2.0], {"name": "n"}),
        "sparse": (torch.ones(40, 50).to_sparse(), {"name": "n"}),
        "expanded": (torch.ones(1, 50).expand(40, 50), {"name": "n"}),
        "name": (ones, {"name": 3}),
        "segments-float": (ones, {"name": "n", "segments": [1000.0, 1000.0]}),
        "segments-number": (ones, {"name": "n", "segments": 2000}),
        "segments-str": (ones, {"name": "n", "segments": "ab"}),
    }
    refusals = {
        case: error_of(all_reduce_, tensor, state, **options)
        for case, (tensor, options) in calls.items()
    }
    assert_same_bits(ones, torch.ones(2000))
    assert state.step == 1, "a refused call is no step"
    return refusals


REFUSALS = {
    "float64": "ValueError: compressed_ddp: expected gradients of dtype float32, float16 or bfloat16, got Double; leave",
    "int32": "ValueError: compressed_ddp: expected gradients of dtype float32, float16 or bfloat16, got Int; leave",
    "sum": "ValueError: all_reduce_: expected segments to add up to the tensor's numel 2000, got [1000, 999]",
    "negative": "ValueError: all_reduce_: expected segments to add up to the tensor's numel 2000, got [2001, -1]",
    "shape": "ValueError: all_reduce_: the name 'w' stands for a tensor of shape [40, 50] in 1 segments, but now has shape [2000]",
    "segments": "ValueError: all_reduce_: the name 'cut' stands for a tensor of shape [2000]",
    "whole": "in 2 segments, but now has shape [2000] in 1 segments; use another name, or state.reset()",
    "empty-name": "ValueError: all_reduce_: expected a non-empty name",
    "parameter": "ValueError: all_reduce_: the name 'layer.weight' belongs to a parameter of the bound model; use another name",
    "list": "TypeError: all_reduce_: expected a tensor, got list; give the tensors of a list a name and a call each",
    "sparse": "ValueError: all_reduce_: expected a dense tensor, got torch.sparse_coo; pass tensor.to_dense()",
    "expanded": "ValueError: all_reduce_: expected a tensor whose entries have memory of their own",
    "name": "TypeError: all_reduce_: expected name to be a str, the same in every step and on every rank, got 3",
    "segments-float": "TypeError: all_reduce_: expected segments to be a list of ints, the numels of what lies in the tensor, got [1000.0",
    "segments-number": "TypeError: all_reduce_: expected segments to be a list of ints, the numels of what lies in the tensor, got 2000",
    "segments-str": "TypeError: all_reduce_: expected segments to be a list of ints, the numels of what lies in the tensor, got 'ab'",
}


def test_what_cannot_be_reduced_is_refused_in_words():
    (refusals,) = ranks.run(1, collect_refusals)
    assert refusals.keys() == REFUSALS.keys()
    for case, words in REFUSALS.items():
        assert words in refusals[case], case


def test_without_a_process_group_the_error_says_how_to_make_one():
    with pytest.raises(RuntimeError, match=re.escape("torch.distributed.init_process_group")):
        all_reduce_(torch.ones(10), TopKEFState(), name="w")


# ---- steps and density


def count_steps(rank, world_size, dense_steps):
    state = TopKEFState(
        exchange="allgather", density=0.05, dense_steps=dense_steps, min_compress_numel=100
    )
    counts = []
    for _ in range(dense_steps + 2):
        for name in ("a", "b"):
            result = all_reduce_(torch.arange(1000.0) + 1, state, name=name)
            counts.append((state.step, result.count_nonzero().item()))
    return counts


@pytest.mark.parametrize("dense_steps", [0, 1, 3], ids="dense_steps={}".format)
def test_a_step_begins_when_a_name_comes_again_and_the_first_ones_are_dense(dense_steps):
    entries = [1000] * dense_steps + [50, 50]
    expected = [(step + 1, n) for step, n in enumerate(entries) for _ in range(2)]
    assert ranks.run(2, count_steps, dense_steps) == [expected, expected]


def follow_a_schedule(rank, world_size):
    asked = []

    def density(step: int) -> float:
        asked.append(step)
        return 0.5 / 2**step

    state = TopKEFState(
        exchange="allgather", density=density, dense_steps=1, min_compress_numel=100
    )
    sent = []
    for _ in range(4):
        for name in ("a", "b"):
            sent.append(all_reduce_(torch.arange(1000.0) + 1, state, name=name).count_nonzero())
    return asked, [int(count) for count in sent]


def test_a_callable_density_is_asked_once_in_every_compressed_step():
    asked, sent = ranks.run(2, follow_a_schedule)[0]
    assert asked == [1, 2, 3]
    # The residual of ascending values sends others every time; all ranks hold the same here.
    assert sent == [1000, 1000, 250, 250, 125, 125, 63, 63]


def let_the_density_look_at_its_state(rank, world_size):
    def density(step: int) -> float:
        captured = state.metrics()["compressed_ddp/captured_energy"]
        return 0.5 if step == 0 or captured < 0.5 else 0.25

    state = TopKEFState(
        exchange="allgather", density=density, dense_steps=0, min_compress_numel=100
    )
    return [
        int(all_reduce_(torch.arange(1000.0) + 1, state, name="w").count_nonzero())
        for _ in range(2)
    ]


def look_from_another_thread(rank, world_size):
    """AdamW's look at a state, while the hook of that state waits for the GIL."""
    asked, looked = threading.Event(), threading.Event()

    def density(step: int) -> float:
        asked.set()
        looked.wait(0.3)  # without the GIL; nobody sets it
        return 0.1

    state = TopKEFState(exchange="allgather", density=density, dense_steps=0)
    hook = threading.Thread(target=lambda: all_reduce_(torch.ones(5000), state, name="w"))
    hook.start()
    assert asked.wait(10)
    seen = [state._engine.has_compressed(), state._engine.is_bound()]
    hook.join()
    return seen


def test_another_thread_may_look_at_a_state_whose_hook_waits_for_the_gil():
    assert ranks.run(1, look_from_another_thread) == [[True, False]]


def test_a_callable_density_may_ask_its_state():
    assert ranks.run(2, let_the_density_look_at_its_state) == [[500, 250]] * 2


def disagree(rank, world_size, density, dense_steps):
    state = TopKEFState(
        exchange="allgather", density=lambda step: density(rank, step), dense_steps=dense_steps
    )
    errors = []
    for _ in range(3):
        tensor = torch.ones(2000)
        errors.append(error_of(all_reduce_, tensor, state, name="w"))
        if errors[-1]:
            assert_same_bits(tensor, torch.ones(2000))
    return errors


def differing_from_step_2(rank: int, step: int) -> float:
    return 0.01 if rank == 0 or step < 2 else 0.02


def raising(rank: int, step: int) -> float:
    raise KeyError("no density today")


def out_of_range(rank: int, step: int) -> float:
    return 1.5


def not_a_number(rank: int, step: int) -> float:
    return torch.nan


def of_another_type(rank: int, step: int):
    return "0.01"


def test_a_density_that_differs_by_rank_is_an_error_on_every_rank():
    for errors in ranks.run(3, disagree, differing_from_step_2, 0):
        assert errors[:2] == ["", ""]
        assert (
            "the ranks disagree before the exchange of the bucket that begins with 'w'" in errors[2]
        )
        assert "density: rank 0 has 0.01, rank 1 has 0.02, rank 2 has 0.02" in errors[2]
        assert "Nothing was sent and no residual changed" in errors[2]


@pytest.mark.parametrize(
    ("density", "words"),
    [
        pytest.param(raising, "TopKEFState: density(1) raised KeyError: 'no density", id="raises"),
        pytest.param(out_of_range, "density(1) must be in (0, 1], got 1.5", id="out-of-range"),
        pytest.param(not_a_number, "density(1) must be in (0, 1], got nan", id="nan"),
        pytest.param(of_another_type, "density(1) must return a number", id="another-type"),
    ],
)
def test_a_density_that_fails_is_an_error_in_words(density, words):
    for errors in ranks.run(2, disagree, density, 1):
        assert errors[0] == ""
        assert words in errors[1]
