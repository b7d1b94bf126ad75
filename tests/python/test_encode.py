"""encode against reference.py, byte for byte, what rounding gives back to the residual, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from stage_cases import (
    BUCKET,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    SMALL,
    WIDE,
    Layout,
    assert_same_bits,
    each_value_format,
    inputs_of,
    sections_of,
    with_threads,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_ddp import ops, reference

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]


def assert_equals_reference(kind, layout, dtype, value_format, seed):
    gradient, residual = inputs_of(kind, layout, dtype, seed)
    values, indices, statistics = ops.compensate_select_(gradient, residual, *layout.arguments)
    options = {"rank": 2**16 + 2, "step": 2**40 + 7, "non_finite": bool(statistics[3] > 0)}
    options |= {"value_format": value_format}
    arguments = (values, indices, gradient, *layout.arguments)
    expected_residual = residual.clone()
    payload = ops.encode(*arguments, residual=residual, **options)
    expected = reference.encode(*arguments, residual=expected_residual, **options)
    assert_same_bits(payload, expected)
    assert_same_bits(residual, expected_residual)


@each_value_format
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_payload_and_residual_equal_the_reference_byte_for_byte(kind, layout, value_format, seed):
    assert_equals_reference(kind, layout, torch.float32, value_format, seed)


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_payloads_of_half_precision_gradients_equal_the_reference(kind, dtype, value_format, seed):
    assert_equals_reference(kind, BUCKET, dtype, value_format, seed)


@each_value_format
def test_results_do_not_depend_on_the_number_of_threads(value_format, seed):
    layout = Layout([150_001, 999, 70_000], [0, -1, 1], [15_000, 7_000])
    results = []
    for threads in (1, 2):
        gradient, residual = inputs_of("heavy-tail", layout, torch.float32, seed)
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
        options = {"value_format": value_format, "residual": residual, "rank": 0}
        with with_threads(threads):
            payload = ops.encode(values, indices, gradient, *layout.arguments, **options)
        results.append((payload, residual))
    gradient, residual = inputs_of("heavy-tail", layout, torch.float32, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
    options["residual"] = residual
    payload = reference.encode(values, indices, gradient, *layout.arguments, **options)
    for one_thread, two_threads, expected in zip(*results, (payload, residual)):
        assert_same_bits(one_thread, expected)
        assert_same_bits(two_threads, expected)


# ---- what rounding loses

ONE = Layout([1], [0], [1])


def float_of(bits: int) -> torch.Tensor:
    """float32 [1]"""
    return torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)


def encoded_value(value: torch.Tensor, residual: torch.Tensor, value_format: str) -> int:
    """What is written for one value, as an integer."""
    index = torch.tensor([0], dtype=torch.int32)
    payload = ops.encode(
        value, index, torch.zeros(1), *ONE.arguments,
        value_format=value_format, residual=residual, rank=0,
    )  # fmt: skip
    written = sections_of(payload, ONE, value_format)["values"]
    return int.from_bytes(bytes(written.tolist()), "little")


BFLOAT16 = {  # bits of the value -> what is written, bits of what is lost
    "exact": (0x3FC00000, 0x3FC0, 0),
    "down": (0x3F800001, 0x3F80, 0x34000000),
    "up": (0x3F80C000, 0x3F81, 0xBB000000),
    "half-way-to-the-even-one-below": (0x3F808000, 0x3F80, 0x3B800000),
    "half-way-to-the-even-one-above": (0x3F818000, 0x3F82, 0xBB800000),
    "negative": (0xBF80C000, 0xBF81, 0x3B000000),
    "minus-zero": (0x80000000, 0x8000, 0),
    "smallest-denormal": (0x00000001, 0x0000, 0x00000001),
    "denormal-up": (0x0000C000, 0x0001, 0x80004000),
    "denormal-to-normal": (0x007FFFFF, 0x0080, 0x80000001),
    "largest-that-rounds-down": (0x7F7F7FFF, 0x7F7F, 0x7AFFFE00),
    "largest": (0x7F7FFFFF, 0x7F7F, 0x7B7FFF00),
    "most-negative": (0xFF7FFFFF, 0xFF7F, 0xFB7FFF00),
    "inf": (0x7F800000, 0x7F80, 0),
    "minus-inf": (0xFF800000, 0xFF80, 0),
    "nan": (0x7FC00000, 0x7FC0, 0),
    "signalling-nan": (0x7F800001, 0x7FC0, 0),
    "negative-nan": (0xFFFFFFFF, 0x7FC0, 0),
}


@pytest.mark.parametrize(("bits", "written", "lost"), BFLOAT16.values(), ids=BFLOAT16.keys())
def test_bf16_rounds_to_nearest_even_and_the_residual_keeps_the_rest(bits, written, lost):
    residual = torch.zeros(1)
    assert encoded_value(float_of(bits), residual, "bf16") == written
    assert_same_bits(residual, float_of(lost))


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_every_nan_is_written_alike(bits):
    for value_format, written in (("fp32", 0x7FC00000), ("bf16", 0x7FC0), ("sign", 0)):
        residual = torch.zeros(1)
        assert encoded_value(float_of(bits), residual, value_format) == written
        assert_same_bits(residual, torch.zeros(1))


SIGNS = {  # values of one group -> signs, scale
    "mean": ([1.0, -2.0, 6.0], 0b010, 3.0),
    "zeros": ([0.0, -0.0, 0.0], 0b010, 0.0),
    "minus-zero-is-negative": ([-0.0, 1.0], 0b01, 0.5),
    "rounded-once": ([1.0, 1.0, 2.0], 0b000, 4 / 3),
    "largest": ([3.4028234663852886e38] * 3, 0b000, 3.4028234663852886e38),
    "denormals": ([2.0**-149, -(2.0**-149)], 0b10, 2.0**-149),
    "half-a-denormal-goes-to-the-even-one": ([2.0**-149, 0.0], 0b00, 0.0),
    "far-apart": ([2.0**100, -(2.0**-100)], 0b10, 2.0**99),
}


@pytest.mark.parametrize(("values", "signs", "scale"), SIGNS.values(), ids=SIGNS.keys())
def test_sign_sends_a_bit_for_each_value_and_their_mean_magnitude(values, signs, scale):
    count = len(values)
    layout = Layout([count], [0], [count])
    values, residual = torch.tensor(values), torch.zeros(count)
    payload = ops.encode(
        values, torch.arange(count, dtype=torch.int32), torch.zeros(count), *layout.arguments,
        value_format="sign", residual=residual, rank=0,
    )  # fmt: skip
    sections = sections_of(payload, layout, "sign")
    assert sections["values"].tolist() == [signs, 0, 0, 0]
    assert_same_bits(sections["scales"].view(torch.float32), torch.tensor([scale]))
    decoded = torch.copysign(torch.tensor(scale), values)
    assert_same_bits(residual, values - decoded + 0.0)


def test_each_selection_has_a_scale_of_its_own(seed):
    layout = LAYOUTS["many-tensors"]
    gradient, residual = inputs_of("heavy-tail", layout, torch.float32, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
    options = {"value_format": "sign", "rank": 0}
    payload = ops.encode(values, indices, gradient, *layout.arguments, **options)
    scales = sections_of(payload, layout, "sign")["scales"].view(torch.float32)
    means = [part.double().abs().mean() for part in values.split(layout.k)]
    assert_same_bits(scales, torch.stack(means).float())


@pytest.mark.parametrize("reason", ["compensated", "dense"])
def test_of_a_non_finite_bucket_no_sign_is_sent_and_all_of_it_comes_back(reason, seed):
    gradient, residual = inputs_of("normal", BUCKET, torch.float32, seed)
    acc = gradient + residual
    values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
    if reason == "dense":
        gradient[320] = torch.inf
    options = {"value_format": "sign", "non_finite": reason == "compensated"}
    payload = ops.encode(
        values,
        indices,
        gradient,
        *BUCKET.arguments,
        residual=residual,
        rank=0,
        **options,
    )
    assert payload[1] == 1
    assert not sections_of(payload, BUCKET, "sign")["scales"].any()
    grouped = torch.ones(BUCKET.numel, dtype=torch.bool)
    grouped[300:350] = False
    assert_same_bits(residual[grouped], acc[grouped])


@each_value_format
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_residual_changes_at_finite_selected_entries_alone(kind, value_format, seed):
    gradient, residual = inputs_of(kind, WIDE, torch.float32, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *WIDE.arguments)
    before = residual.clone()
    options = {"value_format": value_format, "rank": 0}
    ops.encode(values, indices, gradient, *WIDE.arguments, residual=residual, **options)
    at = indices[torch.isfinite(values)].long()
    if value_format == "fp32":
        assert_same_bits(residual, before)
    elif value_format == "bf16":
        lost = values[torch.isfinite(values)]
        lost = lost - lost.to(torch.bfloat16).float().clamp(-3.3895314e38, 3.3895314e38)
        torch.testing.assert_close(residual[at], before[at] + lost, rtol=0, atol=0)
    residual[at] = before[at]
    assert_same_bits(residual, before)


@each_value_format
def test_without_a_residual_the_payload_is_the_same(value_format, seed):
    gradient, residual = inputs_of("normal", BUCKET, torch.float32, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
    options = {"value_format": value_format, "rank": 0}
    dropped = ops.encode(values, indices, gradient, *BUCKET.arguments, **options)
    kept = ops.encode(values, indices, gradient, *BUCKET.arguments, residual=residual, **options)
    assert_same_bits(dropped, kept)


def test_the_default_value_format_is_bf16(seed):
    gradient, residual = inputs_of("normal", BUCKET, torch.float32, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
    arguments = (values, indices, gradient, *BUCKET.arguments)
    for stages in (ops, reference):
        payload = stages.encode(*arguments, rank=0)
        assert_same_bits(payload, stages.encode(*arguments, value_format="bf16", rank=0))
        assert payload.numel() == stages.payload_bytes(*BUCKET.arguments)


# ---- the flag


@pytest.mark.parametrize("dtype", DTYPES)
@each_value_format
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_non_finite_dense_entry_sets_the_flag(value, value_format, dtype):
    gradient = torch.ones(12, dtype=dtype)
    values, indices = torch.ones(3), torch.tensor([0, 1, 8], dtype=torch.int32)
    options = {"value_format": value_format, "rank": 0}
    assert ops.encode(values, indices, gradient, *SMALL.arguments, **options)[1] == 0
    gradient[7] = value
    payload = ops.encode(values, indices, gradient, *SMALL.arguments, **options)
    assert payload[1] == 1
    assert_same_bits(
        payload, reference.encode(values, indices, gradient, *SMALL.arguments, **options)
    )


@each_value_format
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_non_finite_value_sets_the_flag_although_the_caller_does_not(value, value_format):
    values, indices = torch.tensor([1.0, value, 3.0]), torch.tensor([0, 1, 8], dtype=torch.int32)
    arguments = (values, indices, torch.ones(12), *SMALL.arguments)
    options = {"value_format": value_format, "rank": 0}
    residual, expected_residual = torch.zeros(12), torch.zeros(12)
    payload = ops.encode(*arguments, residual=residual, **options)
    assert payload[1] == 1
    expected = reference.encode(*arguments, residual=expected_residual, **options)
    assert_same_bits(payload, expected)
    assert_same_bits(residual, expected_residual)
    flagged = ops.encode(*arguments, non_finite=True, **options)
    assert_same_bits(payload, flagged)
    if value_format == "sign":
        assert_same_bits(residual[[0, 1, 8]], torch.tensor([1.0, 0.0, 3.0]))


def test_a_non_finite_entry_that_is_not_selected_is_the_callers_to_report():
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
            non_finite=reported,
        )
        assert payload[1] == int(reported)


@each_value_format
def test_the_inputs_but_the_residual_are_not_changed(value_format, seed):
    gradient, residual = inputs_of("nan", BUCKET, torch.float16, seed)
    values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
    before = [tensor.clone() for tensor in (values, indices, gradient)]
    options = {"value_format": value_format, "residual": residual, "rank": 0}
    ops.encode(values, indices, gradient, *BUCKET.arguments, **options)
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
    "value-format": (
        ValueError,
        "value_format must be one of ('fp32', 'bf16', 'sign'), got 'fp16'",
        {"value_format": "fp16"},
    ),
    "value-format-none": (
        ValueError,
        "value_format must be one of ('fp32', 'bf16', 'sign'), got None",
        {"value_format": None},
    ),
    "indices-descending": (
        ValueError,
        "expected indices to ascend strictly",
        {"indices": torch.tensor([1, 0, 8], dtype=INT32)},
    ),
    "indices-twice": (
        ValueError,
        "expected indices to ascend strictly",
        {"indices": torch.tensor([1, 1, 8], dtype=INT32)},
    ),
    "indices-negative": (
        ValueError,
        "the indices of group 0 are not in [0, 5]",
        {"indices": torch.tensor([-1, 1, 8], dtype=INT32)},
    ),
    "indices-beyond": (
        ValueError,
        "the indices of group 1 are not in [8, 11]",
        {"indices": torch.tensor([0, 1, 12], dtype=INT32)},
    ),
    "indices-in-a-dense-segment": (
        ValueError,
        "index 6 lies in a dense segment; expected what compensate_select_ returned",
        {
            "indices": torch.tensor([0, 6, 8], dtype=INT32),
            "groups": [0, -1, 0],
            "k": [3],
        },
    ),
    "residual-numel": (
        ValueError,
        "expected residual to be flat and contiguous",
        {"residual": torch.zeros(11)},
    ),
    "residual-stride": (
        ValueError,
        "expected residual to be flat and contiguous",
        {"residual": torch.zeros(24)[::2]},
    ),
    "residual-dtype": (
        TypeError,
        "expected residual to have dtype Float, got Half",
        {"residual": torch.zeros(12).half()},
    ),
    "rank-negative": (ValueError, "expected rank >= 0, got -1", {"rank": -1}),
}


def refusal_of(stages, error, changes):
    """The words with which `stages` refuse good arguments with these changes."""
    arguments = {
        "values": torch.ones(3),
        "indices": torch.tensor([0, 1, 8], dtype=torch.int32),
        "gradient": torch.ones(12),
        "segments": [6, 2, 4],
        "groups": [0, -1, 1],
        "k": [2, 1],
        "rank": 0,
    }
    residual = torch.zeros(12)
    with pytest.raises(error) as caught:
        stages.encode(**(arguments | {"residual": residual} | changes))
    assert_same_bits(residual, torch.zeros(12))
    return str(caught.value)


each_refusal = pytest.mark.parametrize(
    ("error", "words", "changes"), REFUSALS.values(), ids=REFUSALS.keys()
)


@each_refusal
def test_wrong_arguments_are_refused_in_words(error, words, changes):
    assert words in refusal_of(ops, error, changes)


@each_refusal
def test_the_reference_refuses_the_same_arguments_in_the_same_words(error, words, changes):
    of_both = [refusal_of(stages, error, changes) for stages in (ops, reference)]
    native, of_reference = (words.split("dtype")[0] for words in of_both)  # torch's C++ names
    assert of_reference == native


# ---- as a citizen of torch


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_finds_nothing(dtype, value_format, seed):
    for layout in (BUCKET, LAYOUTS["all-dense"]):
        gradient, residual = inputs_of("normal", layout, dtype, seed)
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout.arguments)
        for given in (residual, None):
            torch.library.opcheck(
                torch.ops.compressed_ddp.encode.default,
                (values, indices, gradient, *layout.arguments),
                {
                    "value_format": value_format,
                    "residual": given,
                    "rank": 1,
                    "step": 3,
                    "non_finite": True,
                },
            )


@each_value_format
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_the_fake_kernel_knows_the_size(layout, value_format, seed):
    gradient, residual = inputs_of("normal", layout, torch.float16, seed)
    inputs = ops.compensate_select_(gradient, residual, *layout.arguments)[:2]
    options = {"value_format": value_format, "rank": 0}
    real = ops.encode(*inputs, gradient, *layout.arguments, **options)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*inputs, gradient)]
        fake = ops.encode(*fakes, *layout.arguments, **options)
    assert (fake.shape, fake.dtype) == (real.shape, torch.uint8)


@each_value_format
def test_it_compiles_into_one_graph_with_the_selection(value_format, seed):
    def compress(gradient, residual):
        values, indices, _ = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
        options = {"value_format": value_format, "residual": residual}
        return ops.encode(values, indices, gradient, *BUCKET.arguments, rank=0, **options)

    gradient, residual = inputs_of("normal", BUCKET, torch.bfloat16, seed)
    expected_residual = residual.clone()
    expected = compress(gradient, expected_residual)
    compiled = torch.compile(compress, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(gradient, residual), expected)
    assert_same_bits(residual, expected_residual)
