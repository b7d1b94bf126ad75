"""The oracle itself: reference.py against the contracts written down a second time, in NumPy, from the prose alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stage_cases import (
    BUCKET,
    DTYPES,
    GRADIENTS,
    LAYOUTS,
    WIDE,
    Layout,
    assert_same_bits,
    each_value_format,
    encoded_by,
    inputs_of,
    sections_of,
    write_indices,
)

from compressed_ddp import ops, reference
from compressed_ddp._native import _C

LAYOUT_PARAMS = [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()]
OPERATORS = ["compensate_select_", "encode", "decode_apply_", "restore_"]


def selected_by_contract(acc: np.ndarray, layout: Layout) -> np.ndarray:
    """Indices: per group the k entries first in order of (larger |acc|, NaN above Inf, lower index); then ascending."""
    bounds = np.cumsum([0, *layout.segments])
    chosen: list[int] = []
    for group, k in enumerate(layout.k):
        members = [
            i
            for segment, its_group in enumerate(layout.groups)
            if its_group == group
            for i in range(bounds[segment], bounds[segment + 1])
        ]
        rank = {i: (2, 0.0) if np.isnan(acc[i]) else (1, abs(acc[i])) for i in members}
        chosen += sorted(members, key=lambda i: (-rank[i][0], -rank[i][1], i))[:k]
    return np.array(sorted(chosen), dtype=np.int64)


def bfloat16_by_contract(value: np.float32) -> np.float32:
    """The nearest number with 8 significant bits, of two the one with an even last bit; finite stays finite."""
    if not np.isfinite(value):
        return value
    bits = int(np.float32(value).view(np.uint32))
    below = bits & ~0xFFFF
    rest, is_odd = bits & 0xFFFF, bits >> 16 & 1
    rounded = below + 0x10000 if rest > 0x8000 or (rest == 0x8000 and is_odd) else below
    if rounded & 0x7FFFFFFF == 0x7F800000:
        rounded -= 0x10000
    return np.uint32(rounded).view(np.float32)


def scale_by_contract(values: np.ndarray) -> np.float32:
    """The mean magnitude of one group: whole numbers per exponent, 32 partial sums in double, then a tree."""
    sums = [0] * 256
    for value in values:
        bits = int(np.float32(value).view(np.uint32))
        exponent, mantissa = bits >> 23 & 255, bits & 0x7FFFFF
        sums[exponent] += mantissa + (2**23 if exponent > 0 else 0)
    sums[255] = 0
    partial = []
    for lane in range(32):
        total = 0.0
        for exponent in range(8 * lane, 8 * lane + 8):
            total += float(sums[exponent]) * 2.0 ** (max(exponent, 1) - 150)
        partial.append(total)
    for distance in (1, 2, 4, 8, 16):
        partial = [partial[lane] + partial[lane ^ distance] for lane in range(32)]
    return np.float32(partial[0] * (1.0 / len(values)))


def decoded_by_contract(
    values: np.ndarray, layout: Layout, value_format: str, *, flagged: bool = False
) -> np.ndarray:
    if value_format == "fp32":
        return values
    if value_format == "bf16":
        return np.array([bfloat16_by_contract(value) for value in values], dtype=np.float32)
    decoded = []
    for part in np.split(values, np.cumsum(layout.k)[:-1]) if layout.k else []:
        scale = np.float32(0.0 if flagged else scale_by_contract(part))
        decoded += [-scale if np.signbit(v) and not np.isnan(v) else scale for v in part]
    return np.array(decoded, dtype=np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_selection_is_the_k_largest_magnitudes_ties_to_the_lower_index(kind, dtype, seed):
    for name in ("numel=1", "k=1", "k=numel", "tensors-with-dense-between", "empty-segments"):
        layout = LAYOUTS[name]
        gradient, residual = inputs_of(kind, layout, dtype, seed)
        with np.errstate(all="ignore"):
            acc = gradient.float().numpy() + residual.numpy()
        before = residual.numpy().copy()
        values, indices, _ = reference.compensate_select_(gradient, residual, *layout.arguments)

        chosen = selected_by_contract(acc, layout)
        np.testing.assert_array_equal(indices.numpy(), chosen)
        sent = acc[chosen].copy()
        sent[np.isnan(sent)] = np.float32(np.nan)
        assert values.numpy().tobytes() == sent.tobytes()

        expected = np.where(np.isfinite(acc), acc, before)
        expected[[i for i in chosen if np.isfinite(acc[i])]] = 0
        grouped = np.repeat(np.array(layout.groups) >= 0, layout.segments)
        assert residual.numpy().tobytes() == np.where(grouped, expected, before).tobytes()


@each_value_format
@pytest.mark.parametrize("kind", GRADIENTS)
def test_encode_gives_back_what_decoding_does_not(kind, value_format, seed):
    for name in ("numel=1", "k=numel", "tensors-with-dense-between", "empty-segments", "all-dense"):
        layout = LAYOUTS[name]
        gradient, residual = inputs_of(kind, layout, torch.float32, seed)
        values, indices, statistics = reference.compensate_select_(
            gradient, residual, *layout.arguments
        )
        before = residual.numpy().copy()
        options = {"value_format": value_format, "non_finite": bool(statistics[3] > 0)}
        payload = reference.encode(
            values, indices, gradient, *layout.arguments, residual=residual, rank=0, **options
        )  # fmt: skip
        numbers = values.numpy()
        decoded = decoded_by_contract(numbers, layout, value_format, flagged=payload[1] == 1)
        expected = before.copy()
        for index, value, sent in zip(indices.tolist(), numbers, decoded):
            if np.isfinite(value) and value != sent:
                expected[index] += value - sent
        assert residual.numpy().tobytes() == expected.tobytes()

        for index, sent in zip(indices.tolist(), decoded):
            if np.isfinite(sent) and sent != 0:
                expected[index] += sent
        reference.restore_(residual, payload, *layout.arguments, value_format=value_format)
        assert residual.numpy().tobytes() == expected.tobytes()


@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_average_is_the_rank_ordered_sum_times_the_fp32_inverse(dtype, value_format, seed):
    world_size, layout = 3, BUCKET
    gradients, residuals = zip(
        *(inputs_of("normal", layout, dtype, seed + rank) for rank in range(world_size))
    )
    total = np.zeros(layout.numel, dtype=np.float32)
    for gradient, residual in zip(gradients, residuals):
        acc = gradient.float().numpy() + residual.numpy()
        chosen = selected_by_contract(acc, layout)
        sent = np.zeros(layout.numel, dtype=np.float32)
        sent[chosen] = decoded_by_contract(acc[chosen], layout, value_format)
        sent[300:350] = gradient[300:350].float().numpy()
        total = total + sent
    expected = torch.from_numpy(total * np.float32(1 / 3)).to(dtype)
    result = reference.average(gradients, residuals, *layout.arguments, value_format=value_format)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@each_value_format
@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_average_with_one_non_finite_rank_is_nan_everywhere(kind, value_format, seed):
    layout = LAYOUTS["k=1"]
    gradients = [torch.ones(1000), inputs_of(kind, layout, torch.float32, seed)[0]]
    residuals = [torch.zeros(1000), torch.zeros(1000)]
    result = reference.average(gradients, residuals, *layout.arguments, value_format=value_format)
    assert torch.isnan(result).all()


@each_value_format
@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_payload_bytes_equals_the_engines(layout, value_format):
    expected = _C.payload_bytes(*layout.arguments, value_format)
    assert reference.payload_bytes(*layout.arguments, value_format) == expected
    assert ops.payload_bytes(*layout.arguments, value_format) == expected


def test_a_value_format_that_does_not_exist_is_refused_by_the_reference_too():
    words = r"value_format must be one of \('fp32', 'bf16', 'sign'\), got 'fp8'"
    with pytest.raises(ValueError, match=words):
        reference.payload_bytes(*BUCKET.arguments, "fp8")
    gathered = encoded_by(reference, BUCKET, 1)
    with pytest.raises(ValueError, match=words):
        reference.decode_apply_(
            torch.ones(BUCKET.numel), gathered, *BUCKET.arguments, value_format="fp8"
        )


@pytest.mark.parametrize("offset", range(2, 8), ids="byte={}".format)
def test_a_wrong_header_is_refused_by_the_reference_too(offset, seed):
    gradient, residual = inputs_of("normal", BUCKET, torch.float32, seed)
    values, indices, _ = reference.compensate_select_(gradient, residual, *BUCKET.arguments)
    payload = reference.encode(values, indices, gradient, *BUCKET.arguments, rank=0)
    payload[offset] ^= 1
    bucket = torch.ones(BUCKET.numel)
    with pytest.raises(ValueError, match="the payload of rank 0 is not what this rank expects"):
        reference.decode_apply_(bucket, payload[None], *BUCKET.arguments)
    assert_same_bits(bucket, torch.ones(BUCKET.numel))


@each_value_format
@pytest.mark.parametrize("section", ["directory", "high", "low"])
def test_wrong_indices_are_refused_by_the_reference_too(section, value_format, seed):
    gathered = encoded_by(reference, WIDE, 2, value_format=value_format, seed=seed)
    if section == "low":
        write_indices(gathered[1], WIDE, list(range(300)) + [1040] * 20, value_format)
    else:
        sections_of(gathered[1], WIDE, value_format)[section][-1] ^= 1
    bucket = torch.ones(WIDE.numel)
    with pytest.raises(ValueError, match="the payload of rank 1 is not what this rank expects"):
        reference.decode_apply_(bucket, gathered, *WIDE.arguments, value_format=value_format)
    assert_same_bits(bucket, torch.ones(WIDE.numel))


@each_value_format
@pytest.mark.parametrize("device", ["CUDA", "MPS", "XPU"])
def test_buckets_on_other_devices_run_the_reference(device, value_format, seed):
    # Here the kernel that is registered for the device gets host tensors: no device needed.
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))

    def on_device(operator, *arguments, **options):
        overload = getattr(torch.ops.compressed_ddp, operator).default
        return overload.redispatch(keys, *arguments, **options)

    gradient, residual = inputs_of("normal", BUCKET, torch.float16, seed)
    native_residual = residual.clone()
    entries = on_device("compensate_select_", gradient, residual, *BUCKET.arguments)[:2]
    native_entries = ops.compensate_select_(gradient, native_residual, *BUCKET.arguments)[:2]
    assert_same_bits(residual, native_residual)
    its_format = {"value_format": value_format}
    options = {"rank": 0, **its_format}
    arguments = (gradient, *BUCKET.arguments)
    payload = on_device("encode", *entries, *arguments, residual=residual, **options)
    native_payload = ops.encode(*native_entries, *arguments, residual=native_residual, **options)
    assert_same_bits(payload, native_payload)
    assert_same_bits(residual, native_residual)
    bucket, native_bucket = torch.empty_like(gradient), torch.empty_like(gradient)
    on_device("decode_apply_", bucket, payload[None], *BUCKET.arguments, **its_format)
    ops.decode_apply_(native_bucket, payload[None], *BUCKET.arguments, **its_format)
    assert_same_bits(bucket, native_bucket)
    on_device("restore_", residual, payload, *BUCKET.arguments, **its_format)
    ops.restore_(native_residual, payload, *BUCKET.arguments, **its_format)
    assert_same_bits(residual, native_residual)


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_host_buckets_run_the_native_kernel(operator):
    lines = torch._C._dispatch_dump_table(f"compressed_ddp::{operator}").splitlines()
    where = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert "ops.cpp" in where["CPU"]
    for device in ("CUDA", "MPS", "XPU"):
        assert "library.py" in where[device], where[device]


@pytest.mark.needs_cuda
@each_value_format
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_cuda_bucket_gives_the_same_payload_average_and_residual_as_a_cpu_bucket(
    kind, dtype, value_format, seed
):
    results = []
    for device in ("cpu", "cuda"):
        gradient, residual = (part.to(device) for part in inputs_of(kind, BUCKET, dtype, seed))
        values, indices, statistics = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
        options = {"rank": 0, "non_finite": bool(statistics[3] > 0)}
        options |= {"value_format": value_format, "residual": residual}
        payload = ops.encode(values, indices, gradient, *BUCKET.arguments, **options)
        bucket = torch.empty_like(gradient)
        ops.decode_apply_(bucket, payload[None], *BUCKET.arguments, value_format=value_format)
        left = residual.clone()
        ops.restore_(residual, payload, *BUCKET.arguments, value_format=value_format)
        results.append([part.cpu() for part in (payload, bucket, left, residual)])
    for on_cpu, on_cuda in zip(*results):
        assert_same_bits(on_cuda, on_cpu)
