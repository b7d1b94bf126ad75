"""compensate_select_ against reference.py, bit for bit, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from stage_cases import (
    BUCKET,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    SMALL,
    Layout,
    assert_same_bits,
    inputs_of,
    with_threads,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_ddp import ops, reference
from compressed_ddp._native import _C

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]


def assert_equals_reference(
    kind: str, layout: Layout, dtype: torch.dtype, seed: int, *, error_feedback: bool = True
) -> None:
    gradient, residual = inputs_of(kind, layout, dtype, seed)
    gradient_before, expected_residual = gradient.clone(), residual.clone()
    values, indices, statistics = ops.compensate_select_(
        gradient, residual, *layout.arguments, error_feedback=error_feedback
    )
    expected_values, expected_indices, expected_statistics = reference.compensate_select_(
        gradient, expected_residual, *layout.arguments, error_feedback=error_feedback
    )
    assert_same_bits(indices, expected_indices)
    assert_same_bits(values, expected_values)
    assert_same_bits(residual, expected_residual)
    assert_same_bits(gradient, gradient_before)
    assert statistics.dtype == torch.float64
    assert statistics[3] == expected_statistics[3], "number of non-finite entries"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_selection_values_and_residual_equal_the_reference(kind, layout, dtype, seed):
    assert_equals_reference(kind, layout, dtype, seed)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 1.0], ids="density={}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_density_equals_the_reference(density, dtype, seed):
    numel = 70_001
    layout = Layout([numel], [0], [_C.selection_k(density, numel)])
    for kind in ("normal", "heavy-tail", "ties"):
        assert_equals_reference(kind, layout, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_without_error_feedback_the_gradient_alone_is_selected_from(kind, dtype, seed):
    for layout in (BUCKET, LAYOUTS["three-blocks"]):
        gradient, residual = inputs_of(kind, layout, dtype, seed)
        before = residual.clone()
        ops.compensate_select_(gradient, residual, *layout.arguments, error_feedback=False)
        assert_same_bits(residual, before)
        assert_equals_reference(kind, layout, dtype, seed, error_feedback=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bucket_at_an_odd_address_equals_the_reference(dtype, seed):
    gradient, residual = inputs_of("normal", BUCKET, dtype, seed)
    shifted_gradient = torch.cat([gradient[:1], gradient])[1:]
    shifted_residual = torch.cat([residual[:1], residual])[1:]
    values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
    shifted = ops.compensate_select_(shifted_gradient, shifted_residual, *BUCKET.arguments)
    assert_same_bits(shifted[0], values)
    assert_same_bits(shifted[1], indices)
    assert_same_bits(shifted_residual, residual)


@pytest.mark.parametrize("error_feedback", [True, False], ids="error_feedback={}".format)
def test_statistics_are_the_squared_norms_and_the_count_of_non_finite_entries(error_feedback, seed):
    layout = LAYOUTS["three-blocks"]
    gradient, residual = inputs_of("normal", layout, torch.float32, seed)
    acc = (gradient + residual if error_feedback else gradient.clone())[:150_001].double()
    values, indices, statistics = ops.compensate_select_(
        gradient, residual, *layout.arguments, error_feedback=error_feedback
    )
    kept = acc.clone()
    kept[indices.long()] = 0
    expected = [gradient[:150_001].double().square().sum(), kept.square().sum()]
    expected += [values.double().square().sum(), torch.tensor(0.0)]
    torch.testing.assert_close(
        statistics, torch.stack(expected).double(), rtol=1e-5, atol=0
    )  # fp32 sums inside a block


@pytest.mark.parametrize("kind", ["inf", "nan", "overflow"])
def test_a_non_finite_sum_is_sent_and_never_stored(kind, seed):
    layout = Layout([5000], [0], [5])
    gradient, residual = inputs_of(kind, layout, torch.float32, seed)
    before = residual.clone()
    bad = ~torch.isfinite(gradient + residual)
    assert bad.sum() > 0
    values, _, statistics = ops.compensate_select_(gradient, residual, *layout.arguments)
    assert statistics[3] == bad.sum()
    assert not torch.isfinite(values[: int(min(5, bad.sum()))]).any()
    assert_same_bits(residual[bad], before[bad])
    assert torch.isfinite(residual).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype, seed):
    layout = Layout([150_001, 999, 70_000], [0, -1, 1], [1500, 700])
    results = []
    for threads in (1, 2):
        gradient, residual = inputs_of("normal", layout, dtype, seed)
        with with_threads(threads):
            values, indices, statistics = ops.compensate_select_(
                gradient, residual, *layout.arguments
            )
        results.append((values, indices, statistics, residual))
    for one_thread, two_threads in zip(*results):
        assert_same_bits(one_thread, two_threads)


# ---- refusals


def refused(error: type[Exception], words: str, **changes: object) -> None:
    """Calls the operator on a good bucket with some arguments changed."""
    arguments: dict[str, object] = {
        "gradient": torch.ones(12),
        "residual": torch.zeros(12),
        "segments": [6, 2, 4],
        "groups": [0, -1, 1],
        "k": [2, 1],
    }
    arguments |= changes
    with pytest.raises(error, match=re.escape(f"compensate_select_: {words}")):
        ops.compensate_select_(**arguments)  # type: ignore[arg-type]


LAYOUT_REFUSALS = [
    ({"groups": [0, -1]}, "expected one group per segment but got 3 segments and 2 groups"),
    ({"segments": [6, -2, 8]}, "segment 1 has a negative numel -2"),
    ({"segments": [6, 2, 2**31]}, "a bucket holds at most 2147483647 entries, segment 2 goes"),
    ({"groups": [1, -1, 2]}, "groups must be numbered 0, 1, 2, .. in bucket order (-1 = dense)"),
    ({"groups": [0, 2, 1]}, "in bucket order (-1 = dense), segment 1 has group 2"),
    ({"groups": [0, 1, 0]}, "in bucket order (-1 = dense), segment 2 has group 0"),
    ({"groups": [0, -2, 1]}, "in bucket order (-1 = dense), segment 1 has group -2"),
    ({"k": [2]}, "expected one k per group but got 2 groups and 1 k"),
    ({"k": [2, 1, 1]}, "expected one k per group but got 2 groups and 3 k"),
    ({"k": [0, 1]}, "k of group 0 must be in [1, 6], got 0"),
    ({"k": [2, 5]}, "k of group 1 must be in [1, 4], got 5"),
    ({"k": [-1, 1]}, "k of group 0 must be in [1, 6], got -1"),
]


@pytest.mark.parametrize(("changes", "words"), LAYOUT_REFUSALS)
def test_a_layout_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ops.compensate_select_(
            torch.ones(12),
            torch.zeros(12),
            **({"segments": [6, 2, 4], "groups": [0, -1, 1], "k": [2, 1]} | changes),
        )
    assert str(caught.value).startswith("compensate_select_: layout: ")


def test_tensors_of_another_shape_or_stride_are_refused():
    flat = "to be flat and contiguous with 12 entries (the sum of segments), got shape"
    refused(ValueError, f"expected gradient {flat} [11]", gradient=torch.ones(11))
    refused(ValueError, f"expected gradient {flat} [3, 4]", gradient=torch.ones(3, 4))
    refused(ValueError, f"expected gradient {flat} [12]", gradient=torch.ones(24)[::2])
    refused(ValueError, f"expected residual {flat} [13]", residual=torch.ones(13))
    refused(ValueError, f"expected residual {flat} [12]", residual=torch.ones(12, 2)[:, 0])


def test_tensors_of_another_dtype_are_refused():
    refused(
        TypeError,
        "expected residual to have dtype Float, got Half",
        residual=torch.zeros(12, dtype=torch.float16),
    )
    for dtype in (torch.float64, torch.int32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match="expected gradients of dtype float32, float16 or bf"):
            ops.compensate_select_(torch.ones(12, dtype=dtype), torch.zeros(12), *SMALL.arguments)


def test_a_refused_call_changes_nothing():
    residual = torch.ones(12)
    with pytest.raises(ValueError, match="expected gradients of dtype"):
        ops.compensate_select_(torch.ones(12, dtype=torch.float64), residual, *SMALL.arguments)
    assert_same_bits(residual, torch.ones(12))


# ---- as a citizen of torch


@pytest.mark.parametrize("error_feedback", [True, False], ids="error_feedback={}".format)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_finds_nothing(dtype, error_feedback, seed):
    for layout in (BUCKET, LAYOUTS["empty"]):
        gradient, residual = inputs_of("normal", layout, dtype, seed)
        torch.library.opcheck(
            torch.ops.compressed_ddp.compensate_select_.default,
            (gradient, residual, *layout.arguments),
            {"error_feedback": error_feedback},
        )


@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_the_fake_kernel_knows_the_shapes(layout, seed):
    gradient, residual = inputs_of("normal", layout, torch.bfloat16, seed)
    real = ops.compensate_select_(gradient, residual, *layout.arguments)
    with FakeTensorMode() as mode:
        fake = ops.compensate_select_(
            mode.from_tensor(gradient), mode.from_tensor(residual), *layout.arguments
        )
    for one, other in zip(real, fake):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_it_compiles_into_one_graph_that_mutates_the_residual(seed):
    def step(gradient, residual):
        values, indices, _ = ops.compensate_select_(gradient * 2, residual, *BUCKET.arguments)
        return values + 1, indices

    gradient, residual = inputs_of("normal", BUCKET, torch.float32, seed)
    eager_residual = residual.clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    values, indices = compiled(gradient, residual)
    eager_values, eager_indices = step(gradient, eager_residual)
    assert_same_bits(values, eager_values)
    assert_same_bits(indices, eager_indices)
    assert_same_bits(residual, eager_residual)
