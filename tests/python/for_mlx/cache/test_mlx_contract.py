"""What mlx-lm's own tests ask of its caches (tests/test_prompt_cache.py), asked of the compressed
ones, case by case: of rows of equal length, in a sliding window, in batches and in files.

Not asked: what is about ArraysCache alone. QuantizedKVCache's part is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from small_mlx import make_model, make_prompt_cache, mx, tokens

# isort: split
import tqai
from mlx_lm.generate import generate_step
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from tqai.mlx.cache.batch import TqaiBatchKVCache
from tqai.mlx.cache.layer import TqaiKVCache
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings

HEADS, DIM = 2, 16


def shape(max_size: int | None) -> LayerShape:
    return LayerShape(0, HEADS, DIM, DIM, max_size)


def one(max_size: int | None = None, held: int = 0, **options: Any) -> TqaiKVCache:
    cache = TqaiKVCache(shape(max_size), Settings(**{"residual_window": 16, **options}))
    if held > 0:
        add(cache, held)
    return cache


def many(padding: list[int], max_size: int | None = None) -> TqaiBatchKVCache:
    return TqaiBatchKVCache(shape(max_size), Settings(residual_window=16), padding)


def vectors(count: int, rows: int = 1, seed: int = 0) -> Any:
    return mx.random.normal((rows, HEADS, count, DIM), key=mx.random.key(seed))


def add(cache: Any, count: int, rows: int = 1, seed: int = 0) -> tuple[Any, Any]:
    """Keys and values that the cache gives back for new ones."""
    given = vectors(count, rows, seed), vectors(count, rows, seed + 1)
    return tuple(map(mx.array, cache.update_and_fetch(*given)))


def through_file(cache: list[Any], folder: Path) -> list[Any]:
    file = str(folder / "cache.safetensors")
    save_prompt_cache(file, cache, {"one": "1", "two": "2"})
    loaded, about = load_prompt_cache(file, return_metadata=True)
    assert about == {"one": "1", "two": "2"} and len(loaded) == len(cache)
    assert [type(each) for each in loaded] == [type(each) for each in cache]
    return loaded


def same_from_now_on(cache: Any, other: Any, rows: int = 1) -> None:
    for at in range(3):
        ours, theirs = (add(each, 1 + at, rows, seed=50 + at) for each in (cache, other))
        assert all(map(mx.array_equal, ours, theirs))
        assert mx.array_equal(mx.array(cache.offset), mx.array(other.offset))


@pytest.mark.parametrize("held", [10, 400])
def test_files(held: int, tmp_path: Path) -> None:
    cache = [one(held=held) for _ in range(4)]
    for ours, loaded in zip(cache, through_file(cache, tmp_path), strict=True):
        assert loaded.offset == held and loaded.nbytes <= ours.nbytes * 1.2
        same_from_now_on(ours, loaded)


@pytest.mark.parametrize("steps", [0, 2])
def test_files_of_windows(steps: int, tmp_path: Path) -> None:
    cache = [one(100, held=130) for _ in range(3)]
    for each in cache:
        for at in range(steps):
            add(each, 1, seed=at)
    for ours, loaded in zip(cache, through_file(cache, tmp_path), strict=True):
        assert (loaded.max_size, loaded.offset, loaded.size()) == (100, 130 + steps, 100)
        same_from_now_on(ours, loaded)


@pytest.mark.parametrize("in_a_list", [False, True])
def test_files_of_many_kinds(in_a_list: bool, tmp_path: Path) -> None:
    state = ArraysCache(size=2)
    state[0], state[1] = mx.ones((4, 4, 4)), mx.zeros((4, 4))
    cache: list[Any] = [state, KVCache(), one(), RotatingKVCache(8), one(8)]
    for each in cache[1:]:
        add(each, 7, rows=4)
    whole = through_file([CacheList(*cache)] if in_a_list else cache, tmp_path)
    loaded = list(whole[0].caches) if in_a_list else whole
    assert mx.array_equal(loaded[0][0], state[0]) and mx.array_equal(loaded[0][1], state[1])
    for ours, other in zip(cache[1:], loaded[1:], strict=True):
        same_from_now_on(ours, other, rows=4)


def test_files_of_batches(tmp_path: Path) -> None:
    cache = [many([1, 2]), many([1, 2], max_size=10)]
    for each in cache:
        add(each, 7, rows=2)
    for ours, loaded in zip(cache, through_file(cache, tmp_path), strict=True):
        assert loaded.left_padding.tolist() == [1, 2] and loaded.offset.tolist() == [6, 5]
        same_from_now_on(ours, loaded, rows=2)


@pytest.mark.parametrize("window", [16, 1024])
def test_generation_goes_on_with_what_was_kept(window: int) -> None:
    model = make_model("qwen2")
    tqai.patch(model, residual_window=window)
    prompt = tokens(120)[0]
    whole = list(generate_step(prompt, model, max_tokens=6))
    cache = make_prompt_cache(model)
    some = list(generate_step(prompt, model, prompt_cache=cache, max_tokens=2))
    trim_prompt_cache(cache, cache[0].offset - 121)  # the generator is a token ahead
    last = mx.array([some[-1][0]])
    some += list(generate_step(last, model, prompt_cache=cache, max_tokens=4))
    assert [token for token, _ in some] == [token for token, _ in whole]
    for (_, ours), (_, other) in zip(some, whole, strict=True):
        assert mx.allclose(ours, other, atol=1e-4)


def test_generation_again_after_trimming() -> None:
    model = make_model("llama")
    tqai.patch(model)
    cache = make_prompt_cache(model)
    token, _ = next(generate_step(tokens(50)[0], model, prompt_cache=cache))
    held = cache[0].offset
    given = mx.array([token])
    runs = []
    for _ in range(2):
        steps = generate_step(given, model, prompt_cache=cache, max_tokens=3)
        runs.append([(each, logits) for each, logits in steps])
        assert trim_prompt_cache(cache, cache[0].offset - held) > 0
    for (first, logits), (second, others) in zip(*runs, strict=True):
        assert first == second and mx.allclose(logits, others)


def test_trimming() -> None:
    cache: list[Any] = [one(held=10), one(held=10)]
    assert trim_prompt_cache(cache, 7) == 7
    assert trim_prompt_cache(cache, 4) == 3 and [each.offset for each in cache] == [0, 0]
    # all layers or none
    state = ArraysCache(size=1)
    state[0] = mx.zeros((2, 2))
    assert trim_prompt_cache([state, one(held=10)], 1) == 0
    windows = [one(6, held=5), one(6, held=5)]
    assert trim_prompt_cache(windows, 4) == 4
    for each in windows:
        add(each, 10)
    assert trim_prompt_cache(windows, 4) == 0 and windows[0].offset == 11


def test_a_copy_is_not_changed_by_what_comes_later() -> None:
    cache = [one(held=10)]
    keys, _ = add(cache[0], 1, seed=7)
    before = copy.deepcopy(cache)
    trim_prompt_cache(cache, 1)
    assert (before[0].offset, cache[0].offset) == (11, 10)
    other, _ = add(cache[0], 1, seed=9)
    assert mx.array_equal(mx.array(before[0].keys_and_values()[0]), keys)
    assert mx.array_equal(other[..., :10, :], keys[..., :10, :])
    assert mx.array_equal(other[..., 10:, :], vectors(1, seed=9))


def test_quantising_it_again_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_bits=8: .* compresses its cache"):
        one(held=4).to_quantized(bits=8, group_size=32)


def test_lists_of_caches() -> None:
    both = CacheList(one(), one())
    assert both.is_trimmable()
    for at in range(2):
        add(both[at], 8)
    assert both.trim(5) == 5 and [both[at].offset for at in range(2)] == [3, 3]
    assert not CacheList(ArraysCache(size=2), one()).is_trimmable()
    pair = []
    for at, held in enumerate((5, 7)):
        state = ArraysCache(size=1)
        state[0] = mx.ones((1, 2, 4)) * at
        pair.append(CacheList(state, one(held=held)))
    merged = CacheList.merge(pair)
    for at, each in enumerate(pair):
        alone = merged.extract(at)
        assert mx.array_equal(alone[0][0], each[0][0])
        ours, theirs = (layer[1].keys_and_values() for layer in (alone, each))
        assert all(mx.array_equal(*map(mx.array, both)) for both in zip(ours, theirs, strict=True))


def test_masks() -> None:
    cache = one()
    hidden = mx.zeros((1, 4))
    assert create_attention_mask(hidden, cache=cache) == "causal"
    mask = create_attention_mask(hidden, cache=cache, return_array=True)
    assert mx.array_equal(mask, create_causal_mask(4))
    add(cache, 32)
    assert create_attention_mask(hidden, cache=cache, return_array=True).shape == (4, 36)
    mask = create_attention_mask(mx.zeros((1, 1, 8)), cache, window_size=4)
    assert mx.array_equal(mask, create_causal_mask(1, offset=32, window_size=4))
    assert create_attention_mask(mx.zeros((1, 1, 8)), cache) is None


def test_masks_of_windows() -> None:
    cache = one(8)
    hidden = {count: mx.zeros((1, count, 32)) for count in (1, 3, 4, 6)}
    assert create_attention_mask(hidden[4], cache, window_size=5) == "causal"
    mask = create_attention_mask(hidden[4], cache, window_size=5, return_array=True)
    assert mask.dtype == mx.bool_ and mask.shape == (4, 4)
    mask = create_attention_mask(hidden[6], cache, window_size=5)
    assert mask.sum(axis=-1).tolist() == [1, 2, 3, 4, 5, 5]
    assert create_attention_mask(hidden[1], cache, window_size=5) is None
    add(cache, 10)
    mask = cache.make_mask(3, window_size=5)
    assert mask.shape == (3, 10) and mask.sum(axis=-1).tolist() == [5] * 3
    for row in range(3):
        assert mx.all(mask[row, row + 3 : row + 8])
    assert cache.make_mask(1) is None
    for _ in range(2):  # tokens stay in their order, so that the mask stays as it is
        assert cache.make_mask(1, window_size=5).tolist() == [False] * 3 + [True] * 5
        add(cache, 1)


def test_updates_of_windows() -> None:
    cache, plain = one(8), RotatingKVCache(8)
    for count in (10, 1, 1, 1, 3):
        ours, theirs = (add(each, count) for each in (cache, plain))
        assert ours[0].shape == theirs[0].shape and ours[1].shape == theirs[1].shape
    assert ours[0].shape[2] == 10


def test_batches() -> None:
    cache = many([2, 3, 4])
    keys, values = add(cache, 4, rows=3)
    assert keys.shape == values.shape == (3, HEADS, 4, DIM)
    mx.eval(cache.state)
    cache.state = cache.state
    cache.filter([0, 1])  # the padding that both have goes
    assert cache.offset.tolist() == [2, 1] and cache.left_padding.tolist() == [0, 1]
    mask = cache.make_mask(1)
    assert mask[0].squeeze().tolist() == [True] * 3
    assert mask[1].squeeze().tolist() == [False, True, True]

    first, second = many([2, 1, 2]), many([3, 0])
    add(first, 8, rows=3)
    add(second, 4, rows=2)
    first.extend(second)
    assert first.offset.tolist() == [6, 7, 6, 1, 4]
    assert first.left_padding.tolist() == [2, 1, 2, 7, 4]
    assert add(first, 1, rows=5)[0].shape == (5, HEADS, 9, DIM)


def test_batches_of_windows() -> None:
    cache = many([2, 0], max_size=4)
    mask = cache.make_mask(4)
    assert not mx.any(mask[0, 0, 0]) and mask[1, 0, 0].tolist() == [True] + [False] * 3
    add(cache, 4, rows=2)
    mask = cache.make_mask(4)
    keys, _ = add(cache, 4, rows=2)
    assert mask.shape[-2:] == (4, keys.shape[2])
    assert mask[0, 0, 0].tolist() == [False] + [True] * 3 + [False] * 3

    cache, plain = many([2, 0], max_size=4), BatchRotatingKVCache(4, [2, 0])
    for each in (cache, plain):
        add(each, 4, rows=2)
    mask = cache.make_mask(1)
    # the plain one turns its columns, and so has the same mask in another order
    assert mask.sum(axis=-1).tolist() == plain.make_mask(1).sum(axis=-1).tolist()
    assert mask[0, 0, 0].tolist() == [False] + [True] * 3
    assert add(cache, 1, rows=2)[0].shape[2] == mask.shape[-1]

    cache = many([2, 0, 3], max_size=4)
    add(cache, 3, rows=3)
    cache.filter(mx.array([1]))
    assert mx.array(cache.keys_and_values()[0]).shape == (1, HEADS, 3, DIM)

    cache, other = many([2, 1], max_size=4), many([2, 2], max_size=4)
    add(cache, 5, rows=2)
    add(other, 5, rows=2)
    add(cache, 1, rows=2)
    cache.extend(other)
    assert cache.offset.tolist() == [4, 5, 3, 3]
    assert add(cache, 1, rows=4)[0].shape[0] == 4

    cache = many([4], max_size=8)  # a prompt, a step, and a prompt again
    add(cache, 8)
    assert cache.make_mask(1).squeeze().tolist() == [False] * 3 + [True] * 5
    add(cache, 1)
    mask = cache.make_mask(2).squeeze()
    assert mask.tolist() == [[False] * 2 + [True] * 6 + [False], [False] * 2 + [True] * 7]


@pytest.mark.parametrize("max_size", [None, 4])
def test_merging_with_an_empty_one(max_size: int | None) -> None:
    merged = TqaiKVCache.merge((one(max_size), one(max_size, held=4)))
    assert merged.offset.tolist() == [0, 4] and merged.left_padding.tolist() == [4, 0]
    keys = mx.array(merged.keys_and_values()[0])
    assert keys.shape == (2, HEADS, 4, DIM) and not mx.any(keys[0])


@pytest.mark.parametrize("max_size", [None, 512])
@pytest.mark.parametrize("empty_first", [False, True])
def test_extending_with_empty_rows(max_size: int | None, empty_first: bool) -> None:
    full = TqaiKVCache.merge([one(max_size, held=5), one(max_size, held=3)])
    empty = TqaiKVCache.merge([one(max_size) for _ in range(3)])
    first, second = (empty, full) if empty_first else (full, empty)
    first.extend(second)
    lengths = [0, 0, 0, 5, 3] if empty_first else [5, 3, 0, 0, 0]
    assert first.offset.tolist() == lengths
    # a prompt that is padded on the right comes next
    first.prepare(lengths=[10, 8, 12, 7, 11], right_padding=[2, 4, 0, 5, 1])
    assert add(first, 12, rows=5)[0].shape[0] == 5
    first.finalize()
    expected = [a + b for a, b in zip(lengths, [10, 8, 12, 7, 11], strict=True)]
    assert first.offset.tolist() == expected == [row.offset for row in first.rows]


def test_batches_are_columns_as_in_the_plain_one() -> None:
    cache, plain = many([0, 2]), BatchKVCache([0, 2])
    for count in (6, 1, 1):
        assert mx.array_equal(cache.make_mask(count), plain.make_mask(count))
        ours, theirs = (add(each, count, rows=2, seed=count) for each in (cache, plain))
        assert mx.array_equal(ours[0][0], theirs[0][0])
        assert mx.array_equal(ours[0][1, :, 2:], theirs[0][1, :, 2:])
