from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import SMALL
from tqai.settings import Settings
from tqai.transformers.attention.view import TqaiView, update_of
from tqai.transformers.cache.layer import TqaiLayer

HEADS, DIM = SMALL["num_key_value_heads"], 16


def filled_layer(tokens: int, batch: int = 2, **settings: int) -> tuple[TqaiLayer, TqaiView]:
    """A layer with `tokens` random tokens and one more, and the view of its keys."""
    torch.manual_seed(0)
    layer = TqaiLayer(3, Settings(**settings))
    for count in (tokens, 1):
        states = torch.randn(2, batch, HEADS, count, DIM)
        keys, _ = layer.update(states[0], states[1])
    return layer, keys


def test_a_view_has_a_shape_but_no_storage() -> None:
    layer, keys = filled_layer(200)
    assert type(keys) is TqaiView
    assert keys.shape == (2, HEADS, 201, DIM)
    assert keys.dtype == torch.float32 and keys.device.type == "cpu"
    assert keys.untyped_storage().nbytes() == 0 or keys.data_ptr() == 0
    assert "keys of layer 3" in repr(keys)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, -3:],
        lambda x: torch.cat([x, x], dim=-2),
        lambda x: torch.matmul(x, x.transpose(2, 3)),
        lambda x: x.to(torch.bfloat16),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda x: x.repeat_interleave(2, 1).contiguous(),
        lambda x: torch.stack([x, torch.zeros(x.shape)]),
    ],
)
def test_any_operation_sees_the_dequantised_values(operation: object) -> None:
    layer, keys = filled_layer(200, residual_window=16)
    assert layer.is_packed()
    dense = layer.gather(0, 201)[0]
    expected = operation(dense)
    result = operation(keys)
    # What shares memory with the dequantised values is a view as well; see below.
    shares = expected.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
    assert isinstance(result, TqaiView) == shares
    assert torch.equal(result, expected) and result.stride() == expected.stride()


def test_fresh_views_see_the_exact_values() -> None:
    keys, values = torch.randn(2, 1, HEADS, 200, DIM)
    key_view, value_view = TqaiLayer(0, Settings(residual_window=0)).update(keys, values)
    assert torch.equal(key_view * 1, keys) and torch.equal(value_view * 1, values)


@pytest.mark.parametrize(
    "write", [lambda x: x.add_(1), lambda x: x.copy_(torch.zeros(x.shape)), lambda x: x.zero_()]
)
def test_writing_into_a_view_raises(write: object) -> None:
    _, keys = filled_layer(200)
    with pytest.raises(NotImplementedError, match="clone"):
        write(keys)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, :, :5],
        lambda x: x[0, 1],
        lambda x: x.transpose(1, 2)[:, 3:],
        lambda x: x.data,
        lambda x: x.detach(),
        lambda x: x.view(-1),
        lambda x: x.split(50, 2)[1],
        lambda x: x.unbind(0)[0],
    ],
)
def test_writing_into_a_part_raises(part: Any) -> None:
    layer, keys = filled_layer(200, residual_window=16)
    expected = part(layer.gather(0, 201)[0])
    got = part(keys)
    for write in (lambda: got.zero_(), lambda: got.mul_(2), lambda: got.__setitem__(0, 0.0)):
        with pytest.raises(NotImplementedError, match="keys of .*clone"):
            write()
    assert torch.equal(got, expected) and got.tolist() == expected.tolist()
    own = got.clone().zero_()
    assert type(own) is torch.Tensor and not own.any()
    assert torch.equal(copy.deepcopy(got), pickle.loads(pickle.dumps(got)))


def test_writing_by_an_index_raises() -> None:
    _, keys = filled_layer(200)
    with pytest.raises(NotImplementedError, match="keys of layer 3.*clone"):
        keys[:, :, 0] = 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_dlpack(x),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_what_reads_memory_gets_the_dequantised_values(operation: object) -> None:
    _, keys = filled_layer(200, residual_window=16)
    result = operation(keys)
    assert type(result) is torch.Tensor and torch.equal(result, keys)


def test_a_view_has_no_memory_to_share() -> None:
    _, keys = filled_layer(5)
    with pytest.raises(NotImplementedError, match="clone"):
        keys.share_memory_()


def test_writing_with_out_raises() -> None:
    _, keys = filled_layer(200)
    with pytest.raises(NotImplementedError, match="clone"):
        torch.add(torch.zeros(keys.shape), 1, out=keys)


def test_reading_a_view_after_the_cache_changed_raises() -> None:
    layer, keys = filled_layer(200)
    assert (keys + 0).shape == keys.shape
    layer.crop(-5)
    with pytest.raises(RuntimeError, match="layer 3"):
        keys + 0


def test_only_the_two_views_of_one_update_belong_together() -> None:
    layer = TqaiLayer(0, Settings())
    first = layer.update(*torch.randn(2, 1, HEADS, 4, DIM))
    second = layer.update(*torch.randn(2, 1, HEADS, 4, DIM))
    assert update_of(*second) is second[0].update
    assert update_of(second[0], first[1]) is None
    assert update_of(second[1], second[0]) is None
    assert update_of(second[0], torch.zeros(1)) is None


def test_gradients_flow_through_fresh_views() -> None:
    keys, values = torch.randn(2, 1, HEADS, 5, DIM)
    keys.requires_grad_()
    key_view, value_view = TqaiLayer(0, Settings()).update(keys, values)
    assert isinstance(key_view, TqaiView)
    (key_view * value_view).sum().backward()
    assert torch.equal(keys.grad, values)


def test_gradients_through_the_past_raise() -> None:
    layer, _ = filled_layer(5)
    keys, values = torch.randn(2, 2, HEADS, 1, DIM)
    key_view, _ = layer.update(keys.requires_grad_(), values)
    loss = (key_view * 2).sum()
    with pytest.raises(RuntimeError, match="not differentiable"):
        loss.backward()
