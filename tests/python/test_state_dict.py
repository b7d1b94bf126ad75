"""state_dict and load_state_dict: what is saved, what is refused, and that a resumed run does not differ from an unbroken one."""

from __future__ import annotations

import io
import re
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
from stage_cases import assert_same_bits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import TopKEFState, all_reduce_, all_reduce_gradients, register

OPTIONS = {"density": 0.05, "dense_steps": 1, "min_compress_numel": 100, "exchange": "allgather"}


def saved(**changes) -> dict:
    """What one process saves, with some entries changed."""
    return {
        "version": 1,
        "rank": 0,
        "world_size": 1,
        "step": 7,
        "density": 0.01,
        "scope": "tensor",
        "value_format": "bf16",
        "error_feedback": True,
        "dense_steps": 2,
        "min_compress_numel": 1024,
        "residuals": {"w": torch.arange(2000.0).view(40, 50)},
    } | changes


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(40, 50, generator=torch.Generator().manual_seed(100 * rank + step))


def error_of(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- round trips


def save_after_three_steps(rank, world_size):
    state = TopKEFState(**OPTIONS)
    for step in range(3):
        all_reduce_(gradient(rank, step), state, name="w")
    return state.state_dict()


def test_a_state_dict_holds_plain_tensors_and_numbers():
    for rank, state_dict in enumerate(ranks.run(2, save_after_three_steps)):
        residuals = state_dict["residuals"]
        assert state_dict == {
            "version": 1,
            "rank": rank,
            "world_size": 2,
            "step": 3,
            "density": 0.05,
            "scope": "tensor",
            "value_format": "bf16",
            "exchange": "allgather",
            "ranks_per_node": 0,
            "error_feedback": True,
            "dense_steps": 1,
            "min_compress_numel": 100,
            "residuals": residuals,
        }
        assert residuals.keys() == {"w"}
        assert (residuals["w"].dtype, residuals["w"].shape) == (torch.float32, (40, 50))
        assert residuals["w"].count_nonzero() >= 1800
        assert_same_bits(through_a_file(state_dict)["residuals"]["w"], residuals["w"])


def test_a_state_that_names_no_exchange_says_so():
    assert TopKEFState().state_dict()["exchange"] == "default"


def resume_in_the_middle(rank, world_size, scope):
    def reduce(state, step):
        tensor = gradient(rank, step)
        all_reduce_(tensor, state, name="w", segments=[1500, 50, 450])
        return tensor

    unbroken, first = (TopKEFState(**OPTIONS, scope=scope) for _ in range(2))
    expected = [reduce(unbroken, step) for step in range(6)]
    for step in range(3):
        reduce(first, step)
    second = TopKEFState(**OPTIONS, scope=scope)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.step == 3
    for step in range(3, 6):
        assert_same_bits(reduce(second, step), expected[step])
    one, other = unbroken.state_dict(), second.state_dict()
    assert_same_bits(one.pop("residuals")["w"], other.pop("residuals")["w"])
    assert one == other


@pytest.mark.parametrize("scope", ["tensor", "bucket"], ids="scope={}".format)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(scope):
    ranks.run(2, resume_in_the_middle, scope)


def reload_itself(rank, world_size):
    state = TopKEFState(**OPTIONS)
    for step in range(3):
        all_reduce_(gradient(rank, step), state, name="w")
    checkpoint = state.state_dict()
    results = []
    for _ in range(2):  # back and again, inside one run
        results.append(all_reduce_(gradient(rank, 3), state, name="w"))
        state.load_state_dict(checkpoint)
        assert state.step == 3
    assert_same_bits(results[0], results[1])


def test_a_state_may_go_back_to_its_own_checkpoint():
    ranks.run(2, reload_itself)


def test_a_state_dict_is_a_copy():
    state = TopKEFState()
    original = saved()
    state.load_state_dict(original)
    original["residuals"]["w"].zero_()
    first = state.state_dict()["residuals"]["w"]
    assert_same_bits(first, torch.arange(2000.0).view(40, 50))
    first.zero_()
    assert_same_bits(state.state_dict()["residuals"]["w"], torch.arange(2000.0).view(40, 50))


def compress_channels_last(rank, world_size):
    """Residual of the first compressed step of a channels_last weight, and its gradient, from the state and after a reload."""
    weight = nn.Parameter(torch.zeros(8, 16, 3, 3).to(memory_format=torch.channels_last))
    generator = torch.Generator().manual_seed(rank)
    local = torch.randn(8, 16, 3, 3, generator=generator)
    # What is sent is gone.
    options = {"exchange": "allgather", "density": 0.05, "dense_steps": 0, "value_format": "fp32"}
    state = TopKEFState(**options)
    weight.grad = local.to(memory_format=torch.channels_last)
    all_reduce_gradients([("w", weight)], state)
    residual = state.state_dict()["residuals"]["w"]
    other = TopKEFState(**options).bind([("w", weight)])
    other.load_state_dict(state.state_dict())
    assert_same_bits(other.state_dict()["residuals"]["w"], residual)
    weight.grad.zero_()
    all_reduce_gradients([("w", weight)], other)
    return local, residual, other.state_dict()["residuals"]["w"]


def test_the_residual_of_a_channels_last_parameter_has_its_logical_shape_and_order():
    for local, residual, later in ranks.run(2, compress_channels_last):
        assert residual.is_contiguous()
        for left, before, k in ((residual, local, 58), (later, residual, 58)):
            kept = left != 0
            assert int((~kept).sum()) - int((before == 0).sum()) == k
            assert_same_bits(left[kept], before[kept])
            smallest_sent = before[~kept & (before != 0)].abs().min()
            assert smallest_sent >= left.abs().max()


# ---- names


def use_the_loaded_residual(rank, world_size, how):
    """Reduces zeros: what comes out was in the loaded residual."""
    state = TopKEFState(exchange="allgather", density=0.05, dense_steps=2, value_format="fp32")
    weight = nn.Parameter(torch.zeros(40, 50))
    if how == "bind before":
        state.bind([("w", weight)])
    state.load_state_dict(saved(world_size=1, density=0.05, value_format="fp32"))
    if how == "bind after":
        state.bind([("w", weight)])
    if how == "name of all_reduce_":
        tensor = torch.zeros(40, 50)
        all_reduce_(tensor, state, name="w")
        return tensor, state.step
    weight.grad = torch.zeros(40, 50)
    all_reduce_gradients([("module.w", weight)], state)
    return weight.grad, state.step


@pytest.mark.parametrize(
    "how", ["bind before", "bind after", "name of all_reduce_", "name of all_reduce_gradients"]
)
def test_a_loaded_residual_waits_for_its_name(how):
    ((result, step),) = ranks.run(1, use_the_loaded_residual, how)
    expected = torch.zeros(2000)
    expected[1900:] = torch.arange(1900.0, 2000.0)  # the largest 5 %
    assert_same_bits(result.reshape(-1), expected)
    assert step == 8


def test_unknown_names_are_kept_and_saved_again():
    state = TopKEFState()
    unknown = torch.full((3, 5), 2.0)
    loaded = saved()
    loaded["residuals"]["gone"] = unknown
    state.load_state_dict(loaded)
    with pytest.warns(UserWarning, match="residuals of 'gone'"):
        state.bind([("w", nn.Parameter(torch.zeros(40, 50)))])
    again = state.state_dict()["residuals"]
    assert again.keys() == {"w", "gone"}
    assert_same_bits(again["gone"], unknown)


def test_a_parameter_without_a_saved_residual_starts_at_zero():
    state = TopKEFState().bind([(name, nn.Parameter(torch.zeros(40, 50))) for name in "wv"])
    state.load_state_dict(saved())
    assert state.state_dict()["residuals"].keys() == {"w"}


FOREIGN = {f"other.{i}": torch.zeros(40, 50) for i in range(5)} | {"w": torch.zeros(40, 50)}


def net_of_w_and_v() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(40, 50))) for name in "wv"]


@pytest.mark.parametrize("first", ["load", "bind"])
def test_residuals_without_a_parameter_are_warned_about_once_in_both_orders(first):
    state, named = TopKEFState(), net_of_w_and_v()
    actions = [
        lambda: state.load_state_dict(saved(residuals=FOREIGN)),
        lambda: state.bind(named),
    ]
    one, other = actions if first == "load" else reversed(actions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one()
    with pytest.warns(UserWarning, match="the loaded state has residuals of") as caught:
        other()
    (warning,) = caught
    message = str(warning.message)
    assert "residuals of 'other.0', 'other.1', 'other.2' and 2 more, but the bound model" in message
    assert "its names are, for example, 'w', 'v'; load a state of the same model" in message
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.bind(named)
        state.load_state_dict(saved())
        state.reset()


def load_then_train_another_model(rank, world_size, entry):
    model = DistributedDataParallel(nn.Linear(40, 50))
    state = TopKEFState(exchange="allgather")
    state.load_state_dict(saved(rank=rank, world_size=world_size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if entry == "register":
            register(model, state)
        elif entry == "constructor":
            state = TopKEFState(exchange="allgather", named_parameters=model.named_parameters())
            state.load_state_dict(saved(rank=rank, world_size=world_size))
        else:
            for _ in range(2):
                all_reduce_gradients(model.named_parameters(), state)
    return [(str(warning.message)[:52], warning.filename) for warning in caught]


@pytest.mark.parametrize("entry", ["register", "constructor", "all_reduce_gradients"])
def test_every_way_to_bring_the_names_warns_where_it_is_called(entry):
    expected = [("TopKEFState: the loaded state has residuals of 'w', ", __file__)]
    assert ranks.run(2, load_then_train_another_model, entry) == [expected] * 2


# ---- refusals

NOT_SAVED = [
    pytest.param(None, "a dict, got NoneType", id="None"),
    pytest.param([], "a dict, got list", id="list"),
    pytest.param(saved(step="x"), "step must be an integer, got 'x'", id="step-str"),
    pytest.param(saved(step=1.5), "step must be an integer, got 1.5", id="step-float"),
    pytest.param(saved(rank=True), "rank must be an integer, got True", id="rank-bool"),
    pytest.param(saved(world_size=None), "world_size must be an integer, got None", id="size"),
    pytest.param(saved(residuals=[]), "dict of name to tensor, got list", id="residuals"),
    pytest.param(saved(residuals={"w": 5}), "to tensor, got int under the key 'w'", id="no-tensor"),
    pytest.param(
        saved(residuals={5: torch.ones(3)}), "to tensor, got Tensor under the key 5", id="no-name"
    ),
]


@pytest.mark.parametrize(("wrong", "words"), NOT_SAVED)
def test_what_is_no_saved_state_is_refused_and_changes_nothing(wrong, words):
    state = TopKEFState()
    state.load_state_dict(saved())
    with pytest.raises(TypeError, match=re.escape(words)) as caught:
        state.load_state_dict(wrong)
    assert str(caught.value).startswith("TopKEFState.load_state_dict: ")
    assert "what TopKEFState.state_dict() returned" in str(caught.value)
    assert state.step == 7
    assert_same_bits(state.state_dict()["residuals"]["w"], torch.arange(2000.0).view(40, 50))


REFUSALS = [
    ({"version": 2}, "expected version 1, got 2; load it with the compressed_ddp that saved it"),
    ({"version": None}, "expected version 1, got None"),
    ({"step": -1}, "step must be >= 0, got -1"),
    (
        {"residuals": {"w": torch.zeros(40, 50).half()}},
        "expected the residual of 'w' as float32, got Half",
    ),
    (
        {"residuals": {"w": torch.zeros(50, 40)}},
        "the residual of 'w' has shape [50, 40] but the parameter has shape [40, 50]",
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(changes, words):
    state = TopKEFState().bind([("w", nn.Parameter(torch.zeros(40, 50)))])
    state.load_state_dict(saved())
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        state.load_state_dict(saved(**changes))
    assert str(caught.value).startswith("TopKEFState.load_state_dict: ")
    assert state.step == 7
    assert_same_bits(state.state_dict()["residuals"]["w"], torch.arange(2000.0).view(40, 50))


@pytest.mark.parametrize("key", ["version", "rank", "world_size", "step", "residuals"])
def test_a_missing_entry_is_named(key):
    incomplete = saved()
    del incomplete[key]
    with pytest.raises(ValueError, match=key):
        TopKEFState().load_state_dict(incomplete)


def test_a_shape_mismatch_is_noticed_when_the_name_comes():
    state = TopKEFState()
    state.load_state_dict(saved())
    with pytest.raises(
        ValueError, match=re.escape("has shape [40, 50] but the parameter has shape [3, 4]")
    ):
        state.bind([("w", nn.Parameter(torch.zeros(3, 4)))])


def load_files_of_others(rank, world_size):
    refusals = []
    for other_rank, other_size in ((1 - rank, 2), (rank, 3), (rank, 1)):
        state = TopKEFState()
        refusals.append(
            error_of(state.load_state_dict, saved(rank=other_rank, world_size=other_size))
        )
        assert state.step == 0
    TopKEFState().load_state_dict(saved(rank=rank, world_size=2))
    return refusals


def test_the_state_of_another_rank_or_world_size_is_refused():
    for rank, refusals in enumerate(ranks.run(2, load_files_of_others)):
        for refusal, (other_rank, other_size) in zip(
            refusals, ((1 - rank, 2), (rank, 3), (rank, 1))
        ):
            assert refusal == (
                f"ValueError: TopKEFState.load_state_dict: this state was saved by rank {other_rank} of {other_size}, "
                f"but this is rank {rank} of 2; residuals belong to a rank: load each rank's own file with the same "
                "world size, or start without residuals "
                "(a model that averages over a part of the ranks: register it before loading, "
                "or pass TopKEFState(process_group=...))"
            )


def load_before_the_process_group(rank, world_size):
    dist.destroy_process_group()
    fitting, other = (TopKEFState(exchange="allgather") for _ in range(2))
    fitting.load_state_dict(saved())
    other.load_state_dict(saved(rank=3, world_size=4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(40, 50)
    refusal = error_of(all_reduce_, tensor, other, name="w")
    all_reduce_(tensor, fitting, name="w")
    return refusal, fitting.step, int(tensor.count_nonzero())


def test_a_state_loaded_before_the_process_group_is_checked_at_its_first_use():
    ((refusal, step, nonzero),) = ranks.run(1, load_before_the_process_group)
    assert "this state was saved by rank 3 of 4, but this is rank 0 of 1" in refusal
    assert (step, nonzero) == (8, 20)


def test_saved_again_before_a_process_group_exists_a_state_keeps_its_rank():
    state = TopKEFState()
    state.load_state_dict(saved(rank=3, world_size=4))
    again = state.state_dict()
    assert (again["rank"], again["world_size"], again["step"]) == (3, 4, 7)


def go_back_to_dense_steps(rank, world_size):
    state = TopKEFState(**OPTIONS)
    first = state.state_dict()
    for step in range(3):
        all_reduce_(gradient(rank, step), state, name="w")
    refusal = error_of(state.load_state_dict, first)
    state.reset()
    state.load_state_dict(first)
    return refusal, state.step


def test_a_state_past_its_dense_steps_does_not_go_back_to_them_without_reset():
    for refusal, step in ranks.run(2, go_back_to_dense_steps):
        assert "is past its dense steps and cannot go back to step 0 (dense_steps=1)" in refusal
        assert "call reset() on every rank first" in refusal
        assert step == 0


def test_other_options_are_warned_about_and_not_taken():
    state = TopKEFState(
        exchange="allgather",
        density=0.05,
        scope="bucket",
        value_format="sign",
        min_compress_numel=10,
    )
    with pytest.warns(UserWarning, match="saved with other options") as caught:
        state.load_state_dict(saved())
    (warning,) = caught
    for words in (
        "density (saved 0.01, now 0.05)",
        "scope (saved 'tensor', now 'bucket')",
        "value_format (saved 'bf16', now 'sign')",
        "min_compress_numel (saved 1024, now 10)",
    ):
        assert words in str(warning.message)
    assert "dense_steps" not in str(warning.message)
    assert warning.filename == __file__
    assert (state.density, state.scope, state.min_compress_numel) == (0.05, "bucket", 10)
    assert state.value_format == "sign"


def test_a_state_that_was_saved_without_a_value_format_loads_without_a_warning():
    before = saved()
    del before["value_format"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKEFState(value_format="sign").load_state_dict(before)


def test_a_callable_density_is_saved_as_minus_one():
    state = TopKEFState(exchange="allgather", density=lambda step: 0.01)
    state_dict = state.state_dict()
    assert state_dict["density"] == -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.load_state_dict(through_a_file(state_dict))
