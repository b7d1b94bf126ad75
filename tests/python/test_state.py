"""TopKEFState: options, names, one model, one process."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compressed_ddp import (
    TopKEFState,
    adam_param_groups,
    all_reduce_,
    all_reduce_gradients,
    register,
    topk_ef_hook,
)
from compressed_ddp.names import unwrapped

# ---- options

REFUSED_OPTIONS = [
    ({"density": 0.0}, ValueError, "density must be in (0, 1], got 0.0"),
    ({"density": -0.1}, ValueError, "density must be in (0, 1], got -0.1"),
    ({"density": 1.5}, ValueError, "density must be in (0, 1], got 1.5"),
    ({"density": 50}, ValueError, "density must be in (0, 1], got 50"),
    ({"density": float("nan")}, ValueError, "density must be in (0, 1], got nan"),
    (
        {"density": "0.01"},
        TypeError,
        "density must be a number in (0, 1] or a callable of the step",
    ),
    ({"density": True}, TypeError, "density must be a number in (0, 1] or a callable of the step"),
    ({"density": None}, TypeError, "density must be a number in (0, 1] or a callable of the step"),
    (
        {"scope": "layer"},
        ValueError,
        "scope must be one of ('tensor', 'bucket', 'chunk'), got 'layer'",
    ),
    ({"scope": None}, ValueError, "scope must be one of ('tensor', 'bucket', 'chunk'), got None"),
    (
        {"value_format": "fp16"},
        ValueError,
        "value_format must be one of ('fp32', 'bf16', 'sign'), got 'fp16'",
    ),
    ({"value_format": 1}, ValueError, "must be one of ('fp32', 'bf16', 'sign'), got 1"),
    ({"value_format": ["bf16"]}, ValueError, "('fp32', 'bf16', 'sign'), got ['bf16']"),
    ({"error_feedback": 1}, TypeError, "error_feedback must be True or False, got 1"),
    ({"dense_steps": -1}, ValueError, "dense_steps must be >= 0, got -1"),
    ({"dense_steps": 1.0}, TypeError, "dense_steps must be an integer >= 0, got 1.0"),
    ({"dense_steps": True}, TypeError, "dense_steps must be an integer >= 0, got True"),
    ({"min_compress_numel": -5}, ValueError, "min_compress_numel must be >= 0, got -5"),
    (
        {"min_compress_numel": 1e3},
        TypeError,
        "min_compress_numel must be an integer >= 0, got 1000",
    ),
    ({"exempt": "("}, ValueError, "exempt must be regular expressions or a predicate"),
    ({"exempt": [3]}, ValueError, "exempt must be regular expressions or a predicate"),
    ({"exempt": [b"x"]}, ValueError, "exempt must be regular expressions or a predicate"),
    ({"exempt": b"x"}, TypeError, "got bytes b'x'; names are str: leave out the b"),
    ({"exempt": None}, TypeError, "exempt must be regular expressions or a predicate"),
    ({"process_group": 0.01}, TypeError, "the density is the second argument"),
]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    REFUSED_OPTIONS,
    ids=["{}={!r}".format(*next(iter(options.items()))) for options, _, _ in REFUSED_OPTIONS],
)
def test_a_bad_option_is_refused_with_the_accepted_range(options, error, words):
    with pytest.raises(error, match=re.escape(words)) as caught:
        TopKEFState(**options)
    assert str(caught.value).startswith("TopKEFState: ")


def test_a_refused_option_of_exempt_is_shown():
    with pytest.raises(ValueError, match=re.escape("got '(': missing ), unterminated")):
        TopKEFState(exempt=["fine", "("])


def test_defaults_are_the_documented_ones():
    state = TopKEFState()
    assert (state.density, state.scope, state.error_feedback) == (0.01, "tensor", True)
    assert (state.value_format, state.exchange) == ("bf16", None)
    assert (state.dense_steps, state.min_compress_numel, state.step) == (2, 1024, 0)
    assert repr(state) == (
        "TopKEFState(density=0.01, scope='tensor', value_format='bf16', exchange=None, ranks_per_node=None, "
        "error_feedback=True, dense_steps=2, min_compress_numel=1024, step=0)"
    )


def test_options_but_the_first_two_are_keyword_only():
    with pytest.raises(TypeError):
        TopKEFState(None, 0.01, "tensor")  # type: ignore[misc]


FIXED_OPTIONS = {
    "density": 0.5,
    "scope": "bucket",
    "value_format": "sign",
    "exchange": "split",
    "error_feedback": False,
    "dense_steps": 7,
    "min_compress_numel": 7,
    "exempt": "embed",
}


@pytest.mark.parametrize(("option", "value"), FIXED_OPTIONS.items(), ids=FIXED_OPTIONS.keys())
def test_an_option_cannot_be_changed_after_construction_and_the_remedy_is_a_new_state(
    option, value
):
    state = TopKEFState()
    before = repr(state)
    words = re.escape(f"TopKEFState: {option} cannot be changed after construction")
    remedy = re.escape(f"new = TopKEFState({option}=..)")
    with pytest.raises(AttributeError, match=f"{words}.*{remedy}"):
        setattr(state, option, value)
    assert repr(state) == before
    state.process_group = None  # read at the first step


# ---- names


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 30)
        self.head = nn.Linear(30, 40)
        self.small = nn.Linear(3, 4)
        self.frozen = nn.Linear(40, 40).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens)).sum() + self.small(torch.ones(3)).sum()


def train(model: nn.Module, num_steps: int = 2) -> None:
    for step in range(num_steps):
        model.zero_grad()
        model(torch.arange(4) + step).backward()


def sparse_state(**options) -> TopKEFState:
    return TopKEFState(**({"density": 0.05, "dense_steps": 0, "exchange": "allgather"} | options))


def residual_names(rank, world_size, wrap):
    names = {}
    for entry in ("bind", "constructor", "register"):
        net = Net()
        inner = torch.compile(net) if wrap == "compile" else net
        model = DistributedDataParallel(inner)
        named = model.named_parameters() if entry == "constructor" else None
        state = sparse_state(named_parameters=named)
        if entry == "register":
            register(model, state)
        else:
            model.register_comm_hook(state, topk_ef_hook)
        if entry == "bind":
            state.bind(model if wrap == "compile" else net)
        # Only the names of the compiled module matter here, not its code.
        with torch.compiler.set_stance("force_eager"):
            train(model)
        names[entry] = sorted(state.state_dict()["residuals"])
    return names


@pytest.mark.parametrize("wrap", ["ddp", "compile"])
def test_residuals_are_named_as_in_the_unwrapped_model(wrap):
    for names in ranks.run(2, residual_names, wrap):
        for entry in ("bind", "constructor", "register"):
            assert names[entry] == ["embed.weight", "head.weight"], entry


def without_names(rank, world_size):
    net = Net()
    errors = {}
    for case, options in (("exempt", {"exempt": "embed"}), ("plain", {})):
        state = sparse_state(**options)
        model = DistributedDataParallel(net)
        model.register_comm_hook(state, topk_ef_hook)
        try:
            train(model, num_steps=1)
            state.state_dict()
        except Exception as error:
            errors[case] = (type(error).__name__, str(error))
    return errors


def test_without_names_exempt_and_state_dict_raise_with_the_remedy():
    (errors,) = ranks.run(1, without_names)
    kind, words = errors["exempt"]
    assert "exempt was given, but the parameters have no names yet" in words
    assert "call state.bind(model) before training" in words
    kind, words = errors["plain"]
    assert kind == "ValueError"
    assert "the parameters have no names yet, and residuals are saved by name" in words
    assert "call state.bind(model), or pass named_parameters=model.named_parameters()" in words


EXEMPT_EMBEDDINGS = [
    pytest.param("^embed", id="string"),
    pytest.param(["nothing", r"mbed\.w"], id="list"),
    pytest.param((pattern for pattern in ["embed"]), id="iterator"),
    pytest.param(lambda name, parameter: parameter.shape == (50, 30), id="predicate"),
]


@pytest.mark.parametrize("exempt", EXEMPT_EMBEDDINGS)
def test_is_compressed_follows_dimension_size_and_exempt(exempt):
    state = TopKEFState(exempt=exempt)
    expected = {"embed.weight": False, "head.weight": True, "head.bias": False}
    expected |= {"small.weight": False, "small.bias": False}
    for prefix in ("", "module.", "module._orig_mod.", "_orig_mod.module."):
        for name, parameter in Net().named_parameters():
            if name in expected:
                assert state.is_compressed(prefix + name, parameter) == expected[name], name


def test_min_compress_numel_zero_compresses_every_matrix_with_entries():
    state = TopKEFState(min_compress_numel=0)
    assert state.is_compressed("w", torch.ones(1, 1))
    assert not state.is_compressed("w", torch.ones(0, 5))
    assert not state.is_compressed("w", torch.ones(5000))
    assert TopKEFState(min_compress_numel=25).is_compressed("w", torch.ones(5, 5))
    assert not TopKEFState(min_compress_numel=26).is_compressed("w", torch.ones(5, 5))


def residuals_with_exempt(rank, world_size, patterns):
    model = DistributedDataParallel(Net())
    state = sparse_state(exempt=patterns)
    register(model, state)
    train(model)
    return sorted(state.state_dict()["residuals"])


def test_exempt_parameters_have_no_residual():
    assert ranks.run(2, residuals_with_exempt, ["embed"]) == [["head.weight"]] * 2


def test_bind_refuses_what_has_no_names():
    with pytest.raises(TypeError, match="expected a module or pairs"):
        TopKEFState().bind([(1, torch.ones(3))])
    with pytest.raises(TypeError, match="got a pair of str and int"):
        TopKEFState().bind([("w", 1)])
    with pytest.raises(ValueError, match="a parameter has an empty name"):
        TopKEFState().bind([("module.", nn.Parameter(torch.ones(3)))])
    with pytest.raises(ValueError, match="the name 'w' is used twice"):
        TopKEFState().bind([(name, nn.Parameter(torch.ones(3))) for name in ("w", "_orig_mod.w")])


NOT_NAMED = [
    pytest.param(5, "got int; pass model.named_parameters()", id="number"),
    pytest.param(None, "got NoneType; pass model.named_parameters()", id="None"),
    pytest.param(torch.ones(3), "got Tensor; pass model.named_parameters()", id="tensor"),
    pytest.param(
        list(nn.Linear(3, 4).parameters()),
        "got a Parameter without a name; pass model.named_parameters(), not model.parameters()",
        id="parameters",
    ),
    pytest.param(
        dict(nn.Linear(3, 4).named_parameters()), "got a dict; pass its .items()", id="dict"
    ),
    pytest.param(["w"], "got 'w'; pass model.named_parameters()", id="names"),
    pytest.param([("w", 1)], "got a pair of str and int; pass model.named_", id="pair"),
]


@pytest.mark.parametrize(("named", "words"), NOT_NAMED)
def test_what_brings_no_names_is_refused_with_what_does(named, words):
    expected = "expected a module or pairs (name, parameter)"
    with pytest.raises(TypeError, match=re.escape(f"TopKEFState.bind: {expected}, {words}")):
        TopKEFState().bind(named)
    if named is not None:  # the default
        with pytest.raises(TypeError, match=re.escape(f"TopKEFState: {expected}, {words}")):
            TopKEFState(named_parameters=named)


class OwnModule(nn.Module):
    """`module` is a child of its own here, not DDP's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(40, 40)
        self.weight = nn.Parameter(torch.ones(40, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x @ self.weight).sum()


def names_of_own_module(rank, world_size, entry):
    net = OwnModule()
    model = DistributedDataParallel(net)
    state = sparse_state(exempt="^weight")
    if entry == "all_reduce_gradients":
        net(torch.ones(2, 40)).backward()
        all_reduce_gradients(model.named_parameters(), state)
        all_reduce_gradients(net.named_parameters(), state)  # the same names
    else:
        register(model, state)
        model(torch.ones(2, 40)).backward()
    travels = [
        [state.is_compressed(name, p) for name, p in wrapped.named_parameters()]
        for wrapped in (net, model)
    ]
    compressed, dense = adam_param_groups(model, state)
    assert compressed["params"] == [net.module.weight]
    assert dense["params"] == [net.weight, net.module.bias]
    return sorted(state.state_dict()["residuals"]), travels


@pytest.mark.parametrize("entry", ["register", "all_reduce_gradients"])
def test_a_child_called_module_keeps_its_name_beside_others(entry):
    for names, travels in ranks.run(2, names_of_own_module, entry):
        assert names == ["module.weight"]
        assert travels == [[False, True, False]] * 2


def test_names_of_compiled_parts_are_those_of_the_parts():
    assert unwrapped(["0._orig_mod.weight", "1.weight"]) == ["0.weight", "1.weight"]
    assert unwrapped(["module._orig_mod.a._orig_mod.b", "module._orig_mod.c"]) == ["a.b", "c"]
    assert unwrapped(["_orig_mod.module.module.a", "_orig_mod.module.module.b"]) == ["a", "b"]
    assert unwrapped(["my_orig_mod.w", "module.w"]) == ["my_orig_mod.w", "module.w"]
    assert unwrapped([]) == []
    plain, compiled = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    compiled[0] = torch.compile(compiled[0], backend="eager")
    names = [[name for name, _ in net.named_parameters()] for net in (plain, compiled)]
    assert names[0] != names[1]
    assert unwrapped(names[1]) == names[0]


def test_a_tied_parameter_goes_by_its_first_name():
    weight = nn.Parameter(torch.ones(40, 50))
    state = TopKEFState().bind([("first", weight), ("second", weight)])
    assert state.bind([("first", weight)]) is state
    assert state.bind([("first", weight), ("second", weight)]) is state


def test_an_exempt_rule_that_matches_nothing_is_warned_about_once():
    net, state = Net(), TopKEFState(exempt="ember")
    with pytest.warns(UserWarning, match="exempt matches none of the model's parameters") as caught:
        state.bind(net)
    (warning,) = caught
    assert "for example, 'embed.weight', 'head.weight', 'head.bias'" in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.bind(net)
        TopKEFState(exempt="embed").bind(net)


# ---- one model


def test_bind_takes_the_same_model_again_and_refuses_another():
    net = Net()
    state = TopKEFState().bind(net)
    assert state.bind(net) is state
    for other in (Net(), nn.Linear(3, 4)):
        with pytest.raises(ValueError, match="this state already serves another model"):
            state.bind(other)


def test_other_trained_parameters_of_the_bound_model_are_named_with_the_remedy():
    net = Net()
    state = TopKEFState().bind(net)
    net.frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="after this state was bound to the model") as caught:
        state.bind(net)
    assert "'frozen.weight', 'frozen.bias' joined the trained parameters" in str(caught.value)
    assert "new.load_state_dict(state.state_dict()), on every rank" in str(caught.value)
    net.embed.requires_grad_(False)
    with pytest.raises(ValueError, match=r"joined .* and 'embed\.weight' left the trained"):
        state.bind(net)
    net.frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"TopKEFState: 'embed\.weight' left the trained"):
        state.bind(net)
    net.embed.requires_grad_(True)
    assert state.bind(net) is state


def serve_a_second_model(rank, world_size, bound):
    state = sparse_state()
    models = [DistributedDataParallel(Net()) for _ in range(2)]
    if bound:
        state.bind(models[0])
    errors = []
    for model in models:
        model.register_comm_hook(state, topk_ef_hook)
        try:
            train(model)
        except Exception as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("bound", [True, False], ids="bound={}".format)
def test_a_second_model_with_the_same_state_is_refused(bound):
    for (error,) in ranks.run(2, serve_a_second_model, bound):
        assert "one state serves one model" in error
        assert "create a second TopKEFState" in error


def bind_after_another_model(rank, world_size):
    state = sparse_state()
    model = DistributedDataParallel(Net())
    model.register_comm_hook(state, topk_ef_hook)
    train(model)
    with pytest.raises(
        ValueError, match="that it has compressed is not among the named parameters"
    ):
        state.bind(Net())
    return sorted(state.bind(model).state_dict()["residuals"])


def test_names_of_another_model_are_refused_after_compressed_steps():
    assert ranks.run(2, bind_after_another_model) == [["embed.weight", "head.weight"]] * 2


# ---- one process


def test_a_state_cannot_be_pickled_or_copied():
    state = TopKEFState()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=re.escape("save state.state_dict()")):
            attempt(state)


def warnings_of_steps(rank, world_size):
    state = sparse_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            all_reduce_(torch.ones(2000), state, name="w")
    return [(str(warning.message), warning.filename) for warning in caught]


def test_one_rank_is_warned_once_and_several_never():
    ((one, filename),) = ranks.run(1, warnings_of_steps)[0]
    assert one.startswith("compressed_ddp: the process group has one rank: nothing is sent")
    assert filename == __file__, "the warning points at the caller"
    assert ranks.run(2, warnings_of_steps) == [[], []]


def reset_and_go_on(rank, world_size):
    state = TopKEFState(exchange="allgather", density=0.05, dense_steps=1)
    nonzero = []
    for _ in range(2):
        for step in range(3):
            tensor = torch.arange(2000.0) + 1 + step
            nonzero.append(int(all_reduce_(tensor, state, name="w").count_nonzero()))
        assert state.step == 3
        assert state.state_dict()["residuals"].keys() == {"w"}
        state.reset()
        assert state.step == 0
        assert state.state_dict()["residuals"] == {}
    all_reduce_(torch.ones(10, 10), state, name="w")  # names of tensors are forgotten, too
    return nonzero


def test_reset_goes_back_to_the_dense_steps_without_residuals():
    assert ranks.run(2, reset_and_go_on) == [[2000, 100, 100] * 2] * 2
