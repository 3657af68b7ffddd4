"""What is found out about a model by running it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from small_mlx import FAMILIES, make_model, mx, plain_cache

# isort: split
import mlx.nn as nn
import tqai
from mlx_lm.models import base
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache
from tqai.mlx.model.geometry import geometry_of


class Odd(nn.Module):
    """One attention layer that reads its cache as it is told."""

    def __init__(self, how: str, caches: list[Any] | None = None) -> None:
        super().__init__()
        self.how = how
        self.caches = caches or [KVCache()]
        self.embed = nn.Embedding(8, 32)
        self.layers = [None] * len(self.caches)

    def make_cache(self) -> list[Any]:
        return copy.deepcopy(self.caches)

    def __call__(self, inputs: Any, cache: Any) -> Any:
        x = self.embed(inputs).reshape(*inputs.shape, 2, 16).transpose(0, 2, 1, 3)
        for layer in cache:
            if isinstance(layer, ArraysCache) or self.how == "nothing":
                continue
            if self.how == "raises":
                raise KeyError("pixel_values")
            keys, values = layer.update_and_fetch(x, x)
            if self.how == "touches":
                keys = layer.keys[..., : layer.offset, :]
            if self.how == "fast":
                x = mx.fast.scaled_dot_product_attention(x, keys, values, scale=0.25)
            elif self.how == "by hand":
                x = mx.softmax(x @ keys.swapaxes(2, 3), axis=-1) @ values
            else:
                x = base.scaled_dot_product_attention(x, keys, values, layer, 0.25, None)
                if self.how == "twice":
                    x = base.scaled_dot_product_attention(x, keys, values, layer, 0.25, None)
        return x


def shape_of(model: Any) -> Any:
    return geometry_of(model, plain_cache(model)).shapes[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_have_heads_and_windows(family: str) -> None:
    model = make_model(family)
    caches = plain_cache(model)
    geometry = geometry_of(model, caches)
    assert geometry.problems == (None, None)
    for index, ((shape,), cache) in enumerate(zip(geometry.shapes, caches, strict=True)):
        assert shape is not None and shape.index == index
        assert (shape.kv_heads, shape.head_dim, shape.value_head_dim) == (2, 16, 16)
        assert shape.max_size == getattr(cache, "max_size", None)
        assert (shape.is_packed, shape.reads) == (True, 1)
        assert cache.empty()  # the model's own were copied


@pytest.mark.parametrize(
    ("how", "reads", "is_packed"),
    [("fast", 1, False), ("by hand", 1, False), ("function", 1, True), ("twice", 2, True)],
)
def test_it_is_seen_how_a_layer_is_read(how: str, reads: int, is_packed: bool) -> None:
    shape = shape_of(Odd(how))
    assert (shape.reads, shape.is_packed) == (reads, is_packed)


@pytest.mark.parametrize("how", ["fast", "by hand", "function", "twice"])
def test_however_a_layer_is_read_it_is_right(how: str) -> None:
    model = Odd(how)
    text = mx.array([[1, 2, 3, 4, 5, 6, 7] * 40])
    expected = [model(text, cache=[cache := KVCache()]), model(text[:, :1], cache=[cache])]
    cache = tqai.patch(model, bits_k=8, bits_v=8)
    given = [model(text, cache=cache), model(text[:, :1], cache=cache)]
    for one, other in zip(given, expected, strict=True):
        assert mx.abs(one - other).max() < 0.03
    assert cache[0].is_packed() and cache.memory_report()["dequantised"] == (
        [] if how in ("function", "twice") else [0]
    )


@pytest.mark.parametrize(
    ("model", "kind", "what"),
    [
        (Odd("touches"), NotImplementedError, r"layer 0 .* takes \.keys from its cache"),
        (Odd("raises"), NotImplementedError, "could not be tried on tokens .*pixel_values"),
        (Odd("nothing"), NotImplementedError, "layer 0 .* was not used"),
        (
            Odd("function", [KVCache(), ChunkedKVCache(8)]),
            NotImplementedError,
            r"layer 1 .* type ChunkedKVCache.*skip_layers=\[1\]",
        ),
        (
            Odd("function", [RotatingKVCache(64, keep=4), KVCache()]),
            NotImplementedError,
            r"keeps its first 4 tokens.*skip_layers=\[0\]",
        ),
        (Odd("function", [ArraysCache(1)]), ValueError, "has no attention layers"),
    ],
)
def test_what_cannot_be_compressed_is_refused_by_name(model: Any, kind: type, what: str) -> None:
    original = base.scaled_dot_product_attention
    with pytest.raises(kind, match=what):
        tqai.patch(model)
    assert not tqai.is_patched(model)
    assert base.scaled_dot_product_attention is original


def test_layers_of_another_kind_are_left_alone() -> None:
    cache = tqai.patch(Odd("function", [ArraysCache(1), KVCache()]))
    assert type(cache[0]) is ArraysCache and cache[1].index == 1


def test_heads_that_are_too_wide_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="layer 0: keys of head_dim 4"):
        tqai.patch(make_model("llama", head_dim=4))
