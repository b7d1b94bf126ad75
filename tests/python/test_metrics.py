"""metrics(): each figure against a calculation of its own."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
from contracts import sent_of
from stage_cases import Layout

from compressed_ddp import TopKEFState, all_reduce_
from compressed_ddp._native import _C

SEGMENTS = [3000, 50, 1000]
LAYOUT = Layout(SEGMENTS, [0, -1, 1], [60, 20])
KEYS = {
    f"compressed_ddp/{key}"
    for key in (
        "bytes_sent", "bytes_sent_all_gather", "bytes_sent_all_to_all", "bytes_sent_all_reduce", "bytes_sent_agreement",
        "bytes_sent_in_node", "bytes_sent_in_node_all_to_all", "bytes_sent_in_node_all_gather",
        "dense_bytes", "compression_ratio", "wire_ratio", "residual_norm", "gradient_norm", "captured_energy", "step",
    )
}  # fmt: skip


def gradient(rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(sum(SEGMENTS), generator=generator).to(dtype)


def metrics_of_steps(rank, world_size, dtype, num_steps, options):
    state = TopKEFState(exchange="allgather", density=0.02, min_compress_numel=100, **options)
    figures = []
    for step in range(num_steps):
        all_reduce_(gradient(rank, step, dtype), state, name="w", segments=SEGMENTS)
        figures.append(state.metrics())
    return figures


@pytest.mark.parametrize(
    ("error_feedback", "value_format"),
    [(True, "fp32"), (True, "bf16"), (True, "sign"), (False, "fp32"), (False, "bf16")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3], ids="ranks={}".format)
def test_figures_of_compressed_steps(world_size, dtype, error_feedback, value_format):
    options = {"dense_steps": 0, "error_feedback": error_feedback, "value_format": value_format}
    by_rank = ranks.run(world_size, metrics_of_steps, dtype, 3, options)
    payload_bytes = _C.payload_bytes(*LAYOUT.arguments, value_format)
    gradient_bytes = sum(SEGMENTS) * dtype.itemsize
    dense = torch.zeros(LAYOUT.numel, dtype=torch.bool)
    dense[3000:3050] = True
    for rank, figures in enumerate(by_rank):
        residual = torch.zeros(LAYOUT.numel)
        for step, metrics in enumerate(figures):
            assert metrics.keys() == KEYS
            assert all(type(value) is float for value in metrics.values())
            local = gradient(rank, step, dtype)
            acc = local.float() + (residual * ~dense if error_feedback else 0)
            residual = acc - sent_of(acc, LAYOUT, value_format)
            left = residual.double().square().sum().item()
            whole = acc[~dense].double().square().sum().item()

            def figure(key: str, metrics=metrics) -> float:
                return metrics[f"compressed_ddp/{key}"]

            agreement = 224 * (world_size - 1) if step == 0 else 0
            assert figure("bytes_sent") == (world_size - 1) * payload_bytes + agreement
            ring = 2 * (world_size - 1) / world_size * gradient_bytes
            assert figure("dense_bytes") == pytest.approx(ring, rel=1e-12)
            assert figure("compression_ratio") == gradient_bytes / payload_bytes
            if world_size == 1:
                assert math.isnan(figure("wire_ratio"))
            else:
                assert figure("wire_ratio") == pytest.approx(ring / figure("bytes_sent"))
            norm = local.double().norm().item()
            assert figure("gradient_norm") == pytest.approx(norm, rel=1e-5)
            expected_residual = math.sqrt(left) if error_feedback else 0.0
            assert figure("residual_norm") == pytest.approx(expected_residual, rel=1e-5)
            # What left the residual; where none is kept, bf16 values make no difference that can be seen.
            assert figure("captured_energy") == pytest.approx(1 - left / whole, rel=1e-4)
            assert figure("step") == step + 1


@pytest.mark.parametrize("world_size", [1, 2], ids="ranks={}".format)
def test_figures_of_dense_steps(world_size):
    figures = ranks.run(world_size, metrics_of_steps, torch.float32, 2, {"dense_steps": 2})
    for rank, steps in enumerate(figures):
        for step, metrics in enumerate(steps):
            ring = 2 * (world_size - 1) / world_size * sum(SEGMENTS) * 4
            agreement = 224 * (world_size - 1)  # once in every dense step
            assert metrics["compressed_ddp/dense_bytes"] == ring
            assert metrics["compressed_ddp/bytes_sent"] == ring + agreement
            assert metrics["compressed_ddp/compression_ratio"] == 1.0
            assert metrics["compressed_ddp/residual_norm"] == 0.0
            assert metrics["compressed_ddp/captured_energy"] == 1.0
            assert metrics["compressed_ddp/step"] == step + 1
            norm = gradient(rank, step, torch.float32).double().norm().item()
            assert metrics["compressed_ddp/gradient_norm"] == pytest.approx(norm, rel=1e-5)


def metrics_of_several_tensors(rank, world_size):
    states = [
        TopKEFState(exchange="allgather", density=0.02, dense_steps=0, min_compress_numel=100)
        for _ in range(3)
    ]
    one, two, both = states
    for _ in range(2):
        first, second = (gradient(rank, step, torch.float32) for step in range(2))
        all_reduce_(first.clone(), one, name="a")
        all_reduce_(second.clone(), two, name="b")
        all_reduce_(first, both, name="a")
        all_reduce_(second, both, name="b")
    return [state.metrics() for state in states]


def test_figures_of_a_step_are_summed_over_its_tensors():
    for one, two, both in ranks.run(2, metrics_of_several_tensors):
        for key in ("bytes_sent", "dense_bytes"):
            key = f"compressed_ddp/{key}"
            assert both[key] == one[key] + two[key]
        for key in ("residual_norm", "gradient_norm"):
            key = f"compressed_ddp/{key}"
            assert both[key] == pytest.approx(math.hypot(one[key], two[key]), rel=1e-12)
        assert both["compressed_ddp/step"] == 2


def test_before_the_first_step_everything_is_zero_or_nan():
    metrics = TopKEFState().metrics()
    assert metrics.keys() == KEYS
    assert metrics["compressed_ddp/step"] == 0.0
    assert metrics["compressed_ddp/bytes_sent"] == 0.0
    assert math.isnan(metrics["compressed_ddp/compression_ratio"])
    assert math.isnan(metrics["compressed_ddp/wire_ratio"])


def metrics_around_reset(rank, world_size):
    state = TopKEFState(exchange="allgather", density=0.02, dense_steps=0, min_compress_numel=100)
    all_reduce_(gradient(rank, 0, torch.float32), state, name="w")
    state.reset()
    return state.metrics()["compressed_ddp/step"], state.metrics()["compressed_ddp/bytes_sent"]


def test_reset_clears_the_figures():
    assert ranks.run(2, metrics_around_reset) == [(0.0, 0.0)] * 2
