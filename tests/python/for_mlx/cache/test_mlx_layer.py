"""The compressed cache of one layer, as mlx-lm asks for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from small_mlx import (
    compiled_alone,
    error,
    make_model,
    make_prompt_cache,
    mx,
    plain_cache,
    read,
    tokens,
)

# isort: split
import tqai
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    _BaseCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from tqai import _core
from tqai.mlx.attention.view import TqaiView
from tqai.mlx.cache.layer import TqaiKVCache
from tqai.mlx.model.geometry import LayerShape
from tqai.settings import Settings


def layer(max_size: int | None = None, **options: Any) -> TqaiKVCache:
    options = {"residual_window": 32, **options}
    return TqaiKVCache(LayerShape(3, 2, 16, 16, max_size), Settings(**options))


def vectors(count: int, rows: int = 1, seed: int = 0, dtype: Any = mx.float32) -> Any:
    return mx.random.normal((rows, 2, count, 16), key=mx.random.key(seed)).astype(dtype)


def fill(cache: Any, *parts: int) -> None:
    for at, part in enumerate(parts):
        keys, values = cache.update_and_fetch(vectors(part, seed=at), vectors(part, seed=100 + at))
        mx.eval(keys[..., :1, :1], values[..., :1, :1])
        mx.eval(cache.state)


def test_it_has_what_mlx_lm_asks_of_a_cache() -> None:
    plain = {name for name in dir(KVCache) if not name.startswith("_")}
    own = {name for name in dir(TqaiKVCache) if not name.startswith("_")}
    assert isinstance(layer(), _BaseCache)
    assert plain - own <= {"step", "merge"}
    assert not hasattr(layer(), "bits")  # by which attention takes a cache for mlx-lm's own


@pytest.mark.parametrize("max_size", [None, 40, 150])
def test_lengths_are_those_of_the_plain_cache(max_size: int | None) -> None:
    plain = KVCache() if max_size is None else RotatingKVCache(max_size)
    cache = layer(max_size)
    assert cache.empty() and cache.size() == cache.offset == 0 and cache.nbytes == 0
    for at, part in enumerate([5, 1, 60, 1, 1, 90, 1, 30]):
        for window in (None, 30):
            for array in (False, True):
                ours, own = (
                    each.make_mask(part, window_size=window, return_array=array)
                    for each in (cache, plain)
                )
                if isinstance(own, mx.array):
                    assert ours.shape == own.shape
                    if part > 1:
                        assert mx.array_equal(ours, own)
                    else:  # tokens in their order, where a rotating cache has them in its own
                        assert ours.sum() == own.sum() and ours[..., -1]
                else:
                    assert ours == own
        for which in zip(
            cache.update_and_fetch(vectors(part, seed=at), vectors(part, seed=at)),
            plain.update_and_fetch(vectors(part, seed=at), vectors(part, seed=at)),
            strict=True,
        ):
            assert which[0].shape == which[1].shape and which[0].dtype == which[1].dtype
        assert [view.shape for view in cache.keys_and_values()] == [
            view.shape for view in plain.keys_and_values()
        ]
        assert (cache.offset, cache.size()) == (plain.offset, plain.size())
        assert cache.is_trimmable() == plain.is_trimmable() and not cache.empty()


def test_arrays_come_out_as_they_went_in_within_the_window() -> None:
    cache, plain = layer(residual_window=100), KVCache()
    for at, part in enumerate([40, 1, 30]):
        given = [
            each.update_and_fetch(vectors(part, seed=at), vectors(part, seed=9 + at))
            for each in (cache, plain)
        ]
        for ours, own in zip(*given, strict=True):
            assert mx.array_equal(mx.array(ours), own)


@pytest.mark.parametrize("is_patched", [False, True])
def test_views_where_somebody_recognises_them(is_patched: bool) -> None:
    model = make_model("llama")
    if is_patched:
        tqai.patch(model)
    cache = layer()
    fill(cache, 200)
    kind = TqaiView if is_patched else mx.array
    keys, values = cache.update_and_fetch(vectors(1), vectors(1))
    assert type(keys) is type(values) is kind
    assert type(cache.keys_and_values()[0]) is kind
    assert mx.array_equal(mx.array(keys)[..., -1:, :], vectors(1))


@pytest.mark.parametrize("max_size", [None, 300])
def test_tokens_are_trimmed(max_size: int | None) -> None:
    cache = layer(max_size)
    fill(cache, 100, 80)
    expected, _ = cache.update_and_fetch(vectors(1), vectors(1))
    expected = mx.array(expected)
    assert cache.trim(1) == 1 and cache.offset == 180
    fill(cache, 20)
    assert cache.trim(20) == 20
    keys, _ = cache.update_and_fetch(vectors(1), vectors(1))
    assert error(mx.array(keys), expected) < 0.15  # tokens that were sealed meanwhile
    assert mx.array_equal(mx.array(keys)[..., -10:, :], expected[..., -10:, :])
    assert cache.trim(1000) == 181 and cache.offset == 0
    fill(cache, 3)
    assert cache.offset == 3


def test_a_full_window_is_not_trimmed() -> None:
    caches = [layer(64)]
    fill(caches[0], 63)
    assert can_trim_prompt_cache(caches)
    fill(caches[0], 1)
    assert not can_trim_prompt_cache(caches) and trim_prompt_cache(caches, 1) == 0


def test_a_sliding_window_frees_what_it_has_left() -> None:
    cache = layer(100)
    fill(cache, 200)
    early = cache.nbytes
    fill(cache, *[100] * 20, *[1] * 70)
    assert cache.offset == 2270 and cache.nbytes < 1.5 * early


def test_a_copy_shares_tiles_and_goes_its_own_way() -> None:
    cache = layer()
    fill(cache, 2000)
    before = _core.allocated_bytes()
    copied = copy.deepcopy([cache])[0]
    assert _core.allocated_bytes() - before < cache.nbytes / 4
    fill(copied, 30)
    assert (cache.offset, copied.offset) == (2000, 2030)
    keys, _ = cache.update_and_fetch(vectors(1), vectors(1))
    assert keys.shape[2] == 2001


def test_a_copy_has_what_was_not_sealed_yet() -> None:
    cache = layer()
    cache.update_and_fetch(vectors(5), vectors(5, seed=1))
    copied = copy.deepcopy(cache)
    assert mx.array_equal(mx.array(copied.keys_and_values()[0]), vectors(5))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_state_is_the_whole_cache(dtype: Any) -> None:
    cache = layer(300, bits_k=3, centering="mean")
    cache.update_and_fetch(vectors(200, dtype=dtype), vectors(200, seed=1, dtype=dtype))
    again = TqaiKVCache.from_state(cache.state)
    assert (again.offset, again.settings, again.shape) == (200, cache.settings, cache.shape)
    assert again.dtypes == (dtype, dtype)
    for ours, own in zip(again.keys_and_values(), cache.keys_and_values(), strict=True):
        assert mx.array_equal(mx.array(ours), mx.array(own))


def test_a_state_is_not_made_before_it_is_read() -> None:
    """mlx-lm evaluates it after each part of a prompt."""
    cache = layer()
    fill(cache, 500)
    cache._state_items = None  # would raise if it were called
    mx.eval([cache.state for _ in range(2)])
    assert cache.is_packed()


def test_an_empty_state_is_an_empty_cache() -> None:
    again = TqaiKVCache.from_state(layer(bits_v=5).state)
    assert again.empty() and again.settings.bits_v == 5


@pytest.mark.parametrize("items", [["{}", None], ["[1]", None], ["nothing", None]])
def test_another_state_is_refused(items: list[Any]) -> None:
    with pytest.raises(ValueError, match="not the state of a compressed cache"):
        TqaiKVCache.from_state(items)


def test_a_newer_state_is_refused() -> None:
    with pytest.raises(ValueError, match="a state of version 99"):
        TqaiKVCache.from_state(['{"version": 99, "shape": {}, "settings": {}}', None])


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_prompt_caches_are_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    text = tokens(400)
    cache = tqai.patch(model, skip_layers=[1] if family == "qwen2" else [])
    read(model, cache, text[:, :300], [300])
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"of": family})
    loaded, about = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
    assert about == {"of": family} and [c.offset for c in loaded] == [300, 300]
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    expected = read(model, cache, text[:, 300:], [50])
    assert mx.array_equal(read(model, loaded, text[:, 300:], [50]), expected)


@compiled_alone
def test_what_is_evaluated_is_little() -> None:
    """Attention over a sealed cache makes no array of all its tokens."""
    model = make_model("llama", num_hidden_layers=1)
    cache = tqai.patch(model)
    read(model, cache, tokens(2000), [2000])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    read(model, cache, tokens(1), [1])
    whole = 2 * 2 * 16 * 2000 * 4
    assert mx.get_peak_memory() - before < whole / 4


@compiled_alone
def test_a_prompt_is_never_held_whole() -> None:
    """While it is read, the arrays of mlx and the compressed cache take less than half of what the
    plain cache does."""
    model = make_model("llama", num_hidden_layers=8, num_key_value_heads=4, head_dim=32)
    text = tokens(2048)

    def peak(cache: Any) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before, held = mx.get_active_memory(), _core.allocated_bytes()
        read(model, cache, text, [256] * 8)
        return mx.get_peak_memory() - before + _core.allocated_bytes() - held

    plain = peak(plain_cache(model))
    assert peak(tqai.patch(model)) < plain / 2


def test_what_does_not_fit_is_refused() -> None:
    cache = layer()
    with pytest.raises(ValueError, match=r"layer 3: keys of shape \(1, 4, 5, 16\)"):
        cache.update_and_fetch(mx.zeros((1, 4, 5, 16)), mx.zeros((1, 4, 5, 16)))
    with pytest.raises(ValueError, match="layer 3: keys of .*int32"):
        cache.update_and_fetch(mx.zeros((1, 2, 5, 16), mx.int32), vectors(5))
    with pytest.raises(ValueError, match="do not go with values"):
        cache.update_and_fetch(vectors(5), vectors(4))
    fill(cache, 5)
    with pytest.raises(ValueError, match="keys of 2 rows; the cache holds 1"):
        cache.update_and_fetch(vectors(1, rows=2), vectors(1, rows=2))
    with pytest.raises(ValueError, match="float16"):
        cache.update_and_fetch(vectors(1, dtype=mx.float16), vectors(1, dtype=mx.float16))
    with pytest.raises(NotImplementedError, match=r"layer 3: .* no \.keys"):
        _ = cache.keys
    assert cache.offset == 5


@compiled_alone
def test_what_is_no_number_is_refused_and_forgotten() -> None:
    cache = layer()
    fill(cache, 5)
    with pytest.raises(ValueError, match="layer 3: .* holds NaN or infinity"):
        cache.update_and_fetch(vectors(1) * float("nan"), vectors(1))
        cache.settle()
    assert cache.offset == 5
    fill(cache, 1)


def test_a_view_that_is_out_of_date_says_so() -> None:
    tqai.patch(make := make_model("llama"))
    assert tqai.is_patched(make)
    cache = layer()
    fill(cache, 100)
    keys, values = cache.update_and_fetch(vectors(1), vectors(1))
    fill(cache, 1)
    with pytest.raises(RuntimeError, match="layer 3 are from before the cache was changed"):
        _ = keys + 1
    with pytest.raises(RuntimeError, match="layer 3"):
        base.scaled_dot_product_attention(vectors(1), keys, values, cache, 1.0, None)


def test_report_and_names() -> None:
    model = make_model("llama")
    cache = tqai.patch(model)
    read(model, cache, tokens(300), [300])
    assert "300 tokens" in repr(cache) and "layer 0: 300 tokens" in repr(cache[0])
    assert len(tree_flatten([c.state for c in cache])) == 4
    assert len(make_prompt_cache(model)) == len(plain_cache(model)) == 2
