"""Rows of different lengths in one cache, as mlx-lm's batches ask for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from small_mlx import error, make_model, mx, plain_cache, read, tokens

# isort: split
import tqai
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    BatchRotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from tqai.mlx.cache.batch import TqaiBatchKVCache
from tqai.mlx.cache.layer import TqaiKVCache
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings

LENGTHS = [300, 90, 210]


def texts() -> list[list[int]]:
    return [tokens(length)[0].tolist() for length in LENGTHS]


def merged(caches: list[Any]) -> list[Any]:
    return [caches[0][i].merge([cache[i] for cache in caches]) for i in range(len(caches[0]))]


def prompt(model: Any, cache: list[Any], rows: list[list[int]], part: int = 128) -> None:
    """Reads a text of each row, as mlx-lm does: padded on the right, then moved."""
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    if max(padding) > 0:
        for layer in cache:
            layer.prepare(lengths=list(map(len, rows)), right_padding=padding)
    padded = mx.array([row + [0] * more for row, more in zip(rows, padding, strict=True)])
    for at in range(0, longest, part):
        model(padded[:, at : at + part], cache=cache)
        mx.eval([layer.state for layer in cache])
    if max(padding) > 0:
        for layer in cache:
            layer.finalize()


def step(model: Any, cache: list[Any], token: int = 7) -> Any:
    """Logits of one more token of each row."""
    rows = int(cache[0].offset.size)
    logits = model(mx.full((rows, 1), token, mx.int32), cache=cache)
    mx.eval(logits)
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("window", [32, 1024])
def test_a_row_is_what_it_is_alone(family: str, window: int) -> None:
    """But for the order of sums."""
    model = make_model(family)
    empty = tqai.patch(model, residual_window=window)
    together = merged([copy.deepcopy(empty) for _ in LENGTHS])
    prompt(model, together, texts())
    given = [step(model, together) for _ in range(3)]
    for row, text in enumerate(texts()):
        alone = copy.deepcopy(empty)
        for at in range(0, len(text), 128):
            read(model, alone, mx.array([text[at : at + 128]]), [min(128, len(text) - at)])
        for logits in given:
            expected = model(mx.array([[7]]), cache=alone)
            assert error(logits[row : row + 1], expected) < 1e-5
        for layer, own in zip(together, alone, strict=True):
            assert layer.rows[row].offset == own.offset == len(text) + 3


@pytest.mark.parametrize("max_size", [None, 100])
def test_a_row_has_the_same_bytes_in_any_company(max_size: int | None) -> None:
    shape = LayerShape(0, 2, 16, 16, max_size)
    settings = Settings(residual_window=32)
    together = TqaiKVCache.merge([TqaiKVCache(shape, settings) for _ in LENGTHS])
    together.prepare(lengths=LENGTHS, right_padding=[300 - length for length in LENGTHS])
    keys, values = (mx.random.normal((3, 2, 300, 16), key=mx.random.key(i)) for i in (1, 2))
    for at in range(0, 300, 100):
        together.update_and_fetch(keys[:, :, at : at + 100], values[:, :, at : at + 100])
        mx.eval(together.state)
    together.finalize()
    together.filter([2, 1])
    for row, length in zip(together.rows, [210, 90], strict=True):
        alone = TqaiKVCache(shape, settings)
        of = LENGTHS.index(length)
        for at in range(0, length, 100):
            to = min(at + 100, length)
            alone.update_and_fetch(keys[of : of + 1, :, at:to], values[of : of + 1, :, at:to])
            mx.eval(alone.state)
        assert row.core.serialize() == alone.core.serialize()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_columns_are_those_of_the_plain_cache(family: str) -> None:
    """Offsets, masks and shapes, through prompts, steps, filter, extend and trim."""
    model = make_model(family)
    plain = [plain_cache(model) for _ in range(5)]
    tqai.patch(model, residual_window=4096)
    caches = [merged(plain[:3]), merged([tqai.new_cache(model) for _ in range(3)])]
    more = [merged(plain[3:]), merged([tqai.new_cache(model) for _ in range(2)])]
    assert [type(layer) for layer in caches[0]] == [
        BatchRotatingKVCache if layer.max_size else BatchKVCache for layer in caches[1]
    ]

    def same() -> None:
        for own, ours in zip(*caches, strict=True):
            assert mx.array_equal(ours.offset, own.offset)
            assert (ours.size(), ours.empty()) == (own.size(), own.empty())
            assert ours.is_trimmable() == own.is_trimmable()
            if getattr(own, "rotated", False):
                continue  # mlx-lm's mask is for tokens in another order then
            masks = [each.make_mask(3) for each in (ours, own)]
            assert masks[0].shape == masks[1].shape and mx.array_equal(*masks)

    same()
    for cache, other in zip(caches, more, strict=True):
        prompt(model, cache, texts())
        prompt(model, other, [tokens(40)[0].tolist(), tokens(75)[0].tolist()])
    same()
    assert error(step(model, caches[1]), step(model, caches[0])) < 1e-5
    for cache, other in zip(caches, more, strict=True):
        for layer, added in zip(cache, other, strict=True):
            layer.extend(added)
    same()
    assert error(step(model, caches[1]), step(model, caches[0])) < 1e-5
    for keep in ([1, 2, 3, 4], [1, 3]):
        for cache in caches:
            for layer in cache:
                layer.filter(keep)
        same()
        assert error(step(model, caches[1]), step(model, caches[0])) < 1e-5
    if all(layer.is_trimmable() for layer in caches[0]):
        for cache in caches:
            assert [layer.trim(2) for layer in cache] == [2, 2]
        assert error(step(model, caches[1]), step(model, caches[0])) < 1e-5


def test_padding_on_the_left() -> None:
    model = make_model("llama")
    padded = mx.array([[0, 0, 0, 5, 6, 7], [4, 5, 6, 7, 8, 9]])
    outputs = []
    plain = [BatchKVCache([0, 0]) for _ in range(2)]
    for cache in (plain, merged([tqai.patch(model) for _ in range(2)])):
        for layer in cache:
            layer.prepare(left_padding=[3, 0])
        first = model(padded[:, :2], cache=cache)
        outputs.append([first[1:], model(padded[:, 2:], cache=cache)[:, 1:], step(model, cache)])
    for given, expected in zip(*outputs, strict=True):
        assert error(given, expected) < 1e-5
    assert [layer.rows[0].offset for layer in cache] == [4, 4]


def test_a_mask_that_a_model_has_made_is_read() -> None:
    model = make_model("llama", num_hidden_layers=1)
    cache = merged([tqai.patch(model, residual_window=32) for _ in range(3)])
    prompt(model, cache, texts())
    layer = cache[0]
    keys, queries = (
        mx.random.normal((3, heads, 2, 16), key=mx.random.key(heads)) for heads in (2, 4)
    )
    outputs = []
    for given in (layer.make_mask(2), layer.make_mask(2) + False):
        again = copy.deepcopy(layer)
        again.update_and_fetch(keys, keys)
        mask = given if not outputs else mx.where(given, 0.0, -1e9)
        assert again._update is not None
        outputs.append(again.attend(again._update, queries, 0.25, mask, None))
    assert error(outputs[1], outputs[0]) < 1e-6


def test_rows_leave_and_are_saved(tmp_path: Path) -> None:
    model = make_model("gemma3")
    cache = merged([tqai.patch(model, residual_window=32) for _ in range(3)])
    prompt(model, cache, texts())
    save_prompt_cache(str(tmp_path / "batch.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "batch.safetensors"))
    assert all(type(layer) is TqaiBatchKVCache for layer in loaded)
    alone = [layer.extract(1) for layer in cache]
    logits = step(model, cache)
    assert mx.array_equal(step(model, loaded), logits)
    given = model(mx.array([[7]]), cache=alone)
    assert error(given, logits[1:2]) < 1e-5
    assert all(layer.nbytes > 0 and "[301, 91, 211]" in repr(layer) for layer in loaded)


def greedy(model: Any, text: list[int], count: int) -> list[int]:
    steps = generate_step(mx.array(text), model, max_tokens=count)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batches_come_and_go(family: str) -> None:
    """Prompts of different lengths, some later than others, ending at different times."""
    model = make_model(family)
    rows, counts = [*texts(), tokens(33)[0].tolist()], [12, 5, 20, 9]
    expected = [greedy(model, text, count) for text, count in zip(rows, counts, strict=True)]
    tqai.patch(model, residual_window=1024)
    generator = BatchGenerator(model, stop_tokens=[], prefill_step_size=128)
    names = generator.insert(rows[:3], counts[:3])
    found: dict[int, list[int]] = {}
    kept = {}
    at = 0
    while True:
        _, answers = generator.next()
        for answer in answers:
            found.setdefault(answer.uid, []).append(answer.token)
            if answer.finish_reason:
                kept[answer.uid] = answer.prompt_cache
        at += 1
        if at == 8:
            names += generator.insert(rows[3:], counts[3:])
        if len(kept) == 4 or at > 200:
            break
    assert [found[name] for name in names] == expected
    for name, text, count in zip(names, rows, counts, strict=True):
        assert {layer.offset for layer in kept[name]} <= {len(text) + count, len(text) + count - 1}


def test_what_does_not_go_together_is_refused() -> None:
    model = make_model("gemma3")
    one, other = tqai.patch(model), tqai.patch(model, bits_k=2)
    with pytest.raises(ValueError, match="different models or settings"):
        merged([one, other])
    mixed = tqai.patch(make_model("gemma3", num_hidden_layers=4), skip_layers=[0])
    with pytest.raises(NotImplementedError, match="layer 2: some layers with a sliding window"):
        mixed[2].merge([mixed[2]])
    read(model, other, tokens(9, rows=2), [9])
    with pytest.raises(ValueError, match="a cache of 2 rows"):
        other[0].merge([other[0]])
    layer = one[0].merge([one[0], one[0]])
    with pytest.raises(ValueError, match="padding on the right needs lengths"):
        layer.prepare(right_padding=[1, 0])
    layer.update_and_fetch(mx.ones((2, 2, 1, 16)), mx.ones((2, 2, 1, 16)))
    with pytest.raises(ValueError, match="padding on the left can only be added"):
        layer.prepare(left_padding=[1, 0])
    with pytest.raises(ValueError, match="kv_bits=8"):
        layer.to_quantized(bits=8)
    with pytest.raises(NotImplementedError, match=r"has no \.keys"):
        _ = layer.keys
