"""A forward pass that does not end leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
from small_mlx import LFM2, compiled_alone, make_model, mx, read, tokens

# isort: split
import tqai
from mlx_lm.models.cache import ArraysCache, RotatingKVCache
from tqai.mlx.cache.layer import TqaiKVCache


class Interrupting:
    """In the place of a module: calls it, unless it is time to be interrupted."""

    def __init__(self, module: Any, error: BaseException) -> None:
        self.module = module
        self.error: BaseException | None = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def interrupted(model: Any, cache: Any, text: Any, error: BaseException) -> None:
    """A pass over `text` that ends in layer 1, before its cache has got anything."""
    layers = model.model.layers
    whole = layers[1]
    layers[1] = Interrupting(whole, error)
    try:
        with pytest.raises(type(error)):
            model(text, cache=cache)
    finally:
        layers[1] = whole


def packed(cache: Any) -> list[tuple[int, int]]:
    """Tokens of each layer, and those of them that are codes."""
    return [(each["tokens"], each["packed_tokens"]) for each in (c.memory() for c in cache)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("count", [1, 40, 200])
@pytest.mark.parametrize("held", [0, 20, 400])
def test_what_it_has_added_is_forgotten(family: str, count: int, held: int) -> None:
    model = make_model(family)
    tqai.patch(model, residual_window=32)
    text = tokens(held + 60)
    caches = [tqai.new_cache(model), tqai.new_cache(model)]
    if held > 0:
        for cache in caches:
            read(model, cache, text[:, :held], [held])
    for error in (KeyboardInterrupt(), RuntimeError("in between")):
        interrupted(model, caches[0], tokens(count), error)
        assert [layer.offset for layer in caches[0]] == [held] * 2
        assert packed(caches[0]) == packed(caches[1])
    again, alone = (read(model, cache, text[:, held:], [50]) for cache in caches)
    assert mx.array_equal(again, alone)
    assert packed(caches[0]) == packed(caches[1])


def poisoned(model: Any, layer: int) -> Any:
    """Makes the keys of one layer NaN where token 7 stands; returns what undoes it."""
    plain = model.model.layers[layer].self_attn.k_proj

    class Poison:
        def __call__(self, x: Any) -> Any:
            return mx.where(mark[0][..., None], mx.array(float("nan")), plain(x))

    mark = [mx.array(False)]
    model.model.layers[layer].self_attn.k_proj = Poison()
    return mark


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("held", [0, 300])
def test_nan_in_one_layer_is_refused_and_all_layers_go_back(at: int, held: int) -> None:
    model = make_model("llama")
    tqai.patch(model, residual_window=32)
    caches = [tqai.new_cache(model), tqai.new_cache(model)]
    mark = poisoned(model, at)
    mark[0] = mx.zeros((1, 1), mx.bool_)
    text = tokens(350)
    for cache in caches if held else []:
        read(model, cache, text[:, :held], [held])
    mark[0] = mx.arange(10)[None] == 4
    with pytest.raises(ValueError, match=f"layer {at}: .* holds NaN or infinity"):
        mx.eval(model(tokens(10), cache=caches[0]), [layer.state for layer in caches[0]])
    assert [layer.offset for layer in caches[0]] == [held] * 2
    mark[0] = mx.zeros((1, 1), mx.bool_)
    again, alone = (read(model, cache, text[:, held:], [40]) for cache in caches)
    assert mx.array_equal(again, alone)


@pytest.mark.parametrize("count", [pytest.param(1, marks=compiled_alone), 100])
def test_nan_in_one_row_of_a_batch(count: int) -> None:
    model = make_model("llama")
    tqai.patch(model, residual_window=32)
    texts = [tokens(200), tokens(90)]

    def batch() -> list[Any]:
        alone = [tqai.new_cache(model) for _ in texts]
        for cache, text in zip(alone, texts, strict=True):
            read(model, cache, text, [text.shape[1]])
        return [type(layers[0]).merge(layers) for layers in zip(*alone, strict=True)]

    hit, whole = batch(), batch()
    mark = poisoned(model, 1)
    mark[0] = mx.array([[False], [True]])
    with pytest.raises(ValueError, match="row 1 of the batch, layer 1: .* holds NaN or infinity"):
        mx.eval(model(tokens(count, rows=2), cache=hit), [layer.state for layer in hit])
    mark[0] = mx.array([[False], [False]])
    for layer, other in zip(hit, whole, strict=True):
        assert layer.offset.tolist() == other.offset.tolist()
    assert packed(hit) == packed(whole)
    more = tokens(5, rows=2)
    assert mx.array_equal(model(more, cache=hit), model(more, cache=whole))


@pytest.mark.parametrize("held", [100, 400])
def test_exact_layers_beside_go_back_or_the_cache_is_refused(held: int) -> None:
    """A rotating cache of mlx-lm's that has moved on has overwritten what it would go back to."""
    model = make_model("mistral")  # layer 0 slides over 150 tokens
    cache = tqai.patch(model, skip_layers=[0])
    assert type(cache[0]) is RotatingKVCache
    text = tokens(held + 30)
    read(model, cache, text[:, :held], [held])
    interrupted(model, cache, tokens(1), KeyboardInterrupt())
    assert cache[1].offset == held
    if held < 150:
        other = tqai.new_cache(model)
        read(model, other, text[:, :held], [held])
        given, expected = (read(model, each, text[:, held:], [10]) for each in (cache, other))
        assert mx.array_equal(given, expected)
    else:
        with pytest.raises(RuntimeError, match="its RotatingKVCache, .* cannot go back: make"):
            model(tokens(1), cache=cache)


def test_states_beside_go_back() -> None:
    """Layers of other kinds, whose states models replace."""
    model = make_model(
        "lfm2", **LFM2, num_hidden_layers=4, max_position_embeddings=4096, rope_theta=1e4
    )
    tqai.patch(model)
    caches = [tqai.new_cache(model), tqai.new_cache(model)]
    assert ArraysCache in map(type, caches[0])
    text = tokens(60)
    for cache in caches:
        read(model, cache, text[:, :40], [40])
    interrupted(model, caches[0], tokens(3), KeyboardInterrupt())
    again, alone = (read(model, cache, text[:, 40:], [10]) for cache in caches)
    assert mx.array_equal(again, alone)


def test_layers_of_different_lengths_are_refused() -> None:
    model = make_model("llama")
    cache = tqai.patch(model)
    read(model, cache, tokens(30), [30])
    cache[1].trim(1)
    with pytest.raises(RuntimeError, match="different numbers of tokens, 29 and 30: a forward"):
        model(tokens(1), cache=cache)


def test_an_interrupted_undoing_is_done_at_the_next_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    cache = tqai.patch(model)
    read(model, cache, tokens(30), [30])

    def interrupt(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TqaiKVCache, "undo_pass", interrupt)
        interrupted(model, cache, tokens(2), KeyboardInterrupt())
    assert cache[0].offset == 32
    model(tokens(1), cache=cache)
    assert [layer.offset for layer in cache] == [31, 31]


def test_a_patched_model_is_of_its_class() -> None:
    model = make_model("llama")
    kind = type(model)
    tqai.patch(model)
    tqai.patch(model, bits_k=3)
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__
    tqai.unpatch(model)
    assert type(model) is kind
