"""restore_ undoes what compensate_select_ and encode took, and refuses payloads that are not meant for the layout."""

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
    WIDE,
    assert_same_bits,
    each_value_format,
    indices_of,
    inputs_of,
    sections_of,
    write_indices,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_ddp import ops, reference

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]


def compressed(kind, layout, dtype, seed, value_format="bf16"):
    """(gradient, residual before, residual after, payload)"""
    gradient, residual = inputs_of(kind, layout, dtype, seed)
    before = residual.clone()
    values, indices, statistics = ops.compensate_select_(gradient, residual, *layout.arguments)
    options = {"value_format": value_format, "residual": residual}
    options |= {"rank": 0, "non_finite": bool(statistics[3] > 0)}
    payload = ops.encode(values, indices, gradient, *layout.arguments, **options)
    return gradient, before, residual, payload


@each_value_format
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_restored_residual_equals_the_reference(kind, layout, value_format, seed):
    _, _, residual, payload = compressed(kind, layout, torch.float32, seed, value_format)
    expected = residual.clone()
    ops.restore_(residual, payload, *layout.arguments, value_format=value_format)
    reference.restore_(expected, payload, *layout.arguments, value_format=value_format)
    assert_same_bits(residual, expected)


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_afterwards_the_residual_holds_all_that_was_finite(kind, dtype, value_format, seed):
    gradient, before, residual, payload = compressed(kind, BUCKET, dtype, seed, value_format)
    ops.restore_(residual, payload, *BUCKET.arguments, value_format=value_format)
    acc = gradient.float() + before
    expected = torch.where(torch.isfinite(acc), acc, before)
    expected[300:350] = before[300:350]  # the dense segment
    if value_format == "sign" and payload[1] == 0:  # acc - scale is rounded
        largest = float(expected[torch.isfinite(acc)].abs().max())
        torch.testing.assert_close(residual, expected, rtol=0, atol=2.0**-23 * largest)
    else:
        torch.testing.assert_close(residual, expected, rtol=0, atol=0)  # == : -0 comes back as +0


def test_what_a_wrong_scale_could_put_back_is_ignored_unless_finite(seed):
    _, _, residual, payload = compressed("normal", BUCKET, torch.float32, seed, "sign")
    sections_of(payload, BUCKET, "sign")["scales"].view(torch.float32)[1] = torch.inf
    expected = residual.clone()
    ops.restore_(residual, payload, *BUCKET.arguments, value_format="sign")
    reference.restore_(expected, payload, *BUCKET.arguments, value_format="sign")
    assert_same_bits(residual, expected)
    assert torch.isfinite(residual).all()


@each_value_format
def test_dense_segments_of_the_residual_are_left_alone(value_format, seed):
    _, before, residual, payload = compressed("normal", BUCKET, torch.float32, seed, value_format)
    ops.restore_(residual, payload, *BUCKET.arguments, value_format=value_format)
    assert_same_bits(residual[300:350], before[300:350])


def test_an_entry_in_a_dense_segment_between_those_of_a_group_is_passed_over(seed):
    _, _, residual, payload = compressed("normal", BUCKET, torch.float32, seed, "fp32")
    indices = indices_of(payload, BUCKET, "fp32")
    at = max(e for e, index in enumerate(indices) if index < 300)
    indices[at] = 320  # of segment 1, which is dense; group 0 has segments 0 and 2
    write_indices(payload, BUCKET, indices, "fp32")
    expected, dense = residual.clone(), residual[300:350].clone()
    ops.restore_(residual, payload, *BUCKET.arguments, value_format="fp32")
    reference.restore_(expected, payload, *BUCKET.arguments, value_format="fp32")
    assert_same_bits(residual, expected)
    assert_same_bits(residual[300:350], dense)


# ---- refusals


def refused(error, words, residual=None, payload=None, layout=SMALL):
    _, _, good_residual, good_payload = compressed("normal", SMALL, torch.float32, 0)
    residual = good_residual if residual is None else residual
    payload = good_payload if payload is None else payload
    before = residual.clone()
    with pytest.raises(error, match=re.escape(f"restore_: {words}")):
        ops.restore_(residual, payload, *layout.arguments)
    assert_same_bits(residual, before)
    if "aligned" in words:  # the reference copies the bytes first
        return
    words = words.partition(" (")[0].partition("dtype")[0]  # without the field; torch's C++ names
    with pytest.raises(error, match=re.escape(f"restore_: {words}")):
        reference.restore_(residual, payload, *layout.arguments)
    assert_same_bits(residual, before)


def test_wrong_tensors_are_refused_in_words():
    uint8 = torch.uint8
    refused(ValueError, "expected residual to be flat and contiguous", residual=torch.ones(11))
    refused(ValueError, "expected residual to be flat and contiguous", residual=torch.ones(3, 4))
    refused(TypeError, "expected residual to have dtype Float", residual=torch.ones(12).half())
    refused(TypeError, "expected payload to have dtype Byte, got Int", payload=torch.ones(40).int())
    size = "expected payload to be flat and contiguous with 40 bytes, got"
    refused(ValueError, f"{size} [127]", payload=torch.ones(127, dtype=uint8))
    refused(ValueError, f"{size} [1, 40]", payload=torch.ones(1, 40, dtype=uint8))
    refused(ValueError, f"{size} [40]", payload=torch.ones(80, dtype=uint8)[::2])
    refused(
        ValueError,
        "expected payload to be aligned to 8 bytes; clone() it",
        payload=torch.ones(136, dtype=uint8)[4:132],
    )


def test_a_layout_that_makes_no_sense_is_refused():
    _, _, residual, payload = compressed("normal", SMALL, torch.float32, 0)
    with pytest.raises(ValueError, match=re.escape("restore_: layout: expected one k per group")):
        ops.restore_(residual, payload, SMALL.segments, SMALL.groups, [2])
    with pytest.raises(ValueError, match=re.escape("restore_: layout: expected one k per group")):
        reference.restore_(residual, payload, SMALL.segments, SMALL.groups, [2])


@each_value_format
def test_a_payload_of_another_value_format_is_not_added(value_format, seed):
    _, _, residual, payload = compressed("normal", BUCKET, torch.float32, seed, value_format)
    before = residual.clone()
    for other in {"fp32", "bf16", "sign"} - {value_format}:
        size = ops.payload_bytes(*BUCKET.arguments, other)
        foreign = torch.zeros(size, dtype=torch.uint8)
        common = min(size, payload.numel())
        foreign[:common] = payload[:common]
        for stages in (ops, reference):
            with pytest.raises(ValueError, match="restore_: the payload does not fit the layout"):
                stages.restore_(residual, foreign, *BUCKET.arguments, value_format=other)
            assert_same_bits(residual, before)


def test_a_value_format_that_does_not_exist_is_refused():
    _, _, residual, payload = compressed("normal", SMALL, torch.float32, 0)
    for value_format in ("fp64", None):
        words = (
            f"restore_: value_format must be one of ('fp32', 'bf16', 'sign'), got {value_format!r}"
        )
        for stages in (ops, reference):
            with pytest.raises(ValueError, match=re.escape(words)):
                stages.restore_(residual, payload, *SMALL.arguments, value_format=value_format)


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        pytest.param(0, "wire format version", id="version"),
        pytest.param(6, "layout differs", id="layout"),
        pytest.param(7, "layout differs", id="layout-high"),
    ],
)
def test_a_payload_of_another_layout_is_refused_by_field(offset, field):
    _, _, _, payload = compressed("normal", SMALL, torch.float32, 0)
    payload[offset] ^= 1
    refused(ValueError, f"the payload does not fit the layout ({field}", payload=payload)


@pytest.mark.parametrize(
    "indices", [[1, 0, 8], [3, 3, 8], [3, 6, 8], [0, 5, 12], [0, 5, 7], [0, 5, 255]], ids=str
)
def test_a_payload_with_impossible_indices_is_refused(indices):
    _, _, _, payload = compressed("normal", SMALL, torch.float32, 0)
    write_indices(payload, SMALL, indices)
    refused(ValueError, "the payload does not fit the layout (", payload=payload)


@pytest.mark.parametrize("name", ["directory", "high"])
def test_a_payload_whose_index_sections_contradict_themselves_is_refused(name):
    _, _, residual, payload = compressed("normal", WIDE, torch.float32, 0)
    sections_of(payload, WIDE)[name][-4] ^= 1
    refused(ValueError, "the payload does not fit the layout (", residual, payload, WIDE)


# ---- as a citizen of torch


@each_value_format
def test_opcheck_finds_nothing(value_format, seed):
    for layout in (BUCKET, LAYOUTS["empty"]):
        _, _, residual, payload = compressed("normal", layout, torch.float32, seed, value_format)
        torch.library.opcheck(
            torch.ops.compressed_ddp.restore_.default,
            (residual, payload, *layout.arguments),
            {"value_format": value_format},
        )


def test_the_fake_kernel_refuses_what_the_real_one_refuses():
    _, _, residual, payload = compressed("normal", BUCKET, torch.float32, 0)
    restore_ = torch.ops.compressed_ddp.restore_.default  # not checked in Python first
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(residual), mode.from_tensor(payload)
        with pytest.raises(ValueError, match="restore_: value_format must be one of"):
            restore_(*fakes, *BUCKET.arguments, value_format="fp64")
        with pytest.raises(ValueError, match="restore_: layout: expected one k per group"):
            restore_(*fakes, BUCKET.segments, BUCKET.groups, [2])


@each_value_format
def test_the_fake_kernel_returns_nothing(value_format, seed):
    _, _, residual, payload = compressed("normal", BUCKET, torch.float32, seed, value_format)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(residual), mode.from_tensor(payload)
        assert ops.restore_(*fakes, *BUCKET.arguments, value_format=value_format) is None
