"""The DDP hook, both entries: what comes out of a step and what stays in the residual, against the oracle, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from ddp_models import (
    SHAPES,
    SMALL_BUCKETS,
    Case,
    assert_equals_oracle,
    assert_same_bits,
    both_entries,
    both_scopes,
    integers,
    skip_unless_ddp_takes,
    train,
)
from stage_cases import each_value_format
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_wrapper,
    fp16_compress_wrapper,
)


@each_value_format
@both_scopes
@both_entries
def test_steps_equal_the_oracle_bit_for_bit(entry: str, scope: str, value_format: str) -> None:
    case = Case(entry, steps=6, state={"scope": scope, "value_format": value_format})
    records = ranks.run(2, train, case)
    assert len(records[0].buckets[-1]) >= 3
    assert_equals_oracle(records, case)


@both_entries
def test_chunks_do_not_cross_parameters_and_the_last_is_shorter(entry: str) -> None:
    shapes = {
        "w": (100, 90),
        "b": (90,),
        "v": (64, 64),
        "u": (70, 60),
    }  # 4096 + 4096 + 808, 4096, 4096 + 104
    case = Case(entry, steps=4, shapes=shapes, state={"scope": "chunk", "dense_steps": 0})
    assert_equals_oracle(ranks.run(2, train, case), case)


@both_scopes
@both_entries
def test_three_ranks_compressing_from_step_0_equal_the_oracle(entry: str, scope: str) -> None:
    case = Case(entry, steps=4, state={"scope": scope, "dense_steps": 0, "density": 0.002})
    assert_equals_oracle(ranks.run(3, train, case), case)


@both_entries
def test_dense_steps_equal_ddp_without_a_hook_bit_for_bit(entry: str) -> None:
    with_hook = ranks.run(2, train, Case(entry, steps=3, state={"dense_steps": 3}))
    without = ranks.run(2, train, Case(None, steps=3))
    for step in range(3):
        for name in SHAPES:
            assert_same_bits(
                with_hook[0].gradients[step][name], without[1].gradients[step][name], name
            )
    assert with_hook[0].residuals == {}


@pytest.mark.parametrize("value_format", ["fp32", "bf16"])  # small integers fit into either
@pytest.mark.parametrize("world_size", [2, 4])
@both_entries
def test_density_1_equals_the_dense_all_reduce_on_integers(
    entry: str, world_size: int, value_format: str
) -> None:
    options = {"density": 1.0, "dense_steps": 0, "value_format": value_format}
    sparse = ranks.run(
        world_size, train, Case(entry, steps=3, gradients_of=integers, state=options)
    )
    dense = ranks.run(world_size, train, Case(None, steps=3, gradients_of=integers))
    for step in range(3):
        for name in SHAPES:
            for rank in range(world_size):
                # + 0.0: the sparse sum starts at +0, a dense one may give -0
                assert_same_bits(
                    sparse[rank].gradients[step][name] + 0.0,
                    dense[0].gradients[step][name] + 0.0,
                    name,
                )
    assert all(not residual.any() for residual in sparse[0].residuals.values())
    assert sparse[0].metrics[-1]["compressed_ddp/captured_energy"] == 1.0


@both_entries
def test_density_1_equals_the_dense_all_reduce_on_floats_up_to_the_order_of_summation(
    entry: str,
) -> None:
    state = {"density": 1.0, "dense_steps": 0, "value_format": "fp32"}
    sparse = ranks.run(3, train, Case(entry, steps=2, state=state))
    dense = ranks.run(3, train, Case(None, steps=2))
    for name in SHAPES:
        torch.testing.assert_close(
            sparse[1].gradients[1][name], dense[1].gradients[1][name], rtol=1e-6, atol=1e-7
        )


@both_scopes
@both_entries
def test_residual_survives_bucket_rebuild(entry: str, scope: str) -> None:
    case = Case(
        entry,
        steps=4,
        gradients_of=integers,
        state={"scope": scope, "dense_steps": 0, "density": 0.01},
    )
    records = ranks.run(2, train, case)
    first, second = records[0].buckets[:2]
    assert len(first) == 1 and len(second) >= 3, (
        "this test is about a rebuild between the first two steps"
    )
    assert second[0][0] != first[0][0]
    oracle = assert_equals_oracle(records, case)
    for rank, record in enumerate(records):  # and nothing is lost on the way: local conservation
        for name in record.residuals:
            produced = sum(case.gradients(rank, step)[name] for step in range(case.steps))
            assert not torch.equal(record.residuals[name], produced), (
                "something must have been sent"
            )
    for name in oracle.residuals[0]:
        received = 2 * sum(step[name] for step in records[0].gradients)
        kept = sum(record.residuals[name] for record in records)
        produced = sum(
            case.gradients(rank, step)[name] for rank in range(2) for step in range(case.steps)
        )
        assert torch.equal(received + kept, produced)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@both_scopes
@both_entries
def test_half_precision_models_equal_the_oracle(entry: str, scope: str, dtype: torch.dtype) -> None:
    case = Case(entry, dtypes=dict.fromkeys(SHAPES, dtype), state={"scope": scope})
    assert_equals_oracle(ranks.run(2, train, case), case)


@pytest.mark.parametrize(
    ("wrapper", "dtype"),
    [(fp16_compress_wrapper, torch.float16), (bf16_compress_wrapper, torch.bfloat16)],
    ids=["fp16", "bf16"],
)
@both_scopes
def test_torch_compress_wrappers_compose_with_the_python_hook(
    wrapper: Any, dtype: torch.dtype, scope: str
) -> None:
    """The wrappers take a Python hook, so there is no C++ entry here. The engine sees a bucket of the wrapper's dtype."""
    case = Case("python", state={"scope": scope}, wrapper=wrapper)
    records = ranks.run(2, train, case)
    rounded = Case("python", dtypes=dict.fromkeys(SHAPES, dtype), state={"scope": scope})
    for record in records:
        record.gradients = [
            {name: gradient.to(dtype) for name, gradient in step.items()}
            for step in record.gradients
        ]
    assert_equals_oracle(records, rounded)
    assert "compress_wrapper" in records[0].hook_name


TWO_DTYPES = {"second_weight": torch.bfloat16, "third_bias": torch.bfloat16}
DDP_MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # DDP's options, the case's
    "one_big_bucket": ({"bucket_cap_mb": 25}, {}),
    "two_dtypes": (SMALL_BUCKETS, {"dtypes": TWO_DTYPES}),
    "bucket_view": ({"gradient_as_bucket_view": True, **SMALL_BUCKETS}, {}),
    "static_graph": ({"static_graph": True, **SMALL_BUCKETS}, {}),
    "static_graph_two_dtypes": ({"static_graph": True, **SMALL_BUCKETS}, {"dtypes": TWO_DTYPES}),
    "static_graph_bucket_view": (
        {"static_graph": True, "gradient_as_bucket_view": True, **SMALL_BUCKETS},
        {},
    ),
    "find_unused_all_used": ({"find_unused_parameters": True, **SMALL_BUCKETS}, {}),
    "lazy_bucket_allocation": ({"lazy_bucket_allocation": True, **SMALL_BUCKETS}, {}),
    "lazy_bucket_view": (
        {"lazy_bucket_allocation": True, "gradient_as_bucket_view": True, **SMALL_BUCKETS},
        {},
    ),
    "batched_grad_copy": ({"batched_grad_copy": True, **SMALL_BUCKETS}, {}),
    "bucket_cap_mb_list": ({"bucket_cap_mb_list": [0.002, 0.01, 0.008]}, {}),
    "no_forward_sync": ({"forward_sync_buffers": False, **SMALL_BUCKETS}, {}),
    "channels_last": (
        SMALL_BUCKETS,
        {"shapes": {**SHAPES, "conv_weight": (16, 8, 3, 3)}, "channels_last": ("conv_weight",)},
    ),
    "exempt": (SMALL_BUCKETS, {"state": {"exempt": ("second_weight",)}}),
    "everything_compressible": (SMALL_BUCKETS, {"state": {"min_compress_numel": 0}}),
    "nothing_compressible": (SMALL_BUCKETS, {"state": {"min_compress_numel": 10**6}}),
}


@pytest.mark.parametrize("dense_steps", [0, 2])
@pytest.mark.parametrize("mode", DDP_MODES)
@both_entries
def test_every_ddp_mode_equals_the_oracle(entry: str, mode: str, dense_steps: int) -> None:
    options, changes = DDP_MODES[mode]
    skip_unless_ddp_takes(**options)
    scope = (
        "bucket" if dense_steps == 0 else "tensor"
    )  # bucket scope sees every difference of the buckets
    state = {"scope": scope, "dense_steps": dense_steps, **changes.get("state", {})}
    case = Case(entry, steps=5, ddp=options, **{**changes, "state": state})
    assert_equals_oracle(ranks.run(2, train, case), case)


@both_entries
def test_the_hook_has_a_name_in_ddp_logs(entry: str) -> None:
    record = ranks.run(1, train, Case(entry, steps=1))[0]
    assert (
        record.hook_name == {"python": "topk_ef_hook", "cpp": "compressed_ddp::TopKEFHook"}[entry]
    )


def schedule(step: int) -> float:
    return 1.0 / (step + 1)


@both_entries
def test_a_callable_density_is_a_schedule_and_shows_in_the_metrics(entry: str) -> None:
    case = Case(entry, steps=6, state={"density": schedule, "dense_steps": 1, "scope": "tensor"})
    records = ranks.run(2, train, case)
    assert_equals_oracle(records, case)
    metrics = records[0].metrics
    assert [step["compressed_ddp/step"] for step in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[0]["compressed_ddp/compression_ratio"] == 1.0
    # An entry costs 9 bits and a bfloat16: at density 1/2 some 0.4 of the gradient is sent, and every later step sends less.
    ratios = [step["compressed_ddp/compression_ratio"] for step in metrics[1:]]
    assert ratios == sorted(ratios) and 2.0 < ratios[0] < 2.6 and ratios[-1] > 5.0
    assert all(step["compressed_ddp/bytes_sent"] > 0 for step in metrics)
    for step, figures in enumerate(metrics):
        gradients = [gradient for name, gradient in case.gradients(0, step).items()]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert figures["compressed_ddp/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    residual_norm = (
        torch.cat([residual.flatten() for residual in records[0].residuals.values()]).norm().item()
    )
    assert metrics[-1]["compressed_ddp/residual_norm"] == pytest.approx(residual_norm, rel=1e-5)
