"""The oracle itself: reference.py against the contracts written down a second time, in NumPy, from the prose alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stage_cases import BUCKET, DTYPES, GRADIENTS, LAYOUTS, Layout, assert_same_bits, inputs_of

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_average_is_the_rank_ordered_sum_times_the_fp32_inverse(dtype, seed):
    world_size, layout = 3, BUCKET
    gradients, residuals = zip(
        *(inputs_of("normal", layout, dtype, seed + rank) for rank in range(world_size))
    )
    total = np.zeros(layout.numel, dtype=np.float32)
    for gradient, residual in zip(gradients, residuals):
        acc = gradient.float().numpy() + residual.numpy()
        chosen = selected_by_contract(acc, layout)
        sent = np.zeros(layout.numel, dtype=np.float32)
        sent[chosen] = acc[chosen]
        sent[300:350] = gradient[300:350].float().numpy()
        total = total + sent
    expected = torch.from_numpy(total * np.float32(1 / 3)).to(dtype)
    result = reference.average(gradients, residuals, *layout.arguments)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_average_with_one_non_finite_rank_is_nan_everywhere(kind, seed):
    layout = LAYOUTS["k=1"]
    gradients = [torch.ones(1000), inputs_of(kind, layout, torch.float32, seed)[0]]
    residuals = [torch.zeros(1000), torch.zeros(1000)]
    assert torch.isnan(reference.average(gradients, residuals, *layout.arguments)).all()


@pytest.mark.parametrize("layout", LAYOUT_PARAMS)
def test_payload_bytes_equals_the_engines(layout):
    assert reference.payload_bytes(*layout.arguments) == _C.payload_bytes(*layout.arguments)
    assert ops.payload_bytes(*layout.arguments) == _C.payload_bytes(*layout.arguments)


@pytest.mark.parametrize("offset", [0, 4, 8, 12, 16, 24, 32, 40, 48, 56], ids="byte={}".format)
def test_a_wrong_header_is_refused_by_the_reference_too(offset, seed):
    gradient, residual = inputs_of("normal", BUCKET, torch.float32, seed)
    values, indices, _ = reference.compensate_select_(gradient, residual, *BUCKET.arguments)
    payload = reference.encode(values, indices, gradient, *BUCKET.arguments, rank=0, world_size=1)
    payload[offset] ^= 1
    bucket = torch.ones(BUCKET.numel)
    with pytest.raises(ValueError, match="the payload of rank 0 is not what this rank expects"):
        reference.decode_apply_(bucket, payload[None], *BUCKET.arguments)
    assert_same_bits(bucket, torch.ones(BUCKET.numel))


@pytest.mark.parametrize("device", ["CUDA", "MPS", "XPU"])
def test_buckets_on_other_devices_run_the_reference(device, seed):
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
    options = {"rank": 0, "world_size": 1}
    payload = on_device("encode", *entries, gradient, *BUCKET.arguments, **options)
    native_payload = ops.encode(*native_entries, gradient, *BUCKET.arguments, **options)
    assert_same_bits(payload, native_payload)
    bucket, native_bucket = torch.empty_like(gradient), torch.empty_like(gradient)
    on_device("decode_apply_", bucket, payload[None], *BUCKET.arguments)
    ops.decode_apply_(native_bucket, payload[None], *BUCKET.arguments)
    assert_same_bits(bucket, native_bucket)
    on_device("restore_", residual, payload, *BUCKET.arguments)
    ops.restore_(native_residual, payload, *BUCKET.arguments)
    assert_same_bits(residual, native_residual)


@pytest.mark.parametrize("operator", OPERATORS)
def test_only_host_buckets_run_the_native_kernel(operator):
    lines = torch._C._dispatch_dump_table(f"compressed_ddp::{operator}").splitlines()
    where = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert "ops.cpp" in where["CPU"]
    for device in ("CUDA", "MPS", "XPU"):
        assert "library.py" in where[device], where[device]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_cuda_bucket_gives_the_same_payload_average_and_residual_as_a_cpu_bucket(
    kind, dtype, seed
):
    results = []
    for device in ("cpu", "cuda"):
        gradient, residual = (part.to(device) for part in inputs_of(kind, BUCKET, dtype, seed))
        values, indices, statistics = ops.compensate_select_(gradient, residual, *BUCKET.arguments)
        options = {"rank": 0, "world_size": 1, "non_finite": bool(statistics[3] > 0)}
        payload = ops.encode(values, indices, gradient, *BUCKET.arguments, **options)
        bucket = torch.empty_like(gradient)
        ops.decode_apply_(bucket, payload[None], *BUCKET.arguments)
        left = residual.clone()
        ops.restore_(residual, payload, *BUCKET.arguments)
        results.append([part.cpu() for part in (payload, bucket, left, residual)])
    for on_cpu, on_cuda in zip(*results):
        assert_same_bits(on_cuda, on_cpu)
