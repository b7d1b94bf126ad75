"""encode against reference.py, byte for byte, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from stage_cases import BUCKET, DTYPES, GRADIENTS, LAYOUTS, SMALL, assert_same_bits, inputs_of
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_ddp import ops, reference

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_payload_equals_the_reference_byte_for_byte(kind, layout, dtype, seed):
    gradient, residual = inputs_of(kind, layout, dtype, seed)
    values, indices, statistics = ops.compensate_select_(gradient, residual, *layout.arguments)
    options = {"rank": 2, "world_size": 5, "step": 2**40 + 7, "non_finite": bool(statistics[3] > 0)}
    payload = ops.encode(values, indices, gradient, *layout.arguments, **options)
    expected = reference.encode(values, indices, gradient, *layout.arguments, **options)
    assert_same_bits(payload, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_non_finite_dense_entry_sets_the_flag(value, dtype):
    gradient = torch.ones(12, dtype=dtype)
    values, indices = torch.ones(3), torch.tensor([0, 1, 8], dtype=torch.int32)
    options = {"rank": 0, "world_size": 1}
    assert ops.encode(values, indices, gradient, *SMALL.arguments, **options)[6] == 0
    gradient[7] = value
    payload = ops.encode(values, indices, gradient, *SMALL.arguments, **options)
    assert payload[6] == 1
    assert_same_bits(
        payload, reference.encode(values, indices, gradient, *SMALL.arguments, **options)
    )


def test_a_non_finite_entry_of_a_selected_segment_is_the_callers_to_report():
    gradient = torch.ones(12)
    gradient[0] = torch.nan  # compensate_select_ has counted it; encode reads only dense segments
    values, indices = torch.ones(3), torch.tensor([0, 1, 8], dtype=torch.int32)
    for reported in (False, True):
        payload = ops.encode(
            values,
            indices,
            gradient,
            *SMALL.arguments,
            rank=0,
            world_size=1,
            non_finite=reported,
        )
        assert payload[6] == int(reported)


def test_the_inputs_are_not_changed(seed):
    gradient, residual = inputs_of("nan", BUCKET, torch.float16, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
    before = [tensor.clone() for tensor in (values, indices, gradient)]
    ops.encode(values, indices, gradient, *BUCKET.arguments, rank=0, world_size=1)
    for tensor, expected in zip((values, indices, gradient), before):
        assert_same_bits(tensor, expected)


# ---- refusals

INT32 = torch.int32
ENTRIES = "expected flat contiguous values and indices with 3 entries (the sum of k), got shapes"
REFUSALS = {
    "layout": (ValueError, "layout: k of group 0 must be in [1, 6], got 7", {"k": [7, 1]}),
    "gradient-numel": (ValueError, "expected gradient to be flat and", {"gradient": torch.ones(9)}),
    "gradient-shape": (ValueError, "got shape [12, 1]", {"gradient": torch.ones(12, 1)}),
    "gradient-dtype": (
        ValueError,
        "expected gradients of dtype float32, float16 or bfloat16, got Double",
        {"gradient": torch.ones(12).double()},
    ),
    "values-dtype": (
        TypeError,
        "expected values to have dtype Float, got BFloat16",
        {"values": torch.ones(3).bfloat16()},
    ),
    "indices-dtype": (
        TypeError,
        "expected indices to have dtype Int, got Long",
        {"indices": torch.tensor([0, 1, 8])},
    ),
    "values-numel": (ValueError, f"{ENTRIES} [4] and [3]", {"values": torch.ones(4)}),
    "values-shape": (ValueError, f"{ENTRIES} [3, 1] and [3]", {"values": torch.ones(3, 1)}),
    "values-stride": (ValueError, f"{ENTRIES} [3] and [3]", {"values": torch.ones(6)[::2]}),
    "indices-numel": (
        ValueError,
        f"{ENTRIES} [3] and [2]",
        {"indices": torch.ones(2, dtype=INT32)},
    ),
    "indices-stride": (
        ValueError,
        f"{ENTRIES} [3] and [3]",
        {"indices": torch.ones(3, 2, dtype=INT32)[:, 0]},
    ),
    "rank-negative": (
        ValueError,
        "expected 0 <= rank < world_size, got rank -1 of 2",
        {"rank": -1},
    ),
    "rank-too-large": (
        ValueError,
        "expected 0 <= rank < world_size, got rank 2 of 2",
        {"rank": 2},
    ),
    "world-size": (
        ValueError,
        "expected 0 <= rank < world_size, got rank 0 of 0",
        {"rank": 0, "world_size": 0},
    ),
}


@pytest.mark.parametrize(("error", "words", "changes"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_are_refused_in_words(error, words, changes):
    arguments = {
        "values": torch.ones(3),
        "indices": torch.tensor([0, 1, 8], dtype=torch.int32),
        "gradient": torch.ones(12),
        "segments": [6, 2, 4],
        "groups": [0, -1, 1],
        "k": [2, 1],
        "rank": 0,
        "world_size": 2,
    }
    with pytest.raises(error, match=re.escape(words)):
        ops.encode(**(arguments | changes))


# ---- as a citizen of torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_finds_nothing(dtype, seed):
    for layout in (BUCKET, LAYOUTS["all-dense"]):
        gradient, residual = inputs_of("normal", layout, dtype, seed)
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
        torch.library.opcheck(
            torch.ops.compressed_ddp.encode.default,
            (values, indices, gradient, *layout.arguments),
            {"rank": 1, "world_size": 2, "step": 3, "non_finite": True},
        )


@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_the_fake_kernel_knows_the_size(layout, seed):
    gradient, residual = inputs_of("normal", layout, torch.float16, seed)
    inputs = ops.compensate_select_(gradient, residual, *layout.arguments)[:2]
    real = ops.encode(*inputs, gradient, *layout.arguments, rank=0, world_size=1)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*inputs, gradient)]
        fake = ops.encode(*fakes, *layout.arguments, rank=0, world_size=1)
    assert (fake.shape, fake.dtype) == (real.shape, torch.uint8)


def test_it_compiles_into_one_graph_with_the_selection(seed):
    def compress(gradient, residual):
        values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
        return ops.encode(values, indices, gradient, *BUCKET.arguments, rank=0, world_size=1)

    gradient, residual = inputs_of("normal", BUCKET, torch.bfloat16, seed)
    expected = compress(gradient, residual.clone())
    compiled = torch.compile(compress, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(gradient, residual), expected)
