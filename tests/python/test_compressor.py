"""TopKCompressor and ErrorFeedbackBuffer: the parts alone."""

from __future__ import annotations

import re

import pytest
import torch
from stage_cases import DTYPES, assert_same_bits

from compressed_ddp import ErrorFeedbackBuffer, TopKCompressor, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (1000,), (20, 30), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.1, 1.0], ids="density={}".format)
def test_compress_selects_the_largest_entries_of_a_tensor_of_any_shape(density, shape, dtype, seed):
    tensor = torch.randn(shape).to(dtype)
    before = tensor.clone()
    values, indices, returned_shape = TopKCompressor(density).compress(tensor)
    assert_same_bits(tensor, before)
    numel = tensor.numel()
    k = max(1, -(-int(density * 1000) * numel // 1000))
    expected = reference.compensate_select_(
        tensor.reshape(-1), torch.zeros(numel), [numel], [0], [k]
    )
    assert_same_bits(values, expected[0])
    assert_same_bits(indices, expected[1])
    assert returned_shape == tensor.shape


def test_decompress_puts_the_values_back_and_zeros_elsewhere(seed):
    tensor = torch.randn(20, 30)
    compressor = TopKCompressor(0.1)
    values, indices, shape = compressor.compress(tensor)
    dense = compressor.decompress(values, indices, shape)
    assert dense.shape == tensor.shape
    kept = dense != 0
    assert kept.sum() == 60
    assert_same_bits(dense[kept], tensor[kept])
    assert dense[kept].abs().min() >= tensor[~kept].abs().max()


def test_density_1_and_back_is_the_identity(seed):
    tensor = torch.randn(7, 11, 3)
    compressor = TopKCompressor(1.0)
    assert_same_bits(compressor.decompress(*compressor.compress(tensor)), tensor)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda base: base.transpose(0, 1), id="transposed"),
        pytest.param(lambda base: base[:, ::2], id="every-second"),
        pytest.param(lambda base: base.reshape(-1)[::3], id="flat-every-third"),
        pytest.param(lambda base: base[None, None].expand(2, -1, -1, -1), id="expanded"),
        pytest.param(
            lambda base: base[None, None].contiguous(memory_format=torch.channels_last),
            id="channels_last",
        ),
        pytest.param(lambda base: base.clone().requires_grad_(), id="requires-grad"),
    ],
)
def test_indices_count_in_row_major_order_whatever_the_strides(view, seed):
    tensor = view(torch.randn(12, 18))
    values, indices, shape = TopKCompressor(0.1).compress(tensor)
    flat = tensor.detach().contiguous().view(-1)
    assert_same_bits(flat[indices.long()], values)
    assert shape == tensor.shape


def test_a_tensor_without_entries_compresses_to_nothing():
    compressor = TopKCompressor(0.1)
    values, indices, shape = compressor.compress(torch.empty(3, 0))
    assert (values.numel(), indices.numel()) == (0, 0)
    assert compressor.decompress(values, indices, shape).shape == (3, 0)


def test_stats_count_calls_bytes_and_time():
    compressor = TopKCompressor(0.1)
    assert compressor.stats == dict.fromkeys(
        ("calls", "dense_bytes", "compressed_bytes", "time_ms"), 0.0
    )
    compressor.compress(torch.ones(1000))
    compressor.compress(torch.ones(10, 50, dtype=torch.bfloat16))
    stats = compressor.stats
    assert stats["calls"] == 2
    assert stats["dense_bytes"] == 4 * 1000 + 2 * 500
    assert stats["compressed_bytes"] == 8 * (100 + 50)
    assert stats["time_ms"] > 0


@pytest.mark.parametrize("density", [0.0, -1.0, 1.1, float("nan")])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(ValueError, match=re.escape("TopKCompressor: density must be in (0, 1]")):
        TopKCompressor(density)


@pytest.mark.parametrize("density", ["0.01", None, True], ids=repr)
def test_a_density_that_is_no_number_is_refused(density):
    with pytest.raises(TypeError, match=re.escape("TopKCompressor: density must be a number in")):
        TopKCompressor(density)


# ---- error feedback


def test_a_loop_over_the_parts_equals_the_fused_stage(seed):
    compressor, buffer = TopKCompressor(0.05), ErrorFeedbackBuffer()
    residual = torch.zeros(2000)
    for _ in range(5):
        gradient = torch.randn(40, 50)
        compensated = buffer.compensate("w", gradient)
        values, indices, shape = compressor.compress(compensated)
        buffer.update("w", compensated, compressor.decompress(values, indices, shape))
        expected = reference.compensate_select_(gradient.view(-1), residual, [2000], [0], [100])
        assert_same_bits(values, expected[0])
        assert_same_bits(indices, expected[1])
        assert_same_bits(buffer.state_dict()["residuals"]["w"], residual.view(40, 50))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compensate_returns_a_new_fp32_tensor(dtype):
    buffer = ErrorFeedbackBuffer()
    gradient = torch.ones(3, dtype=dtype)
    for expected in (1.0, 2.0, 3.0):
        compensated = buffer.compensate("w", gradient)
        assert compensated.dtype == torch.float32
        assert compensated.tolist() == [expected] * 3
        buffer.update("w", compensated, torch.zeros(3))
        compensated.zero_()  # the caller's own
    assert gradient.tolist() == [1.0] * 3


def test_a_non_finite_entry_leaves_the_old_residual():
    buffer = ErrorFeedbackBuffer()
    buffer.update("w", torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    bad = torch.tensor([torch.nan, torch.inf, 5.0])
    buffer.update("w", bad, torch.zeros(3))
    assert buffer.state_dict()["residuals"]["w"].tolist() == [1.0, 2.0, 5.0]
    buffer.update("new", bad, torch.zeros(3))
    assert buffer.state_dict()["residuals"]["new"].tolist() == [0.0, 0.0, 5.0]


def test_names_keep_their_own_residuals_and_their_shape():
    buffer = ErrorFeedbackBuffer()
    buffer.update("a", torch.ones(2, 3), torch.zeros(2, 3))
    buffer.update("b", torch.full((4,), 2.0), torch.zeros(4))
    assert buffer.compensate("a", torch.zeros(2, 3)).unique().tolist() == [1.0]
    assert buffer.compensate("b", torch.zeros(4)).unique().tolist() == [2.0]
    with pytest.raises(ValueError, match=re.escape("'a' stands for shape (2, 3), got (6,)")):
        buffer.compensate("a", torch.zeros(6))
    with pytest.raises(ValueError, match=re.escape("compensated and sent of one shape, got (6,)")):
        buffer.update("a", torch.zeros(6), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=re.escape("update: 'a' stands for shape (2, 3), got (6")):
        buffer.update("a", torch.zeros(6), torch.zeros(6))
    assert buffer.compensate("a", torch.zeros(2, 3)).unique().tolist() == [1.0]


def test_the_buffer_round_trips_through_its_state_dict():
    buffer, other = ErrorFeedbackBuffer(), ErrorFeedbackBuffer()
    buffer.update("w", torch.ones(3), torch.zeros(3))
    state_dict = buffer.state_dict()
    other.update("gone", torch.ones(3), torch.zeros(3))
    other.load_state_dict(state_dict)
    state_dict["residuals"]["w"].zero_()  # a copy on both sides
    for each in (buffer, other):
        assert each.state_dict()["residuals"].keys() == {"w"}
        assert each.compensate("w", torch.zeros(3)).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="expected version 1, got 2"):
        other.load_state_dict({"version": 2, "residuals": {}})
    for wrong in (None, [], {"version": 1}, {"version": 1, "residuals": []}):
        with pytest.raises(TypeError, match=r"what ErrorFeedbackBuffer\.state_dict\(\) returned"):
            other.load_state_dict(wrong)
    assert other.state_dict()["residuals"].keys() == {"w"}
